"""What can go wrong with a run, made to go wrong: what the program says, and what was lost.

    python -m pytest -m faults -n 0 -s

prints the table of docs/faults.md. The quick rows are a part of the suite.
"""

import json
import os
import pickle
import shutil
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import empty, flip_a_bit, iterator, saved, state, truncate, written
from test_run import DECODER_ONLY, TINY, finish, losses, run_here, start

from experiments import command_line
from experiments import run as command
from switchmoe.runs import integrity, rundir
from switchmoe.runs.checkpoints import CheckpointError, Checkpoints
from switchmoe.runs.lock import LOCK_FILE, Lock
from switchmoe.runs.reporting import read_metrics
from switchmoe.settings import CheckpointSettings, from_config
from switchmoe.training import objective, train_state

pytestmark = pytest.mark.faults


@pytest.fixture(
    scope="session",
    autouse=True,
    params=["encoder_decoder", pytest.param("decoder_only", marks=pytest.mark.long)],
)
def kind(request):
    """Every fault happens to both kinds of models."""
    options = DECODER_ONLY if request.param == "decoder_only" else []
    TINY.extend(options)
    yield request.param
    del TINY[len(TINY) - len(options) :]


@pytest.fixture(scope="session")
def whole(tmp_path_factory, environment, kind):
    """A run of which copies are damaged."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(start(workdir, environment))
    return workdir


def final_state(workdir):
    settings = from_config(json.loads((workdir / "config.json").read_text()))
    tx = train_state.optimizer(settings)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(lambda: train_state.init_state(settings, tx)),
    )
    checkpoints = Checkpoints(workdir / "checkpoints", settings.checkpoint)
    assert checkpoints.latest() == settings.train.num_steps
    return checkpoints.restore(abstract)


def assert_same_run(a, b):
    """Records of every step, and the final state with the optimizer's, bit for bit."""
    assert losses(a) == losses(b)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, final_state(a), final_state(b))))


def one_line(captured_or_text):
    text = getattr(captured_or_text, "err", captured_or_text)
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text.removeprefix("experiments.run: ").strip()


def newest_record(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes()[-(2**16) :].split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else {"step": 0, "split": ""}


def wait_until(process, condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.long
@pytest.mark.parametrize("harm", [truncate, empty, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint(tmp_path, environment, whole, table, harm):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    file = max(written(workdir / "checkpoints" / "24" / "state"), key=lambda f: f.stat().st_size)
    harm(file)
    before = contents(workdir)
    _, err = finish(start(workdir, environment, "--config.train.log_every=2"), command.EXIT_IO)
    said = one_line(err)
    assert str(file.name) in said and "checkpoints/24 is damaged" in said and "on_damage=previous" in said
    assert before == contents(workdir), "nothing was changed"
    out, _ = finish(start(workdir, environment, "--config.checkpoint.on_damage=previous"))
    assert "continuing from step 20" in out and (workdir / "checkpoints" / "24.damaged").is_dir()
    assert_same_run(workdir, whole)
    name = {truncate: "truncated", empty: "empty", flip_a_bit: "bit-flipped", Path.unlink: "missing"}[harm]
    table(f"a checkpoint's file {name}", "refused, file named, exit 4; with checkpoint.on_damage=previous resumed from the one before it, and ended bitwise as the undisturbed run", "nothing; 4 steps done again, the damaged step kept as *.damaged")  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    workdir = tmp_path / "disk" / "run"
    workdir.mkdir(parents=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", workdir], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield workdir
    subprocess.run(["umount", "-l", workdir], check=True)


FULL = [
    "--config.model.d_model=64", "--config.model.d_ff=256", "--config.optimizer.name=adamw",
    "--config.train.num_steps=200", "--config.checkpoint.every=20",
]  # fmt: skip


def fill(disk, left):
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return filler


@pytest.mark.long
@pytest.mark.parametrize("on_error, room_again", [("stop", False), ("continue", False), ("continue", True)])
def test_a_full_disk(small_disk, environment, table, on_error, room_again):
    process = start(small_disk, environment, *FULL, f"--config.checkpoint.on_error={on_error}")
    wait_until(process, lambda: newest_record(small_disk)["step"] >= 25)
    wait_until(process, lambda: (small_disk / "checkpoints" / "20").is_dir())
    filler = fill(small_disk, 3 * 2**20)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if room_again and "warning" in line:
            filler.unlink()
            break
    if room_again:
        out, err = finish(process)
        out = "".join(lines) + out
        assert "can't be written" in out and "done:" in out
        assert (small_disk / "checkpoints" / "200").is_dir()
        table("disk full during a save, room later; checkpoint.on_error=continue", "a warning at each failed save, the next one succeeds, exit 0", "nothing")  # fmt: skip
        return
    _, err = finish(process, command.EXIT_IO)
    said = one_line(err)
    assert "can't be written" in said and "last complete: 20" in said
    assert (small_disk / "checkpoints" / "20" / integrity.MANIFEST).exists()
    assert integrity.damage(small_disk / "checkpoints" / "20") is None
    reached = newest_record(small_disk)["step"]
    if on_error == "stop":
        assert reached < 200
        table("disk full during a save; checkpoint.on_error=stop", "one line, exit 4, the last complete step named", f"the steps after the last checkpoint ({reached - 20})")  # fmt: skip
    else:
        assert reached == 200 and sum("warning" in line for line in lines) > 1
        assert (small_disk / "report.html").exists()
        table("disk full to the end, but for 3 MiB; checkpoint.on_error=continue", "a warning at each failed save, trained and reported to the end, then exit 4", f"the state after step 20 ({reached - 20} steps)")  # fmt: skip


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_a_shard_of_the_data(tmp_path, capsys, table):
    import lzma

    for shard in range(3):
        text = "".join(
            f"document {shard}.{n} of some {n * 7919 % 1000} words and more text\n" for n in range(900)
        )
        (tmp_path / f"{shard}.txt.xz").write_bytes(lzma.compress(text.encode()))
    arguments = ["run", f"--workdir={tmp_path / 'run'}", *TINY, f"--config.data.source={tmp_path}/*.txt.xz",
                 "--config.data.vocab_size=300", "--config.train.num_steps=4", "--config.train.eval_every=4"]  # fmt: skip
    assert command.main(arguments) == 0, capsys.readouterr().err
    capsys.readouterr()
    path = tmp_path / "1.txt.xz"
    (tmp_path / "run" / "report.html").unlink()  # a run that is done in all reads no data
    content, before = path.read_bytes(), contents(tmp_path / "run")
    for name, harm in {"truncated": truncate, "bit-flipped": flip_a_bit, "missing": Path.unlink}.items():
        harm(path)
        assert command.main(arguments) == command.EXIT_BAD_INPUT
        said = one_line(capsys.readouterr())
        assert ("1.txt.xz cannot be read" in said) or (
            name == "missing" and "documents are not those" in said
        )
        assert contents(tmp_path / "run") == before, "nothing was written"
        path.write_bytes(content)
        table(f"a data shard {name}", f"refused, {'the source' if name == 'missing' else 'the file'} named, exit 2", "nothing")  # fmt: skip


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def poisoned(monkeypatch):
    """Has the gradients of the given steps be NaN."""

    def poison(steps):
        def token_sums(params, batch, settings, key=None):
            sums = real(params, batch, settings, key)
            if key is not None:
                first = jax.random.key(settings.train.seed)
                keys = jnp.stack([jax.random.key_data(jax.random.fold_in(first, step - 1)) for step in steps])
                here = (keys == jax.random.key_data(key)[None]).all(-1).any()
                sums["nll"] = sums["nll"] * jnp.where(here, jnp.nan, 1.0)
            return sums

        poisonous = objective.CROSS_ENTROPY._replace(sums=token_sums)
        monkeypatch.setattr(objective, "CROSS_ENTROPY", poisonous)

    real = objective.token_sums
    return poison


@pytest.mark.long
@pytest.mark.usefixtures("one_device")
def test_so_many_updates_in_a_row_are_left_out_and_the_next_stops_the_run(tmp_path, capsys, poisoned, table):
    """Steps 3, 8, 9 are left out; 14, 15, 16 are one too many in a row, after a checkpoint at 15, too."""
    poisoned([3, 8, 9, 14, 15, 16])
    short = ["--config.train.skip_nonfinite=2", "--config.train.log_every=6"]
    for _ in range(2):
        code, captured = run_here(tmp_path, capsys, *short)
        assert code == command.EXIT_NON_FINITE and captured.err.count("\n") == 1
        assert "step 16: loss nan, grad_norm nan, after 2 skipped" in captured.err
        assert str(tmp_path / "run" / "checkpoints" / "15") in captured.err
        records = read_metrics(tmp_path / "run" / "metrics.jsonl")
        skipped = [r for r in records if r.get("skipped")]
        assert [r["step"] for r in skipped] == [3, 8, 9, 14, 15]
    assert all(r["grad_norm"] is None for r in skipped), "null in JSON"
    assert rundir.read_run(tmp_path / "run")["not_finite"] == 16
    assert "warning: step" not in captured.out, "the second run began after 15"
    rates = {r["step"]: r["learning_rate"] for r in records if r["split"] == "train"}
    step = (rates[3] - rates[1]) / 2  # it rises with the updates: before step 6 those were 4
    assert rates[6] == pytest.approx(rates[1] + 4 * step)

    # Three in a row allowed: the same directory goes on to the end.
    code, captured = run_here(tmp_path, capsys, *short, "--config.train.skip_nonfinite=3")
    assert code == 0, captured.err
    assert "step 16: loss nan, grad_norm nan; this update is skipped" in captured.out
    assert rundir.read_run(tmp_path / "run")["not_finite"] is None
    assert (tmp_path / "run" / "report.html").exists()
    table("the gradient not finite, train.skip_nonfinite=2", "one and two in a row: each update left out, warned of, recorded; a third in a row stops the run, exit 3", "the updates that were left out")  # fmt: skip


class Bomb:
    """Unpickling it makes a directory."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (self.made,)


def test_a_checkpoint_never_has_its_code_executed(tmp_path, table):
    made = tmp_path / "made"
    bomb = pickle.dumps(Bomb(str(made)))
    pickle.loads(bomb)
    made.rmdir()  # it works
    saved(tmp_path / "good", [1]).close()
    names = [
        "checkpoint",
        "checkpoint.pkl",
        "state.pickle",
        "__init__.py",
        "conftest.py",
        "state/treedef.pkl",
    ]
    files = [str(f.relative_to(tmp_path / "good" / "1")) for f in written(tmp_path / "good" / "1")]
    for number, name in enumerate(files + names):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", directory)
        (directory / "1" / integrity.MANIFEST).unlink()  # so that it is read all the same
        (directory / "1" / name).write_bytes(
            b"import os; os.mkdir(%r)" % str(made) if name.endswith(".py") else bomb
        )
        try:
            Checkpoints(directory, CheckpointSettings()).restore(state(0), iterator())
        except CheckpointError as error:
            assert "\n" not in str(error)
        assert not made.exists(), name
    table(f"a pickle that executes code, in place of each of {len(files)} files and beside them", "not executed; refused, or not read at all", "nothing")  # fmt: skip


@pytest.mark.parametrize(
    "name, content, harm, words",
    [
        ("config.json", b'{"model": {"d_', "truncated", "its config.json is not a run's"),
        ("config.json", b"", "empty", "its config.json is not a run's"),
        ("run.json", b"", "empty", "run.json is damaged"),
        ("vocabulary.model", b"", "empty", "vocabulary.model: truncated"),
        ("metrics.jsonl", b'{"step": 1, "split": ""}\n{"st\n{"step": 2}\n', "truncated in the middle", "metrics.jsonl, line 2"),
        ("metrics.jsonl", bytes(range(256)), "full of something else", "metrics.jsonl, line 1"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "full of brackets", "metrics.jsonl, line 1"),
        (".", b"", "", "accepted is a directory"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("one_device")
def test_other_files_of_a_run(tmp_path, capsys, table, name, content, harm, words):
    workdir = tmp_path / "run"
    if name != ".":
        workdir.mkdir()
    (workdir / name).write_bytes(content)
    assert command.main(["run", f"--workdir={workdir}", *TINY]) == command.EXIT_BAD_INPUT
    said = one_line(capsys.readouterr())
    assert words in said and (workdir / name).read_bytes() == content
    assert name == "." or set(os.listdir(workdir)) <= {name, LOCK_FILE}, "found before anything was done"
    table(
        f"{name} {harm}" if harm else "--workdir is a file", "refused at start and named, exit 2", "nothing"
    )


def claim(workdir, settings):
    lock = Lock(workdir)
    rundir.claim(workdir, settings, lock)
    lock.close()


@pytest.fixture
def read_only():
    """Makes a directory one that nobody can write to; permissions don't hold for root."""
    mounted = []

    def make(directory):
        for options in (["--bind", directory], ["-o", "remount,bind,ro"]):
            if subprocess.run(["mount", *options, directory], capture_output=True).returncode:
                pytest.skip("mounting is not allowed here")
            mounted.append(directory)

    yield make
    if mounted:
        subprocess.run(["umount", mounted[0]], check=True)


@pytest.mark.parametrize("part", ["", "checkpoints"])
@pytest.mark.usefixtures("one_device")
def test_a_directory_that_can_only_be_read(tmp_path, capsys, table, read_only, part):
    arguments = ["run", f"--workdir={tmp_path / 'run'}", *TINY]
    settings, _ = command_line.parse(arguments, command.DEFAULT_CONFIG, "")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    claim(tmp_path / "run", settings)
    read_only(tmp_path / "run" / part)
    before = contents(tmp_path)
    assert command.main([*arguments, "--config.mesh.data=1"]) == command.EXIT_IO
    said = one_line(capsys.readouterr())
    assert "can't be written: Read-only file system" in said and f"'{tmp_path / 'run' / part}'" in said
    assert contents(tmp_path) == before, "the settings of mesh would have changed"
    table(
        f"{part or '--workdir'} on a read-only file system", "refused at start and named, exit 4", "nothing"
    )


@pytest.mark.usefixtures("one_device")
def test_a_file_in_place_of_the_checkpoints(tmp_path, capsys, table):
    arguments = ["run", f"--workdir={tmp_path / 'run'}", *TINY]
    claim(tmp_path / "run", command_line.parse(arguments, command.DEFAULT_CONFIG, "")[0])
    (tmp_path / "run" / "checkpoints").write_text("mine")
    before = contents(tmp_path)
    assert command.main(arguments) == command.EXIT_IO
    assert "can't be written: Not a directory" in one_line(capsys.readouterr())
    assert contents(tmp_path) == before
    table("checkpoints is a file", "refused at start and named, exit 4", "nothing")
