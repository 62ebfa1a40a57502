"""What a conversion writes: of one process at a time, whole or not there."""

import concurrent.futures
import threading

import pytest

from switchmoe.interop import growing

ASKED = {"files": ["a"], "dtype": "float32"}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_it_is_there_when_the_block_has_ended(tmp_path):
    with growing.grown(tmp_path / "new/model", ASKED) as work:
        (work / "weights").write_text("whole")
        assert not (tmp_path / "new/model").exists()
    assert names(tmp_path / "new") == ["model"] and names(tmp_path / "new/model") == ["weights"]


def test_what_a_stopped_process_did_is_kept_for_the_same_conversion_alone(tmp_path):
    for stopped in range(2):
        with pytest.raises(KeyboardInterrupt), growing.grown(tmp_path / "model", ASKED) as work:
            assert (work / "weights").exists() == bool(stopped)
            (work / "weights").write_text("half")
            raise KeyboardInterrupt
    with (
        pytest.raises(
            ValueError, match=r"--target=.*model: another conversion is half done.*\(dtype differ\)"
        ),
        growing.grown(tmp_path / "model", ASKED | {"dtype": "bfloat16"}),
    ):
        pass
    assert (work / "weights").read_text() == "half"


def test_nothing_is_kept_of_a_damaged_source(tmp_path):
    with pytest.raises(ValueError, match="damaged"), growing.grown(tmp_path / "model", ASKED) as work:
        (work / "weights").write_text("half")
        raise ValueError("damaged")
    assert not names(tmp_path)


def test_what_is_told_while_it_grows(monkeypatch):
    """Half of 10 MB in 5 s, of which 2 MB were there: 3 MB in 5 s, and 5 MB to go at that rate."""
    now = [100.0]
    monkeypatch.setattr(growing.time, "monotonic", lambda: now[0])
    counter = growing.Counter(10_000_000)
    assert counter.state() == f"[{' ' * 20}]   0% of 10 MB, 0 MB/s"
    counter.add(2_000_000, kept=True)
    counter.add(3_000_000)
    now[0] = 105.0
    assert counter.state() == f"[{'#' * 10}{' ' * 10}]  50% of 10 MB, 1 MB/s, 8 s left"
    counter.add(5_000_000)
    assert counter.state() == f"[{'#' * 20}] 100% of 10 MB, 2 MB/s, 0 s left"
    assert str(counter.report(7)) == "7 tensors, 10 MB, 2 MB were there; 2 MB/s"
    assert growing.Counter(1, began=90.0).report(1).seconds == 15.0


def test_a_target_that_is_there(tmp_path):
    (tmp_path / "model").symlink_to("nowhere")
    with (
        pytest.raises(ValueError, match="--target=.*model: it is there; accepted is a name that is free"),
        growing.grown(tmp_path / "model", ASKED),
    ):
        pass
    assert names(tmp_path) == ["model"]


def test_of_two_at_once_the_second_is_refused(tmp_path):
    with growing.grown(tmp_path / "model", ASKED) as work:
        (work / "weights").write_text("first")
        with (
            pytest.raises(
                ValueError, match=r"--target=.*model: a conversion is under way there \(process \d+"
            ),
            growing.grown(tmp_path / "model", ASKED),
        ):
            pass
    assert (tmp_path / "model/weights").read_text() == "first"


def test_of_many_at_once_one_makes_it(tmp_path):
    start, outcomes = threading.Barrier(8), []

    def one(number):
        start.wait()
        for _ in range(50):  # some come while another ends
            try:
                with growing.grown(tmp_path / "model", ASKED) as work:
                    assert not (work / "weights").exists()
                    (work / "weights").write_text(str(number))
                outcomes.append(number)
            except ValueError as error:
                assert "it is there" in str(error) or "under way" in str(error)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(8)))  # raises what one of them did
    assert len(outcomes) == 1
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["weights"]
    assert (tmp_path / "model/weights").read_text() == str(outcomes[0])
