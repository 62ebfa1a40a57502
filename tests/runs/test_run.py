"""The main job as a user runs it: whole, killed, stopped, resumed, and fed with mistakes."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import run as command
from switchmoe.data import sources, vocabulary
from switchmoe.runs import loop, text
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import DataSettings

TINY = [
    "--config.model.d_model=16", "--config.model.d_ff=16", "--config.model.d_kv=8", "--config.model.num_heads=2",
    "--config.moe.num_experts=4", "--config.moe.group_size=128", "--config.data.batch_size=4",
    "--config.data.input_length=32", "--config.data.vocab_size=600", "--config.train.num_steps=24",
    "--config.train.log_every=1", "--config.train.eval_every=8", "--config.train.eval_batches=2",
    "--config.checkpoint.every=5",
    "--config.moe.jitter=0.01",
]  # fmt: skip
# What makes another kind of model of it.
DECODER_ONLY = [
    "--config.model.stacks=decoder_only", "--config.data.objective=causal_lm", "--config.model.positions=rotary",
    "--config.model.num_kv_heads=1", "--config.moe.router=top_k", "--config.moe.choices=2",
]  # fmt: skip


def start(workdir, environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", f"--workdir={workdir}", *TINY, *arguments],
        env=environment,
        cwd=workdir.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, (process.returncode, out, err)
    return out, err


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was never reached: {process.communicate()}")


def losses(workdir):
    """All that a step computes, but not its times."""
    timed = {
        "step_seconds",
        "tokens_per_second",
        "padded_tokens_per_second",
        "input_wait_share",
        "peak_share",
        "seconds",
    }
    return [
        {k: v for k, v in record.items() if k not in timed}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_killed_and_a_stopped_run_end_like_an_undisturbed_one(tmp_path, environment, capsys):
    """SIGKILL after step 7 (checkpoint at 5), SIGTERM later, the same command each time: bitwise the same."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    out, _ = finish(start(whole, environment))
    assert "\r" not in out and "step 24/24" in out, "a pipe gets plain lines"
    assert out.index("compiling the step") < out.index("compiled in") < out.index("step 1/24"), "no silence"
    for name in ("config.json", "metrics.jsonl", "run.json", "report.html", "plots/loss.png", "tensorboard"):
        assert (whole / name).exists(), name
    for record in read_metrics(whole / "metrics.jsonl"):  # 8 is what span corruption of 34 tokens writes
        assert record["split"] == "validation" or record["tokens"] == 4 * (32 + 8)
    run = json.loads((whole / "run.json").read_text())
    assert len(run["examples"]) == 4 and all("<extra_id_0>" in e["input"] for e in run["examples"])

    process = start(broken, environment)
    wait_for_step(process, broken, 7)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(broken, environment)
    wait_for_step(process, broken, 9)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, command.EXIT_STOPPED)
    assert "stopped by SIGTERM after step" in err and "the same command continues" in err
    out, _ = finish(start(broken, environment))
    assert "resuming from the checkpoint of step" in out
    assert losses(broken) == losses(whole)
    assert [r["step"] for r in losses(broken) if r["split"] == "train"] == list(range(1, 25))

    # Once more on a finished run: nothing to train, nothing lost.
    before = losses(whole)
    out, _ = finish(start(whole, environment))
    assert "nothing to do: the run in" in out and "compiling" not in out and "done:" in out
    assert losses(whole) == before
    (whole / "report.html").unlink()  # what is missing is made good
    out, _ = finish(start(whole, environment))
    assert "nothing to do" not in out and (whole / "report.html").exists() and losses(whole) == before
    other = ["--config.train.seed=5", "--config.moe.z_loss_weight=1"]
    code = command.main(["run", f"--workdir={whole}", *TINY, *other])
    err = capsys.readouterr().err
    assert code == command.EXIT_BAD_INPUT
    assert (
        "moe.z_loss_weight (0.0 there, 1.0 asked: another loss is minimised); train.seed (0 there, 5 asked"
        in err
        and err.count("\n") == 1
    )
    assert losses(whole) == before


def run_here(tmp_path, capsys, *arguments):
    code = command.main(["run", f"--workdir={tmp_path / 'run'}", *TINY, *arguments])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.data.source=/nowhere/*.txt"], "data.source=/nowhere/*.txt"),
        (["--config.data.source=c4/en"], "data.source=c4/en"),
        (["--config.data.vocab=/nowhere/spiece.model"], "data.vocab=/nowhere/spiece.model"),
        (["--config.data.batch_size=100000"], "data.batch_size=100000"),
        (
            ["--config.data.batch_size=6", "--config.train.accumulate=4"],
            "train.accumulate=4: accepted is a divisor",
        ),
        (["--config.moe.num_experts=512"], "moe.num_experts=512: accepted is at most"),
        (["--config.data.target_length=3"], "data.target_length=3"),
        (["--config.data.bos_id=1000000"], "data.bos_id=1000000: accepted is a row of the embedding, below"),
        (["--config.data.eos_id=2"], "data.eos_id=2: accepted is 1"),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_mistakes_leave_nothing_behind(tmp_path, capsys, arguments, message):
    code, captured = run_here(tmp_path, capsys, "--config.data.data_dir=", *arguments)
    assert code == command.EXIT_BAD_INPUT
    assert message in captured.err and captured.err.count("\n") == 1, captured.err
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_directory_that_is_not_a_runs(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("[1, 2")
    code, captured = run_here(tmp_path, capsys)
    assert code == command.EXIT_BAD_INPUT and "config.json is not a run's" in captured.err
    assert (tmp_path / "run" / "config.json").read_text() == "[1, 2"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("checkpoints/1/state", "", "holds checkpoints but no config.json"),
        ("run.json", "[1]", "run.json is damaged"),
        ("run.json", '{"a": ', "run.json is damaged"),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_parts_of_a_run_that_do_not_fit(tmp_path, capsys, name, content, message):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    code, captured = run_here(tmp_path, capsys)
    assert code == command.EXIT_BAD_INPUT
    assert message in captured.err and captured.err.count("\n") == 1, captured.err
    assert path.read_text() == content and not (tmp_path / "run" / "config.json").exists()


@pytest.mark.usefixtures("one_device")
def test_another_vocabulary_is_refused(tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "run.json").write_text('{"vocabulary_sha256": "0"}')
    corpus = tmp_path / "text.txt"
    corpus.write_text("".join(f"word{n} and more text\n" for n in range(400)))
    data = DataSettings(source=str(corpus), data_dir=str(tmp_path / "cache"), vocab_size=300)
    found = vocabulary.load_vocabulary(data, sources.load(data, "train"))
    (workdir / "vocabulary.model").write_bytes(found.model_bytes)
    code, captured = run_here(tmp_path, capsys)
    assert (
        code == command.EXIT_BAD_INPUT
        and "vocabulary.model: it is another vocabulary than the run was trained with" in captured.err
    )


@pytest.mark.parametrize(
    "foreign, code, message",
    [
        (1.0, 2, "% of the pieces of "),
        (0.1, 0, "warning: the vocabulary does not fit the text: "),
        (0.0, 0, "vocabulary: 0.00% unknown, 0.00% single bytes of the held-out pieces"),
    ],
)
@pytest.mark.usefixtures("one_device")
def test_a_vocabulary_that_does_not_fit(tmp_path, capsys, foreign, code, message):
    """An English model without bytes to fall back to, on text of which so much is Russian."""
    rng = np.random.default_rng(0)

    def words(letters):
        return ["".join(rng.choice(list(letters), rng.integers(2, 9))) for _ in range(400)]

    english, russian = words("abcdefghijklmnoprstuw"), words("абвгдежзиклмнопрстуя")

    def text(share):
        chosen = [russian if rng.random() < share else english for _ in range(600)]
        return [" ".join(rng.choice(language, 12)) for language in chosen]

    (tmp_path / "text.txt").write_text("\n".join(text(foreign)), encoding="utf-8")
    trainer = vocabulary.TRAINER | {"byte_fallback": False}
    (tmp_path / "spiece.model").write_bytes(vocabulary.train(text(0.0), 300, trainer))
    found, captured = run_here(
        tmp_path, capsys, f"--config.data.source={tmp_path / 'text.txt'}", "--config.data.vocab_size=300",
        f"--config.data.vocab={tmp_path / 'spiece.model'}", "--config.data.batch_size=4",
        "--config.data.input_length=32", "--config.train.num_steps=1", "--config.train.eval_batches=4",
    )  # fmt: skip
    assert found == code, captured.err
    assert message in captured.out + captured.err
    if code:
        assert captured.err.count("\n") == 1 and not (tmp_path / "run" / "config.json").exists()
    else:
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert (run["unknown_pieces"] > 0.01) == (foreign > 0) and run["byte_pieces"] == 0


@pytest.mark.usefixtures("one_device")
def test_a_directory_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code = command.main(["run", f"--workdir={tmp_path / 'file' / 'run'}", *TINY])
    assert code == command.EXIT_IO
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.usefixtures("one_device")
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys):
    """A learning rate that is far too high; the message names the step, the batch and the checkpoint."""
    code, captured = run_here(
        tmp_path, capsys, "--config.optimizer.name=adamw", "--config.optimizer.schedule=constant",
        "--config.optimizer.learning_rate=1e30", "--config.checkpoint.every=1",
    )  # fmt: skip
    assert code == command.EXIT_NON_FINITE
    assert (
        "Batch" in captured.err and "last good checkpoint" in captured.err and captured.err.count("\n") == 1
    )


@pytest.mark.usefixtures("one_device")
def test_parameters_that_overflow_are_never_saved(tmp_path, capsys):
    """Loss and gradient of the first step are finite, its update is not."""
    code, captured = run_here(
        tmp_path, capsys, "--config.optimizer.schedule=constant",
        "--config.optimizer.learning_rate=1e39", "--config.checkpoint.every=1",
    )  # fmt: skip
    assert (
        code == command.EXIT_NON_FINITE
        and "step 1: parameter_norm" in captured.err
        and "none" in captured.err
    )
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]


@pytest.mark.usefixtures("one_device")
def test_a_signal_before_the_first_step_acts_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(text.sources, "load_splits", lambda *_: signal.raise_signal(signal.SIGTERM))
    code, captured = run_here(tmp_path, capsys)
    assert code == command.EXIT_STOPPED and "stopped by SIGTERM before the first step" in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_device")
def test_ctrl_c_once_is_a_stop_wherever_it_comes(tmp_path, capsys, monkeypatch, request):
    """While the directory is looked at, and while modules are imported."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background has none
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "check", lambda *_: signal.raise_signal(signal.SIGINT))
        code, captured = run_here(tmp_path, capsys)
        assert code == command.EXIT_INTERRUPTED and "stopped by SIGINT before the first" in captured.err
    monkeypatch.setattr(command, "carry_out", lambda *_: signal.raise_signal(signal.SIGINT))
    code, captured = run_here(tmp_path, capsys)
    assert code == command.EXIT_INTERRUPTED and captured.err == "experiments.run: interrupted\n"


@pytest.mark.usefixtures("one_device")
def test_whoever_reads_the_output_may_leave(tmp_path, capsys, monkeypatch):
    """`exits.leave` says so with its code: it is no failure of a file."""

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(loop, "run", closed)
    with pytest.raises(BrokenPipeError):
        run_here(tmp_path, capsys)


@pytest.mark.long
def test_ctrl_c_saves_too(tmp_path, environment):
    workdir = tmp_path / "run"
    process = start(workdir, environment, "--config.train.num_steps=100000")
    wait_for_step(process, workdir, 2)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, command.EXIT_INTERRUPTED)
    assert "stopped by SIGINT after step" in err
    assert any((workdir / "checkpoints").iterdir())
