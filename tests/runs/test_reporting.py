import io
import json
import math
import os
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from switchmoe.runs import reporting
from switchmoe.runs.reporting import MetricsWriter, Progress, duration, fit, read_metrics, scalars


def train_record(step, **changes):
    return {
        "step": step,
        "split": "train",
        "cross_entropy": 5.0 + step / 1000,
        "tokens_per_second": 12345.6,
        "step_seconds": 0.5,
        "layers": ["encoder/1", "decoder/1"],
        "layer_fraction_dropped": [0.01, 0.03],
        "layer_expert_load": [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]],
        "layer_router_entropy": [1.0, 1.25],
    } | changes


def validation_record(step):
    return {"step": step, "split": "validation", "cross_entropy": 4.5, "perplexity": 90.0, "layers": []}


def run(workdir, records, **arguments):
    writer = MetricsWriter(workdir, **arguments)
    for record in records:
        writer.write(record)
    writer.close()
    return workdir / "metrics.jsonl"


def events(workdir):
    """Every event of a run's TensorBoard files, in the order in which TensorBoard reads them."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):  # length (8 bytes), its checksum (4), event, its checksum (4)
            (length,) = struct.unpack_from("<Q", data, start)
            found.append(Event.FromString(data[start + 12 : start + 12 + length]))
            start += 16 + length
    return found


def test_records_are_read_as_written(tmp_path):
    records = [train_record(1), validation_record(1), train_record(2)]
    assert read_metrics(run(tmp_path / "new" / "run", records)) == records


def test_a_record_is_on_disk_before_the_next_one(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(train_record(1))
    assert read_metrics(tmp_path / "metrics.jsonl") == [train_record(1)]
    assert [event.step for event in events(tmp_path) if event.HasField("summary")] == [1]
    writer.close()


def test_array_values_become_plain_numbers(tmp_path):
    record = {"step": np.int64(3), "split": "train", "loss": np.float32(0.1), "load": np.array([0.5, 0.5])}
    (read,) = read_metrics(run(tmp_path, [record]))
    assert read == {"step": 3, "split": "train", "loss": float(np.float32(0.1)), "load": [0.5, 0.5]}


def test_non_finite_values_are_null_in_strict_json_and_absent_from_tensorboard(tmp_path):
    bad = train_record(1, cross_entropy=math.nan, loss=math.inf, layer_router_entropy=[math.nan, 1.0])
    path = run(tmp_path, [bad])

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read["cross_entropy"] is None and read["loss"] is None
    assert read["layer_router_entropy"] == [None, 1.0]
    tags = [value.tag for event in events(tmp_path) for value in event.summary.value]
    assert "train/decoder_1/router_entropy" in tags
    assert not {"train/cross_entropy", "train/loss", "train/encoder_1/router_entropy"} & set(tags)


@pytest.mark.parametrize("torn", [b'{"step": 3, "split": "tr', b'{"step": 3, "text": "\xc3', b"\0\0\0\0"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = run(tmp_path, [train_record(1), train_record(2)])
    path.write_bytes(path.read_bytes() + torn)
    assert read_metrics(path) == [train_record(1), train_record(2)]


@pytest.mark.parametrize(
    "line", ['{"step": 3, "split": "tr', "[1, 2]", '{"split": "train"}', '{"step": 3}', ""]
)
def test_any_other_bad_line_is_an_error_that_names_file_and_line(tmp_path, line):
    path = run(tmp_path, [train_record(1), train_record(2)])
    first, second = path.read_text().splitlines()
    path.write_text("\n".join([first, line, second]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: ") as caught:
        read_metrics(path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, resume_step=1)


def test_a_killed_and_resumed_run_reads_like_an_uninterrupted_one(tmp_path):
    records = [train_record(1), train_record(20), validation_record(20), train_record(21), train_record(30)]
    whole = run(tmp_path / "whole", records)
    path = run(tmp_path / "killed", records[:4])
    path.write_bytes(path.read_bytes() + b'{"step": 30, "spl')
    run(tmp_path / "killed", records[3:], resume_step=20)
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(child.name for child in path.parent.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_minus_one_starts_over_and_none_only_mends_the_last_line(tmp_path):
    path = run(tmp_path, [train_record(1), train_record(2)])
    path.write_bytes(path.read_bytes() + b'{"step"')
    run(tmp_path, [train_record(3)])
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    run(tmp_path, [train_record(1)], resume_step=-1)
    assert [record["step"] for record in read_metrics(path)] == [1]


def test_a_failure_while_dropping_lines_loses_nothing(tmp_path, monkeypatch):
    path = run(tmp_path, [train_record(1), train_record(2)])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        MetricsWriter(tmp_path, resume_step=1)
    assert path.read_bytes() == before


def test_tensorboard_gets_each_scalar_and_forgets_the_steps_after_the_resumed_one(tmp_path):
    run(tmp_path, [train_record(1), train_record(2), train_record(3)])
    run(tmp_path, [train_record(3)], resume_step=2)
    assert (
        len(list((tmp_path / "tensorboard").iterdir())) == 2
    )  # a restart within a second overwrites nothing
    found = events(tmp_path)
    values = {
        value.tag: value.simple_value for event in found if event.step == 1 for value in event.summary.value
    }
    assert values == pytest.approx(scalars(train_record(1)), rel=1e-6)
    restarts = [event for event in found if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in restarts] == [(3, SessionLog.START)]
    assert [event.step for event in found if event.HasField("summary")] == [1, 2, 3, 3]


def test_scalars_of_layers_and_of_expert_load():
    found = scalars(train_record(7))
    assert found["train/cross_entropy"] == 5.007
    assert found["train/encoder_1/fraction_dropped"] == 0.01
    assert (found["train/encoder_1/load_min"], found["train/encoder_1/load_max"]) == (0.0, 2.0)
    assert (found["train/decoder_1/load_min"], found["train/decoder_1/load_max"]) == (1.0, 1.0)
    assert not any("step" == tag.split("/")[-1] or "layers" in tag for tag in found)
    dense = scalars({"step": 1, "split": "train", "loss": 2.0, "layers": [], "layer_expert_load": []})
    assert dense == {"train/loss": 2.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """The rows a terminal shows: a carriage return goes back to overwrite, a newline goes on."""
        rows, column = [""], 0
        for character in self.getvalue():
            if character == "\r":
                column = 0
            elif character == "\n":
                rows, column = [*rows, ""], 0
            else:
                rows[-1] = rows[-1][:column] + character + rows[-1][column + 1 :]
                column += 1
        return [row.rstrip() for row in rows]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def clock(*times):
    return iter(times).__next__


def test_a_terminal_has_one_line_rewritten_in_place(terminal):
    progress = Progress(100, terminal, clock(0.0, 5.0))
    progress.update(train_record(10))
    progress.update(train_record(20, cross_entropy=4.0))
    assert terminal.screen() == ["step 20/100  loss 4.000  12,346 tokens/s  dropped 2.0%  ETA 40s"]
    progress.close()
    assert terminal.screen()[1:] == [""]
    progress.close()
    assert terminal.getvalue().count("\n") == 1


@pytest.mark.parametrize("columns", [10, 20, 40, 60, 80, 200])
def test_the_live_line_never_fills_the_terminal(terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(524288, terminal, clock(0.0))
    progress.update(train_record(123456))
    (line,) = terminal.screen()
    assert len(line) < columns
    assert line.startswith("step 1234"[: columns - 1])
    assert ("ETA" in line) == (columns >= 40)


def test_notes_and_validation_are_lines_above_the_live_one(terminal):
    progress = Progress(100, terminal, clock(0.0))
    progress.note("compiling")
    progress.update(train_record(10))
    progress.note("saved")
    progress.update(validation_record(10))
    live = "step 10/100  loss 5.010  12,346 tokens/s  dropped 2.0%  ETA 45s"
    above = ["compiling", "saved", "step 10/100  validation loss 4.500  perplexity 90.0"]
    assert terminal.screen() == [*above, live]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_pipe_or_a_dumb_terminal_gets_a_plain_line_per_record(stream, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "20")  # of no concern to a pipe
    output = stream()
    progress = Progress(100, output, clock(0.0, 5.0))
    progress.update(train_record(10))
    progress.update(validation_record(10))
    progress.update(train_record(20))
    progress.note("done")
    progress.close()
    assert output.getvalue().splitlines() == [
        "step 10/100  loss 5.010  12,346 tokens/s  dropped 2.0%  ETA 45s",
        "step 10/100  validation loss 4.500  perplexity 90.0",
        "step 20/100  loss 5.020  12,346 tokens/s  dropped 2.0%  ETA 40s",
        "done",
    ]
    assert "\r" not in output.getvalue()


def test_the_eta_of_a_resumed_run_goes_by_its_own_steps():
    output = io.StringIO()
    progress = Progress(1000, output, clock(100.0, 110.0))
    progress.update(train_record(500))
    progress.update(train_record(510))  # 1 s a step, 490 steps to go
    assert output.getvalue().splitlines()[-1].endswith("ETA 8m10s")


def test_a_dense_or_bare_record_has_no_dropped_tokens_to_show():
    output = io.StringIO()
    Progress(10, output).update(
        {"step": 1, "split": "train", "cross_entropy": None, "layer_fraction_dropped": []}
    )
    assert output.getvalue() == "step 1/10  loss nan\n"


def test_fit_keeps_first_and_last_fields_longest():
    fields = ["step 1/2", "loss 3", "4 tokens/s", "ETA 5s"]
    assert fit(fields, 100) == "step 1/2  loss 3  4 tokens/s  ETA 5s"
    assert fit(fields, 30) == "step 1/2  loss 3  ETA 5s"
    assert fit(fields, 16) == "step 1/2  ETA 5s"
    assert fit(fields, 4) == "step"
    assert fit(fields, -1) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (273600, "3d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_numbers_that_are_none_are_read_as_none_and_shown(tmp_path):
    """Other tools write NaN and Infinity into JSON."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "split": "validation", "cross_entropy": NaN, "layer_x": [Infinity, -Infinity, 1.0]}\n'
    )
    (record,) = read_metrics(path)
    assert record["cross_entropy"] is None and record["layer_x"] == [None, None, 1.0]
    assert [duration(value) for value in (math.nan, math.inf, -math.inf, -1.0)] == ["?", "?", "?", "0s"]


def test_a_clock_that_did_not_move(monkeypatch):
    monkeypatch.setattr(reporting.time, "monotonic", lambda: 5.0)
    clock = reporting.Clock()
    clock.step(100)
    seconds, waited, tokens = clock.lap()
    assert seconds > 0 and math.isfinite(tokens / seconds) and waited / seconds == 0


def test_what_a_clock_counts_is_told_once_and_not_what_it_paused_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    clock = reporting.Clock()

    def steps(count):
        for _ in range(count):
            now[0] += 2.0
            clock.step(100)

    steps(3)
    with clock.paused():
        now[0] += 50.0
        assert clock.news() == {"steps_timed": 3, "train_seconds": 6.0, "input_wait_seconds": 0.0}
        now[0] += 50.0
    with clock.waiting():
        now[0] += 1.0
    steps(1)
    assert clock.lap() == (9.0 / 4, 1.0 / 4, 100.0), "a lap is not cut short by it"
    steps(2)
    assert clock.news() == {"steps_timed": 3, "train_seconds": 7.0, "input_wait_seconds": 1.0}
    assert clock.news()["steps_timed"] == 0
