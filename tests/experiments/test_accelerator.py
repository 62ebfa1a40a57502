"""`experiments.bench accelerator`: the tiny run, what is said of parts that fail or are not reached, and no more packages
than a GPU host has."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import accelerator, accelerator_decoding, accelerator_parts
from switchmoe.dispatch import dispatchers, grouped


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, user_environment):
    out = tmp_path_factory.mktemp("accelerator")
    command = [
        sys.executable,
        "-m",
        "experiments.bench",
        "accelerator",
        "--tiny",
        f"--out={out}",
        "--budget=1200",
    ]
    done = subprocess.run(command, env=user_environment, capture_output=True, text=True, timeout=1300)
    assert done.returncode == 0, done.stderr
    return out / "cpu", json.loads((out / "cpu" / "results.json").read_text()), done.stdout


@pytest.mark.slow
def test_every_part_is_measured_and_written(tiny):
    directory, found, out = tiny
    assert list(found["parts"]) == list(accelerator.NAMES)
    assert found["machine"]["versions"]["jax"] == jax.__version__ and found["sizes"]["d_model"] == 64
    layer = {row["case"]: row for row in found["parts"]["layer"]}
    assert layer.keys() == {"dense", "gather", "einsum", "ragged"}
    assert all(row["median_ms"] > 0 and row["ratio"] > 0 and row["peak_share"] > 0 for row in layer.values())
    checked = found["parts"]["gradients"]
    assert len(checked) == 6 and all(row["right"] for row in checked)
    assert all(row["relative_error"] < 1e-5 for row in checked if row["dtype"] == "float32")
    (step,) = found["parts"]["step"]
    assert step["tokens_per_second"] == pytest.approx(4 * 48e3 / step["median_ms"])
    forms = {(row["attention"], row["case"]) for row in found["parts"]["attention"]}
    assert {case for _, case in forms} == {"plain", "head by head"} and len(forms) == 6
    assert all(row["median_ms"] > 0 for row in found["parts"]["attention"])
    (decoded,) = found["parts"]["generate"]
    assert decoded["tokens_per_second"] == pytest.approx(4e3 / decoded["median_ms"])
    (run,) = found["parts"]["runs"]
    assert run["steps"] == 2 and 6 < run["cross_entropy"] < 8
    assert (directory / "layer.png").read_bytes().startswith(b"\x89PNG")
    text = (directory / "table.md").read_text()
    assert all(f"## {name}" in text for name in accelerator.NAMES) and "runs: experts 2" in out
    assert not list(directory.glob("*.tmp"))


def test_a_wrong_gradient_is_found(monkeypatch):
    """What tokamax#887 gave: an expert without rows gets another one's gradient."""
    real = grouped.blocked_matmul

    @jax.custom_vjp
    def wrong(x_ND, kernel_EDF, sizes_E):
        return real(x_ND, kernel_EDF, sizes_E)

    def forward(x_ND, kernel_EDF, sizes_E):
        y_NF, back = jax.vjp(lambda x, k: real(x, k, sizes_E), x_ND, kernel_EDF)
        return y_NF, (back, sizes_E)

    def backward(saved, d_NF):
        (x, kernel), sizes_E = saved[0](d_NF), saved[1]
        return x, jnp.where(sizes_E[:, None, None] == 0, kernel.sum(0), kernel), None

    wrong.defvjp(forward, backward)
    monkeypatch.setattr(dispatchers, "grouped_matmul", wrong)
    monkeypatch.setattr(accelerator_parts, "back_ends", lambda: {"ragged": ("ragged", "none")})
    sizes = accelerator_parts.TINY
    found = list(accelerator_parts.gradients(sizes, float("inf")))
    assert [row["right"] for row in found] == [False, False]
    assert not any(row["idle_are_zero"] for row in found)


def test_a_part_that_fails_or_takes_too_long_says_so_and_the_others_are_measured(
    tmp_path, monkeypatch, capsys
):
    said = {
        "layer": 'print(\'{"case": "dense", "median_ms": 2.0, "experts": 1}\'); import time; time.sleep(60)',
        "gradients": "raise SystemExit('no memory')",
        "step": 'print(\'noise\'); print(\'{"case": "switchmoe", "error": "RuntimeError: x"}\')',
        "attention": "import os; os.abort()",
        "transformers": 'print(\'{"case": "cut short\'',
    }
    spawn = subprocess.Popen

    def child(command, **options):
        parts = [argument.removeprefix("--only=") for argument in command if argument.startswith("--only=")]
        # git is asked for the commit in the same way
        return spawn([sys.executable, "-c", said.get(parts[0], "")] if parts else command, **options)

    monkeypatch.setattr(accelerator.subprocess, "Popen", child)
    monkeypatch.setattr(accelerator_parts, "PARTS", {name: (None, 0.2) for name in accelerator.NAMES})
    assert bench.main(["accelerator", f"--out={tmp_path}", "--budget=30"]) == 0
    found = json.loads((tmp_path / "unknown" / "results.json").read_text())
    assert (
        found["notes"]["layer"].startswith("ended after its 6 s")
        and found["parts"]["layer"][0]["median_ms"] == 2
    )
    assert found["notes"]["gradients"] == "failed: no memory"
    assert found["notes"]["attention"].startswith("failed by SIGABRT: ")
    assert found["parts"]["step"] == [{"case": "switchmoe", "error": "RuntimeError: x"}]
    assert found["parts"]["transformers"] == []
    text = (tmp_path / "unknown" / "table.md").read_text()
    assert "RuntimeError: x" in text and "failed: no memory" in text
    assert "unknown: results.json, table.md, layer.png (" in capsys.readouterr().out


def test_no_picture_is_told_of_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "_part", lambda *_: None)
    assert bench.main(["accelerator", f"--out={tmp_path}", "--only=step"]) == 0
    assert "unknown: results.json, table.md (" in capsys.readouterr().out


def test_the_machine_is_told_of_after_runs_and_before_all_else(monkeypatch, capsys):
    """`runs` starts processes of its own, which need the device that telling takes."""
    for name, order in (("runs", ["case", "machine"]), ("step", ["machine", "case"])):
        part = {name: (lambda sizes, until: iter([{"case": "run"}]), 1)}
        monkeypatch.setattr(accelerator, "_parts", lambda part=part: part)
        assert bench.main(["accelerator", "--child", f"--only={name}", "--tiny"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [next(iter(row)) for row in rows] == order


def test_a_step_of_decoding_is_without_the_prompt(monkeypatch):
    """Of 4 tokens in 50 ms, 20 of them for the prompt and the first, each other one takes 10."""
    took = {4: 50.0, 1: 20.0}

    class Generator:
        def __init__(self, tokens=0):
            self.tokens = tokens

        def with_tokens(self, tokens):
            return Generator(tokens)

        def __call__(self, prompts):
            return self.tokens

    def measured(row, make, repeats):
        return row | {"median_ms": took[make().run()]}

    monkeypatch.setattr(accelerator_decoding, "measured", measured)
    monkeypatch.setattr(accelerator_decoding.timing, "memory_bandwidth", lambda _: 1e9)
    for name, value in dict(generator_of=Generator(), random_parameters=None, bytes_read=2e6).items():
        monkeypatch.setattr(accelerator_decoding.bench_generate, name, lambda *_, value=value: value)
    (row,) = accelerator_decoding.generate(accelerator_parts.TINY, float("inf"))
    assert row["prompt_ms"] == 20 and row["ms_per_step"] == 10 and row["ms_per_token"] == 12.5
    assert row["bandwidth_share"] == pytest.approx(2e6 / 0.010 / 1e9)


@pytest.mark.parametrize("argument", ["--budget=5", "--budget=x", "--only=all", "--layers=3"])
def test_bad_input_gets_one_line(argument, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["accelerator", argument, f"--out={tmp_path / 'out'}"])
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and argument.partition("=")[0] in error
