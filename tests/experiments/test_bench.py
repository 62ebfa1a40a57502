"""The benchmark's command on tiny shapes, what it refuses, and the bounds that hold whatever the machine."""

import json
import os
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_traces import source
from test_transformer import init

from experiments import exits, process
from experiments.bench import __main__ as bench
from switchmoe.analysis import timing
from switchmoe.analysis.routing import tracing
from switchmoe.model.moe import MoELayer
from switchmoe.runs import origin, trained
from switchmoe.settings import ModelSettings, MoESettings

LAYER = "layer --experts=2,4 --tokens=64 --d_model=16 --d_ff=32 --repeats=3 --hf=no".split()
STEP = (
    "step --experts=2 --d_model=16 --d_ff=32 --layers=2 --vocab=512 --batch=2 --lengths=32,16 --repeats=3 --hf=no"
).split()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The machine's own figures take seconds and are not what is tested."""
    monkeypatch.setattr(timing, "memory_bandwidth", lambda: 1e10)
    monkeypatch.setattr("switchmoe.planning.flops.matmul_peak", lambda dtype: 1e11)


def test_layer_measures_each_back_end_in_both_modes(tmp_path, capsys):
    assert bench.main([*LAYER, f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "layer.json").read_text())
    assert {(row["experts"], row["case"], row["mode"]) for row in found["rows"]} == {
        (experts, case, mode)
        for experts in (2, 4)
        for case in ("dense", "einsum", "gather", "ragged")
        for mode in ("forward", "forward + backward")
    }
    for row in found["rows"]:
        assert 0 < row["quartile_1_ms"] <= row["median_ms"] <= row["quartile_3_ms"]
        assert row["ratio"] == 1 or row["case"] != "dense"
    assert (
        found["command"] == " ".join(["python -m experiments.bench", *LAYER])
        and found["options"]["seed"] == 0
    )
    assert found["commit"] == origin.commit()
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("x dense") == len(found["rows"])


@pytest.mark.usefixtures("one_device")
def test_tracing_is_measured_against_evaluating_the_same_batches(tmp_path, monkeypatch, capsys):
    traced, write = [], tracing.write
    monkeypatch.setattr(trained, "find", lambda text: source(tmp_path))
    monkeypatch.setattr(trained, "parameters", lambda source, settings, mesh: init(settings)["params"])
    monkeypatch.setattr(tracing, "write", lambda *arguments: traced.append(write(*arguments)) or traced[-1])
    text, out = f"--text={tmp_path / 'text.txt'}", tmp_path / "out"
    given = ["trace", "--source=RUN", text, "--batches=2", "--repeats=3"]
    assert bench.main([*given, f"--out={out}"]) == 0, capsys.readouterr().err
    found = json.loads((out / "trace.json").read_text())
    assert [info.tokens for info in traced] == [found["tokens"]] * 4 and all(info.complete for info in traced)
    rows = {row["case"]: row for row in found["rows"]}
    assert rows["evaluation"]["ratio"] == 1 and len(rows["tracing"]["seconds"]) == 3
    ratios = np.divide(rows["tracing"]["seconds"], rows["evaluation"]["seconds"])
    assert rows["tracing"]["ratio"] == pytest.approx(np.median(ratios))
    assert found["command"] == " ".join(["python -m experiments.bench", *given])
    assert found["commit"] == origin.commit() and found["machine"]["cores"] > 0


@pytest.mark.slow
def test_generate_measures_both_types_and_batches(tmp_path):
    arguments = ["generate", "--tiny", "--experts=2,4", "--repeats=3", "--hf=no", f"--out={tmp_path}"]
    assert bench.main(arguments) == 0
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert {(row["experts"], row["batch"], row["case"]) for row in rows} == {
        (experts, batch, f"switchmoe {dtype}")
        for experts in (2, 4)
        for batch in (1, 16)
        for dtype in ("float32", "bfloat16")
    }
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 1e3 / row["ms_per_token"])
    exact, half = (row["bytes_per_step"] for row in rows[:2])
    # 2 layers: attention without the encoder's keys and values, a dense and a sparse layer, norms, the router; and the table
    kernels = 2 * 6 * 64 * 64 + 2 * 2 * 64 * 128 + 64 * 2
    assert exact == 2 * half == 4 * (kernels + 7 * 64 + 32 * 4 + 512 * 64)
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_step_measures_the_whole_and_its_parts(tmp_path):
    assert bench.main([*STEP, f"--out={tmp_path}"]) == 0
    rows = {row["case"]: row for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert rows["switchmoe"]["tokens_per_second"] == pytest.approx(96e3 / rows["switchmoe"]["median_ms"])
    parts = [row["median_ms"] for row in rows.values() if row["part"]]
    assert "encoder experts" in rows and sum(parts) == pytest.approx(rows["switchmoe"]["median_ms"])


@pytest.mark.parametrize(
    "argument",
    [
        "--experts=1",
        "--experts=8192",
        "--experts=two",
        "--dispatch=magic",
        "--factor=0",
        "--tokens=0",
        "--repeats=1",
        "--lengths=8",
        "--dtype=int8",
        "--colour=red",
        "speed",
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(argument, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main([argument, f"--out={tmp_path / 'out'}"])
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and argument.partition("=")[0].lstrip("-") in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["layer", "--tiny"], "argument --tiny: layer does not read it; accepted are --experts, --dispatch"),
        (["step", "--tokens=64"], "argument --tokens: step does not read it"),
        (["generate", "--dtype=bfloat16"], "argument --dtype: generate does not read it"),
    ],
)
def test_what_a_part_does_not_read_is_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main([*arguments, f"--out={tmp_path / 'out'}"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_out_that_can_not_be_made_is_told_before_anything_is_measured(capsys):
    assert bench.main([*LAYER, "--out=/proc/nope"]) == exits.EXIT_IO
    out, err = capsys.readouterr()
    assert not out and err.startswith("experiments.bench: ") and err.count("\n") == 1


def test_out_that_is_a_file_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        bench.main([*LAYER, f"--out={tmp_path / 'file'}"])
    assert stopped.value.code == 2 and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["__main__", "accelerator", "offload", "serving", "tracing"])
def test_every_file_of_figures_says_which_code_made_it(name):
    """What a file of figures is made of begins with the command and the commit."""
    assert "tools.origin(" in (Path(bench.__file__).parent / f"{name}.py").read_text()


def test_rounds_interleave_and_ratios_are_taken_within_them():
    order = []
    cases = {name: timing.Case(lambda name=name: order.append(name)) for name in "ab"}
    seconds = timing.measure(cases, repeats=4, warm_up=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab" + "ba" and len(seconds["a"]) == 4
    figures = timing.summary(np.array([2.0, 4.0, 12.0]), np.array([1.0, 4.0, 4.0]))
    assert figures["median_ms"] == 4000 and figures["ratio"] == 2


def _temporaries(dispatch: str, experts: int, dropless: bool = False) -> int:
    """Bytes beside arguments, gradients and outputs."""
    x_GSD = jnp.ones((1, 512, 32))
    moe = MoESettings(num_experts=experts, dispatch=dispatch, dropless=dropless, jitter=0.0)
    layer = MoELayer(ModelSettings(d_model=32, d_ff=64, num_heads=1, activation="relu"), moe, train=True)
    params = nn.unbox(layer.init(jax.random.key(0), x_GSD))

    def value(params, x_GSD):
        y_GSD, aux = layer.apply(params, x_GSD)
        return (y_GSD**2).sum() + aux["loss"]

    program = jax.jit(jax.grad(value)).lower(params, x_GSD).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_memory_of_einsum_does_not_grow_with_the_experts():
    """The masks are factor * S**2 numbers; what grows is the router's [S, E], small beside them."""
    assert _temporaries("einsum", 32) < 1.2 * _temporaries("einsum", 4)


def test_memory_of_ragged_does_not_grow_beyond_the_weights():
    kernels = 2 * 32 * 64 * 4  # bytes of one expert
    rows = 512 * (32 + 64) * 4
    grown = _temporaries("ragged", 64, dropless=True) - _temporaries("ragged", 8, dropless=True)
    assert grown < 56 * kernels + 8 * 512 * 64 * 4 + rows, grown


def test_freed_memory_is_kept_where_glibc_is(monkeypatch):
    process.keep_memory()
    asked = []
    monkeypatch.setattr(
        process.ctypes, "CDLL", lambda _: type("libc", (), {"mallopt": lambda *a: asked.append(a)})
    )
    process.keep_memory()
    assert asked == [(-4, 0), (-1, 2**31 - 1), (-8, 1)]
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: object())  # macOS, musl
    process.keep_memory()


def test_a_run_starts_anew_for_huge_pages_once_and_only_where_there_are_any(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(process, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(process.os, "execv", lambda path, argv: started.append((path, argv)))
    monkeypatch.setattr(process.sys, "orig_argv", ["python", "-m", "experiments.run", "--workdir=x y"])
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is as it was when the test is over
    monkeypatch.delenv("GLIBC_TUNABLES")
    process.use_huge_pages()  # no such file: another system
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    process.use_huge_pages()
    assert not started
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    process.use_huge_pages()
    assert started == [(sys.executable, [sys.executable, "-m", "experiments.run", "--workdir=x y"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    process.use_huge_pages()  # in the process that was started
    assert len(started) == 1
