"""Where a run starts: from another run's checkpoint, with a part frozen, on another objective; killed and gone on."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from test_run import DECODER_ONLY, TINY, finish, losses, start, wait_for_step

from experiments import run as command
from switchmoe.runs import start as begin
from switchmoe.runs.reporting import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")


def parameters(workdir, step):
    found = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / str(step) / "state")
    return flatten_dict(found["params"], sep="/"), found["opt_state"]


def run(workdir, *arguments):
    return command.main(["run", f"--workdir={workdir}", *TINY, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, environment):
    """A run of 10 steps, with the checkpoints of 5 and 10."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    finish(start(workdir, environment, "--config.train.num_steps=10"))
    return workdir


@pytest.mark.parametrize(
    "said, step", [("{}", 10), ("{}|5", 5), ("{}/checkpoints/5", 5), ("{}/checkpoints/10/", 10)]
)
def test_the_step_that_is_meant(trained, said, step):
    assert begin.locate(said.format(trained)) == begin.epath.Path(trained) / "checkpoints" / str(step)


@pytest.mark.parametrize(
    "said, message",
    [
        ("{}|7", "it has the steps 5, 10; accepted is a run's directory, DIR|STEP, or a step's"),
        ("{}|last", "accepted is a run's directory"),
        ("{}/nowhere", "no checkpoint is there; accepted is a run's directory"),
        ("s3://bucket/run", "accepted is a directory or gs://"),
    ],
)
def test_a_step_that_is_not_there(trained, said, message):
    with pytest.raises(ValueError) as error:
        begin.locate(said.format(trained))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.model.d_ff=32"], "wi has shape (2, 4, 16, 16) there, (2, 4, 16, 32) here ("),
        (["--config.moe.num_experts=1"], "decoder/blocks/block_0/ff/wi has shape none there"),
        (["--config.init.params=rooter"], "init.params=rooter: no parameter has such a name"),
        (["--config.init.params=("], "init.params=(: accepted is a regular expression"),
        (["--config.train.trainable=rooter"], "train.trainable=rooter: no parameter has such a name"),
        (["--config.data.vocab_size=500"], "embedding has shape (768, 16) there, (640, 16) here (1 "),
    ],
)
def test_what_can_not_be_taken_is_named_before_the_first_step(trained, tmp_path, capsys, arguments, message):
    code = run(tmp_path / "run", f"--config.init.checkpoint={trained}", *arguments)
    err = capsys.readouterr().err
    assert code == command.EXIT_BAD_INPUT and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_a_damaged_step_is_refused(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (victim, *_) = sorted((copy / "checkpoints" / "10" / "state").rglob("manifest.ocdbt"))
    victim.write_bytes(b"")
    assert run(tmp_path / "run", f"--config.init.checkpoint={copy}") == command.EXIT_BAD_INPUT
    assert "is damaged: state/" in capsys.readouterr().err


def test_what_is_named_is_taken_and_what_is_frozen_stays(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = [
        f"--config.init.checkpoint={trained}|10", "--config.init.params=encoder|embedding",
        "--config.train.trainable=router|experts", "--config.train.num_steps=5", "--config.optimizer.name=adamw",
        "--config.optimizer.learning_rate=0.01", "--config.optimizer.schedule=constant",
    ]  # fmt: skip
    assert run(workdir, *arguments) == 0
    out = capsys.readouterr().out
    there, _ = parameters(trained, 10)
    here, state = parameters(workdir, 5)
    taken = [name for name in here if "encoder" in name or "embedding" in name]
    trains = [name for name in here if "router" in name or "experts" in name]
    assert f"{len(taken)} of {len(here)} arrays" in out and "(train.trainable=router|experts)" in out
    for name in here:
        same = np.array_equal(here[name], there[name])
        assert same == (name in taken and name not in trains), name
    moments = {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert moments == {here[name].shape for name in trains}, "no state for what is frozen"
    known = json.loads((workdir / "run.json").read_text())
    assert known["init"] == {
        "checkpoint": f"{trained}|10", "step": 10, "params": "encoder|embedding"
    }  # fmt: skip
    assert known["parameters_trained"] == sum(here[name].size for name in trains)
    assert (workdir / "vocabulary.model").read_bytes() == (trained / "vocabulary.model").read_bytes()
    assert run(workdir, *arguments[1:]) == command.EXIT_BAD_INPUT
    assert run(workdir, *arguments[2:]) == command.EXIT_BAD_INPUT
    assert "init.checkpoint (" in capsys.readouterr().err


def test_a_start_from_a_checkpoint_begins_where_that_ended(trained, tmp_path):
    """The held-out loss after one step so small that it changes nothing is that of the checkpoint."""
    still = ["--config.optimizer.learning_rate=1e-12", "--config.train.num_steps=1"]
    assert run(tmp_path / "run", f"--config.init.checkpoint={trained}", *still) == 0
    (*_, was), (*_, found) = (read_metrics(path / "metrics.jsonl") for path in (trained, tmp_path / "run"))
    assert was["split"] == found["split"] == "validation"
    np.testing.assert_allclose(found["cross_entropy"], was["cross_entropy"], rtol=1e-6)


def test_a_dense_run_goes_on_with_experts_that_are_copies(tmp_path, capsys):
    """After one step too small to change anything the loss is the dense run's; a sparse run and others' shapes are refused."""
    roomy = ["--config.moe.eval_capacity_factor=8.0", "--config.moe.capacity_factor=8.0"]
    dense = tmp_path / "dense"
    assert run(dense, "--config.moe.num_experts=1", "--config.train.num_steps=5") == 0
    still = [
        "--config.optimizer.schedule=constant",
        "--config.optimizer.learning_rate=1e-12",
        "--config.train.num_steps=1",
    ]
    sparse = [
        *roomy,
        f"--config.init.checkpoint={dense}",
        "--config.init.upcycle=True",
        "--config.moe.unit_gates=True",
    ]
    assert run(tmp_path / "run", *sparse, "--config.init.optimizer=True", *still) == 0
    (*_, was), (*_, found) = (read_metrics(path / "metrics.jsonl") for path in (dense, tmp_path / "run"))
    np.testing.assert_allclose(found["cross_entropy"], was["cross_entropy"], rtol=1e-5)
    out = capsys.readouterr().out
    assert "each feed-forward copied to 4 experts" in out and "warning: init.optimizer" not in out
    _, opt_state = parameters(tmp_path / "run", 1)
    counts = [leaf for leaf in jax.tree.leaves(opt_state) if np.ndim(leaf) == 0]
    assert counts and all(leaf == 6 for leaf in counts)
    ended = ["--config.optimizer.schedule=warmup_cosine", "--config.optimizer.warmup_steps=1"]
    assert run(tmp_path / "ended", *sparse, "--config.init.optimizer=True", *ended, still[-1]) == 0
    out = capsys.readouterr().out
    assert (
        "5 updates are done there, and optimizer.schedule=warmup_cosine is 0 from train.num_steps=1 on" in out
    )
    for arguments, message in (
        (["--config.model.d_ff=24"], "accepted with init.upcycle is a dense model's run"),
        ([f"--config.init.checkpoint={tmp_path / 'run'}"], "it has 4 experts"),
        (["--config.moe.num_experts=1"], "init.upcycle=True: accepted is False with a dense model"),
    ):
        assert run(tmp_path / "other", *sparse, *arguments) == command.EXIT_BAD_INPUT
        assert message in capsys.readouterr().err


KINDS = {
    "warm": ["--config.init.checkpoint={}"],
    "frozen": ["--config.init.checkpoint={}", "--config.train.trainable=router|experts|norm"],
    "prefix_lm": ["--config.data.objective=prefix_lm"],
    "decoder_only": DECODER_ONLY,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_it_goes_on_to_the_bit_and_reports(trained, tmp_path, environment, kind):
    arguments = [argument.format(trained) for argument in KINDS[kind]]
    finish(start(tmp_path / "whole", environment, *arguments))
    process = start(tmp_path / "killed", environment, *arguments)
    wait_for_step(process, tmp_path / "killed", 12)
    process.kill()
    process.communicate()
    moved = trained.rename(trained.with_name("moved"))  # a run that goes on has its own
    try:
        out, _ = finish(start(tmp_path / "killed", environment, *arguments))
    finally:
        moved.rename(trained)
    assert "resuming from the checkpoint of step" in out
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    (one, _), (other, _) = (parameters(tmp_path / name, 24) for name in ("whole", "killed"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    page = (tmp_path / "killed" / "report.html").read_text()
    assert ("how the model goes on" in page) == (kind in ("prefix_lm", "decoder_only"))
