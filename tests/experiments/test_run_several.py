"""A process of a job that fails in a way nobody foresaw leaves at once, so that the others need not wait for it."""

import pytest

from experiments import exits, process, run, supervisor
from switchmoe.settings import Settings


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("error", [KeyError("field"), MemoryError(), RuntimeError("the data's thread")])
def test_what_nobody_foresaw_is_told_and_ends_this_process_at_once(monkeypatch, capsys, error, several):
    left = []

    def fail(*_):
        raise error

    def leave(code, wait):
        left.append(code)
        raise SystemExit(code)

    monkeypatch.setattr("switchmoe.parallel.distributed.job", lambda *_: several or None)
    monkeypatch.setattr(supervisor, "is_child", lambda: True)
    monkeypatch.setattr(supervisor, "leave_with_parent", lambda: None)
    monkeypatch.setattr(process, "keep_quiet", lambda: None)
    monkeypatch.setattr(run, "_train", fail)
    monkeypatch.setattr(run, "_leave_at_once", leave)
    with pytest.raises(SystemExit if several else type(error)):
        run.carry_out(run.COMMAND, ["run"], Settings(), "runs/a")
    assert left == [exits.EXIT_FAILED] * several
    assert (type(error).__name__ in capsys.readouterr().err) == several
