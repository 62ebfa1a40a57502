"""Experts on disk for a user: `experiments.generate --expert_memory`, `experiments.convert --experts_on_disk`, the benchmark's short form."""

import errno
import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import convert, generate
from experiments.bench import offload, offload_model
from experiments.expert_memory import checked
from experiments.offload.simulate import _budget
from switchmoe.inference.offload import model as offloaded
from switchmoe.inference.offload import widths
from switchmoe.inference.offload.model import Paging
from switchmoe.inference.offload.store import Store, Writer
from switchmoe.interop import expert_store, slim
from switchmoe.runs import slimming, trained

pytestmark = pytest.mark.usefixtures("one_device")
PROMPTS = ["--ids", "--prompt=0 5 9", "--prompt=0 7", "--max_tokens=5", "--temperature=1"]


def synthetic(out, *arguments):
    options = offload.parse(
        ["offload", f"--out={out}", "--tiny", "--stacks=decoder_only", "--layers=2", *arguments]
    )
    run = out / "run"
    offload_model._write(run, offload_model.synthetic(options), 0.5)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("offload"))


@pytest.fixture(scope="module")
def resident(run):
    return answers(generate.main, run)


def answers(main, run, *arguments):
    """What the command prints, by a file."""
    out = run.parent / "answers.jsonl"
    assert main(["generate", f"--source={run}", *PROMPTS, f"--out={out}", *arguments]) == 0
    return out.read_text()


def test_generate_within_a_budget_answers_the_same_and_writes_the_store_once(run, resident, capsys):
    for arguments in (["--predictor=router"], ["--expert_policy=least_stale", "--expert_reads=mmap"]):
        capsys.readouterr()
        assert answers(generate.main, run, "--expert_memory=600KiB", *arguments) == resident
        *_, line = capsys.readouterr().err.splitlines()  # after signs of life, on a busy machine
        assert line.startswith("experts: ") and " MB read" in line
        files = sorted((run / "experts" / "1").iterdir())
        assert [file.name for file in files] == ["decoder.0.experts", "decoder.1.experts", "index.json"]
        times = {file: file.stat().st_mtime_ns for file in files}
    assert times == {file: file.stat().st_mtime_ns for file in files}


def test_what_is_refused_gets_one_line(run, resident, tmp_path, capsys):
    given = [f"--source={run}", *PROMPTS]
    for arguments, message in (
        (["--expert_memory="], "argument --expert_memory=:"),
        (["--expert_memory=much"], "--expert_memory=much: accepted is a size such as 512MiB"),
        (["--predictor=router"], "--predictor=router: accepted with --expert_memory=SIZE"),
        (
            ["--expert_memory=1MB", "--expert_policy=fifo"],
            "--expert_policy=fifo: accepted is one of lru, lfu",
        ),
        (
            ["--expert_memory=1MB", "--predictor=gone.npz"],
            "--predictor=gone.npz: accepted is none, router, or a file",
        ),
        (
            ["--expert_memory=60KiB"],
            "decoder/0 may need 20 experts at once; accepted is 491520 bytes or more",
        ),
    ):
        capsys.readouterr()
        assert generate.main(["generate", *given, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    for text, size in (("1.5GiB", 3 << 29), ("1tib", 1 << 40), ("7 kb", 7000)):
        assert checked({"expert_memory": text})[0] == size == _budget(text)[0]
    assert checked({"expert_memory": "12"})[0] == 12 and checked({})[0] == 0
    for text in ("9" * 400, "1XB", "0", "-1GB", "\u0661GB"):
        with pytest.raises(ValueError, match="^--expert_memory=.*: accepted is a size such as 512MiB"):
            checked({"expert_memory": text})


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_on_disk_alone_are_a_run_for_generate_and_for_nobody_else(run, bits, tmp_path, capsys):
    """Which answers as the model of integers that experiments.slim makes of the same floats."""
    target, model, how = tmp_path / "integers", trained.find(str(run)), slimming.Slimming(bits=bits)
    given = ["convert", f"--source={run}", f"--target={target}", f"--experts_on_disk=int{bits}"]
    assert convert.main(given) == 0
    assert "40 experts of 2 layers" in capsys.readouterr().out
    assert json.loads((target / "config.json").read_text())["moe"]["expert_bits"] == bits
    assert not list((target / "checkpoints" / "1" / "state").glob("*experts*"))
    slim.make(model, tmp_path / "slim", how, slim.asked(model, how, {}), dict)
    assert answers(generate.main, target, "--expert_memory=1MB") == answers(generate.main, tmp_path / "slim")
    capsys.readouterr()
    assert generate.main(["generate", f"--source={target}", *PROMPTS]) == 2
    assert "its experts are on disk alone; accepted are experiments.generate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_widths_gives_each_expert_its_own(run, tmp_path, capsys):
    target, bits = tmp_path / "mixed", [(8, 4, 2)[e % 3] for e in range(20)]
    widths.save(tmp_path / "widths.json", {"decoder/0": bits, "decoder/1": bits[::-1]})
    command = ["convert", f"--source={run}", f"--target={target}", f"--widths={tmp_path / 'widths.json'}"]
    assert convert.main([*command, "--experts_on_disk"]) == 0, capsys.readouterr().err
    layers = Store(target / "experts" / "1").layers
    assert [layer.forms for layer in layers] == [tuple(f"int{n}" for n in of) for of in (bits, bits[::-1])]
    sizes = [layer.record(e).size for layer in layers for e in range(20)]
    least = max(sum(sizes[:20]), sum(sizes[20:]))
    assert least < sum(sizes)  # so experts leave, of one width for another
    found = [answers(generate.main, target, f"--expert_memory={size}") for size in (least, sum(sizes))]
    assert found[0] == found[1] and len(found[0].splitlines()) == 2


def test_a_disk_that_is_full_slow_or_gone_is_one_line_and_exit_4(run, tmp_path, monkeypatch, capsys):
    copy, on = tmp_path / "copy", threading.Event()
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("experts"))

    def fails(code):
        def raises(*_):
            raise OSError(code, os.strerror(code))

        return raises

    def slow(*_):
        on.wait(60)
        raise OSError("too late")

    def said():
        capsys.readouterr()
        assert generate.main(["generate", f"--source={copy}", *PROMPTS, "--expert_memory=600KiB"]) == 4
        lines = capsys.readouterr().err.splitlines()
        assert sum("experiments.generate" in line for line in lines) == 1 and "Traceback" not in "".join(
            lines
        )
        return lines[-1]

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", fails(errno.ENOSPC))
        assert re.search(r"No space left on device; the experts take [\d,]+ bytes", said())
    assert not list(copy.rglob("*.experts"))  # nothing new is left behind
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", fails(errno.EIO))
        assert re.search(r"expert \d+ of decoder/0 in .* can't be read: Input/output error", said())
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", slow)
        patched.setattr(offloaded, "Paging", functools.partial(Paging, patience=0.2))
        assert re.search(r"expert \d+ of decoder/0 in .* was not read within 0.2 s: the disk is slow", said())
        on.set()


def test_damage_is_exit_4_with_the_experts_name(run, resident, tmp_path, capsys):
    target = tmp_path / "copy"
    assert convert.main(["convert", f"--source={run}", f"--target={target}", "--experts_on_disk=own"]) == 0
    assert answers(generate.main, target, "--expert_memory=600KiB") == resident
    file = target / "experts" / "1" / "decoder.1.experts"
    raw = bytearray(file.read_bytes())
    for place in range(4096 + 5, len(raw), 4096):
        raw[place] ^= 4
    file.write_bytes(raw)
    given = ["generate", f"--source={target}", *PROMPTS, "--expert_memory=600KiB"]
    capsys.readouterr()
    assert generate.main(given) == 4
    assert "of decoder/1 in" in (error := capsys.readouterr().err) and "is damaged" in error
    file.unlink()
    assert generate.main(given) == 4
    assert f"{file}: No such file or directory" in capsys.readouterr().err


def test_a_damaged_file_of_the_other_weights_is_refused_each_time(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    model = trained.find(str(copy))
    files = sorted((copy / "checkpoints" / "1" / "state").glob("params.*/[0-9]*"))
    other, own = (
        next(f for f in files if ("experts" in f.parent.name) == is_own) for is_own in (False, True)
    )
    own.write_bytes(bytes(own.stat().st_size))  # not read: an expert's bytes are in the store
    trained.without_experts(model, model.settings)
    other.write_bytes(bytes(other.stat().st_size))
    with pytest.raises(
        ValueError, match=f"it is damaged: .*{other.parent.name}/{other.name} has other content"
    ):
        trained.without_experts(model, model.settings)


def test_nobody_is_told_to_remove_the_only_copy_of_the_experts(run, tmp_path):
    target = tmp_path / "copy"
    assert convert.main(["convert", f"--source={run}", f"--target={target}", "--experts_on_disk=own"]) == 0
    file, model = target / "experts" / "1" / "index.json", trained.find(str(target))
    index = json.loads(file.read_text())
    for changed, accepted in (
        ({}, "that directory removed"),
        ({"alone": True}, "the checkpoint that came with it"),
    ):
        file.write_text(json.dumps(index | {"of": {"step": "1", "files": "another"} | changed}))
        with pytest.raises(ValueError, match=f"it is of another checkpoint; accepted is {accepted}"):
            expert_store.opened(model, model.settings, Paging(1 << 20), "direct", lambda state: None)


def test_readers_of_the_checkpoint_do_without_an_index_that_is_damaged(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    index = copy / "experts" / "1" / "index.json"
    index.parent.mkdir(parents=True, exist_ok=True)
    model = trained.find(str(copy))
    for text in ("{}", '{"of": "1"}', "[", '{"of": {"step": "1"}}'):
        index.write_text(text)
        assert trained.on_one_device(model, model.settings)


def test_a_store_that_was_killed_is_taken_up_again(tmp_path, environment):
    run = synthetic(tmp_path, "--experts=48", "--d_model=256", "--d_ff=512")
    target = tmp_path / "target"
    command = [
        sys.executable,
        "-m",
        "experiments.convert",
        f"--source={run}",
        f"--target={target}",
        "--experts_on_disk=own",
    ]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    written = tmp_path / ".target.converting" / "experts" / "1" / "written.json"
    for _ in range(3000):
        if written.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert written.exists() and not target.exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    assert convert.main(["convert", f"--source={run}", f"--target={whole}", "--experts_on_disk=own"]) == 0
    for name in ("index.json", "decoder.1.experts"):
        assert (target / "experts" / "1" / name).read_bytes() == (whole / "experts" / "1" / name).read_bytes()
    assert not (target / "experts" / "1" / "written.json").exists()


def test_a_store_that_lost_a_file_between_two_tries_is_written_anew(run, tmp_path, monkeypatch):
    """What the first try noted as done is not taken for what a new file has; and it was on the disk before it was noted."""
    target, work = tmp_path / "target", tmp_path / ".target.converting" / "experts" / "1"
    command = ["convert", f"--source={run}", "--experts_on_disk=own"]
    write, synced = Writer.write, []

    def breaks(writer, *given):
        if (work / "written.json").exists():
            raise OSError("the disk is gone")
        write(writer, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "write", breaks)
        patched.setattr(os, "fsync", synced.append)
        assert convert.main([*command, f"--target={target}"]) == 4
    assert synced and (work / "written.json").exists()
    (work / "decoder.1.experts").unlink()
    assert convert.main([*command, f"--target={target}"]) == 0
    whole = tmp_path / "whole"
    assert convert.main([*command, f"--target={whole}"]) == 0
    for name in ("index.json", "decoder.0.experts", "decoder.1.experts"):
        assert (target / "experts" / "1" / name).read_bytes() == (whole / "experts" / "1" / name).read_bytes()


@pytest.mark.slow
def test_the_benchmarks_short_form(tmp_path, capsys, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cases = ["resident float32", "float32, table, direct, lfru", "plain mmap"]
    cases += ["accelerate"] * bool(importlib.util.find_spec("accelerate"))  # takes the decoder as a Qwen3-MoE
    given = ["offload", f"--out={tmp_path}", "--tiny", "--stacks=decoder_only", f"--cases={';'.join(cases)}"]
    given += ["--layers=2", "--expert_memory=1MB"]
    assert offload.main(given) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "offload.json").read_text())
    assert [row["case"] for row in found["rows"]] == cases
    if "accelerate" in cases:
        assert found["rows"].pop()["tokens_per_second"] > 0
    for row in found["rows"]:
        assert row["tokens_per_second"] > 0 and row["same_answers"], row
    paged = found["rows"][1]
    assert 0 < paged["hits"] <= 1 and 0 <= paged["right"] <= 1 and found["machine"]["processor"]
    told = capsys.readouterr().out
    assert "answers the same" in told and f"{paged['right']:.1%} of what was foreseen asked for" in told
    assert shlex.split(found["command"]) == [
        "python",
        "-m",
        "experiments.bench",
        given[0],
        *given[2:],
    ]  # but --out


def test_the_benchmark_measures_the_step_that_was_given_and_writes_beside_no_run(run, tmp_path):
    (source := tmp_path / "run").mkdir()
    shutil.copy(run / "config.json", source)
    for step in ("1", "2"):
        shutil.copytree(run / "checkpoints" / "1", source / "checkpoints" / step)
    options = offload.parse(["offload", f"--out={tmp_path / 'out'}", f"--source={source}|1", "--tiny"])
    options.out.mkdir()
    step = offload_model.made(options)
    assert step == source / "checkpoints" / "1" and (source / "experts" / "1" / "index.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert {"run-int4", "run-mixed"} <= {path.name for path in options.out.iterdir()}


def test_a_new_case_does_not_have_the_peak_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(tmp_path), "rmdir", shutil.rmtree
    )  # as a cgroup's directory goes, with its files
    group = offload.Group(tmp_path / "group", "v2", 99)
    group._made()
    (group.path / "memory.peak").write_text("7")
    assert group.peak() == 7
    group.begin()
    assert group.peak() == 0 and (group.path / "memory.max").read_text() == "99"


def test_the_benchmark_refuses_an_unknown_case(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        offload.parse(["offload", f"--out={tmp_path}", "--cases=fast"])
    assert error.value.code == 2 and "--cases=fast: accepted" in capsys.readouterr().err
    old = offload.parse(["offload", f"--out={tmp_path}", "--cases=int4, none, direct;plain mmap"])
    assert old.cases == ["int4, none, direct, lru", "plain mmap"]


def test_the_pages_cases_are_the_benchmarks():
    text = (Path(__file__).parents[2] / "docs" / "offload.md").read_text()
    table = text[text.index("| case |") :].partition("\n\n")[0].splitlines()[2:]
    names = [re.match(r"\| ([^|]+?) \|", line)[1] for line in table]
    assert names and set(names) <= set(offload.CASES)
