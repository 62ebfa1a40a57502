"""Where a run comes from: the commit of the checkout that holds this very code, and no other."""

import re
import subprocess

from switchmoe.runs import origin


def test_the_commit_is_that_of_the_code_and_says_if_it_was_changed(tmp_path, monkeypatch):
    file = tmp_path / "origin.py"
    file.write_text("x = 1\n")
    monkeypatch.setattr(origin, "__file__", str(file))
    assert origin.commit() == "", "no checkout"

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-m", "other")
    git("tag", "v1")
    assert origin.commit() == "", "somebody else's checkout, as that around a virtual environment"
    git("add", "origin.py")
    git("commit", "-m", "this")
    assert re.fullmatch(r"[0-9a-f]{12}", origin.commit())
    file.write_text("x = 2\n")
    assert re.fullmatch(r"[0-9a-f]{12}-dirty", origin.commit())


def test_the_machine_has_cores_and_a_name():
    assert re.fullmatch(r"[1-9]\d* x .+", origin.machine())
