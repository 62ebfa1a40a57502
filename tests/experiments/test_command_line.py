"""The command line: what users of ml_collections expect, and one line for each mistake."""

import subprocess
import sys

import pytest

from experiments import command_line, exits
from switchmoe.settings import to_dict


def parse(*arguments):
    return command_line.parse(["run", *arguments], "configs/quickstart.py", "A doc.")


def test_no_arguments_run_the_quickstart():
    settings, workdir = parse()
    assert workdir == "runs/quickstart"
    assert settings.sparse and settings.data.source == "wiki_vital_en"


def test_overrides_arguments_of_configs_and_workdir():
    settings, workdir = parse(
        "--config=configs/switch_base.py:relu", "--workdir=/tmp/x", "--config.moe.num_experts=16",
        "--config.moe.capacity_factor=2", "--config.optimizer.learning_rate", "0.5", "--noconfig.model.remat",
    )  # fmt: skip
    assert workdir == "/tmp/x"
    assert (settings.model.activation, settings.moe.num_experts) == ("relu", 16)
    assert (settings.moe.capacity_factor, settings.optimizer.learning_rate) == (2.0, 0.5)
    assert parse("--config", "configs/t5_base.py")[1] == "runs/t5_base"


def test_parsing_twice_starts_afresh():
    changed = parse("--config.train.seed=7")[0]
    assert to_dict(changed)["train"]["seed"] == 7
    assert parse()[0].train.seed == 0


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.moe.num_expert=4", "--config.moe.num_expert: config.moe has no field num_expert (did you mean num_experts?)"),
        ("--config.mow.num_experts=4", "no group mow (did you mean moe?)"),
        ("--config.moe.num_experts=four", "--config.moe.num_experts=four: accepted is a value of type int"),
        ("--config.train.seed=0.1", "--config.train.seed=0.1: accepted is a value of type int"),
        ("--config.model.remat=perhaps", "--config.model.remat=perhaps: accepted is a value of type bool"),
        ("--config.model={'d_model': 4}", "a whole group can't be overwritten; accepted is --config.model.FIELD=VALUE"),
        ("--config.model", "a whole group can't be overwritten"),
        ("--config=configs/nothing.py", "--config=configs/nothing.py: no such file; accepted is a file, or configs/NAME.py"),
        ("--config=configs/switch_base.py:swish", "argument swish: accepted is geglu, or relu"),
        ("--workdir=gs://bucket/x", "--workdir=gs://bucket/x: accepted is a directory of a mounted file system"),
        ("--config.model.num_experts=4", "config.model has no field num_experts (did you mean config.moe.num_experts?); accepted is one of"),
        ("--config.moe.num_xperts=4", "(did you mean num_experts?)"),
        ("--config.moe.xyz=4", "has no field xyz; accepted is one of its"),
        ("--wrkdir=x", "argument --wrkdir=x (did you mean --workdir=?): accepted are --config=, --workdir= and"),
        ("--steps=5", "argument --steps=5 (did you mean --config.train.num_steps=?): accepted are"),
        ("--qqq", "argument --qqq: accepted are --config=, --workdir= and --config.GROUP.FIELD= (see --help)"),
        ("--noconfig.modl.remat", "no group modl (did you mean model?)"),
        ("--noconfig.model.remt", "config.model has no field remt (did you mean remat?)"),
        ("--flagfile=/nonexistent", "argument --flagfile=/nonexistent: accepted are --config="),
        ("--config=", "--config=: accepted is a file"),
        ("--config configs/nothing.py", "--config=configs/nothing.py: no such file"),
        ("--config.moe 3", "--config.moe=3: a whole group can't be overwritten"),
        ("--config.moe.num_experts four", "--config.moe.num_experts=four: accepted is a value of type int"),
        ("--config.train.seed=4294967296", "train.seed=4294967296: accepted is an integer < 2**32"),
        ("--config.optimizer.warmup_steps=3000000000", "optimizer.warmup_steps=3000000000: accepted is an integer < 2**31"),
        ("quickstart", "argument quickstart: accepted are --config=, --workdir= and --config.GROUP.FIELD="),
        ("--config.moe.capacity_factor=0", "moe.capacity_factor=0.0: accepted is a number > 0"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(argument, message):
    with pytest.raises(ValueError) as error:
        parse(*argument.split(" ") if "{" not in argument else [argument])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_file_that_fails_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    for text in ("def get_config(:\n", "x = 1\n", "def get_config():\n    return 1 / 0\n"):
        broken.write_text(text)
        # ml_collections loads every config as one module name, over what an earlier test left there.
        monkeypatch.delitem(sys.modules, "config_config", raising=False)
        with pytest.raises(ValueError, match="--config") as error:
            parse(f"--config={broken}")
        assert "\n" not in str(error.value)


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help")
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "--config.moe.num_experts=8" in out and "--config.data.vocab_size=32000" in out


def test_help_says_what_each_field_means(capsys):
    assert [name for name, meaning in command_line.meanings().items() if not meaning] == []
    assert command_line.meanings().keys() == {
        f"{g}.{f}" for g, fields in command_line.GROUPS.items() for f in fields
    }
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    assert "--config.moe.every=2\n        the last of each `every` blocks is sparse\n" in out
    assert "identity: every" in out and max(map(len, out.split("library defaults")[1].splitlines())) <= 120


def experiments(*line, environment, **more):
    return subprocess.run(
        [sys.executable, "-m", *line], env=environment, capture_output=True, text=True, timeout=120, **more
    )


def test_the_commands_are_listed(environment):
    done = experiments("experiments", environment=environment)
    assert done.returncode == 0
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()[2:]]
    assert {"run", "sweep", "paper", "plan", "bench", "analyze"} <= {name for name, _ in lines}
    assert ["run", "Trains a model"] in lines and all(len(what) > 8 for _, what in lines)
    wrong = experiments("experiments", "rnu", environment=environment)
    assert wrong.returncode == exits.EXIT_BAD_INPUT and wrong.stderr.count("\n") == 1
    assert (
        "rnu: no such command; accepted are python -m experiments.NAME with NAME of analyze, bench"
        in wrong.stderr
    )


@pytest.mark.parametrize(
    "command", ["run --help", "sweep --help", "paper --list", "paper --help", "plan --help", "analyze --help"]
)
def test_output_may_be_cut_short(command, environment):
    """As by ``| head -1``: no traceback."""
    name, option = command.split()
    line = f"{sys.executable} -m experiments.{name} {option}; echo $? >&2"
    done = subprocess.run(
        ["sh", "-c", f"({line}) | head -1"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr.split() in (["0"], ["141"]), done.stderr


def test_packaged_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--config=configs/t5_base.py")[0].moe.num_experts == 1


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (ValueError("--a=b: accepted is c"), exits.EXIT_BAD_INPUT, "--a=b: accepted is c"),
        (OSError(28, "No space left", "f"), exits.EXIT_IO, "[Errno 28] No space left: 'f'"),
        (KeyboardInterrupt(), exits.EXIT_INTERRUPTED, "interrupted"),
    ],
)
def test_a_command_that_ends_early_says_one_line(capsys, raised, code, said):
    def action():
        raise raised

    assert exits.guarded("experiments.one", action) == code
    assert capsys.readouterr().err == f"experiments.one: {said}\n"
