"""The command `experiments.plan`: what it prints of a plan, a table, the smallest and a picture, and bad input in one line."""

import pytest
from test_planning import PAPER

from configs import switch_base
from experiments import exits
from experiments.plan import __main__ as command
from experiments.plan import layouts
from switchmoe.parallel import sharding
from switchmoe.planning import planner
from switchmoe.settings import from_config

BASE = "--config=configs/switch_base.py"


@pytest.mark.long
def test_switch_base_over_32_devices_compiles_as_planned(capsys):
    """The paper's 128 experts, whole: 2 all-to-alls forward and 2 backward in each of 12 sparse layers."""
    arguments = [BASE, "--devices=32", "--layout=data_expert", "--hbm=1TiB", "--compile"]
    assert command.main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "all-to-all     experts' rows        48" in printed
    assert "all-to-all              8 calls" in printed and "all-gather" not in printed


def run(capsys, *arguments):
    code = command.main(["plan", *arguments])
    return code, capsys.readouterr()


def test_a_plan_says_by_how_much_it_does_not_fit(capsys):
    few = ["--config.data.batch_size=256", "--config.model.num_layers=2", "--layout=data_expert"]
    code, output = run(capsys, BASE, "--hbm=1TiB", "--devices=8", *few)
    assert code == 0 and "fits 1 TiB" in output.out and "assumed: tpu_v4: 275 TFLOP/s" in output.out
    code, output = run(capsys, BASE, "--hbm=1MiB", "--devices=8", *few)
    assert code == 3 and "does not fit 1 MiB" in output.out and "too much" in output.out


def test_a_table_has_a_line_for_each_layout_or_the_reason(capsys):
    arguments = ["--devices=8", "--config.data.batch_size=256", "--config.model.num_layers=2"]
    code, output = run(capsys, BASE, *arguments)
    lines = output.out.splitlines()[2:]
    assert code == 0 and len(lines) == 2 * len(sharding.LAYOUTS)
    for line in lines:
        assert ("model.num_heads: 12" if line.startswith("model ") else "GiB") in line
    code, output = run(capsys, BASE, *arguments, "--hbm=1MiB")
    assert code == 3 and " yes " not in "".join(line[20:] for line in output.out.splitlines()[2:])


def test_a_table_keeps_a_meshs_sizes_where_the_layout_has_a_use_for_them(capsys):
    """Four devices along `model` are the table's for data_model, and none of `data`, which would refuse them."""
    arguments = ["--devices=8", "--config.data.batch_size=256", "--config.model.num_layers=2"]
    code, output = run(capsys, BASE, *arguments, "--config.mesh.model=4")
    meshes = {line.split()[0]: line.split("GiB")[0] for line in output.out.splitlines()[2:]}
    assert code == 0 and "8x1x1" in meshes["data"] and "2x1x4" in meshes["data_model"]
    code, output = run(capsys, BASE, *arguments, "--config.mesh.model=4", "--layout=data")
    assert code == 2 and "mesh.model=4: accepted with mesh.layout=data is 0 or 1" in output.err


def test_smallest_is_the_first_that_fits(capsys):
    arguments = ["--layout=data_expert", "--config.data.batch_size=256", "--config.model.remat=True"]
    code, output = run(capsys, "smallest", BASE, "--hbm=16GiB", "--device=v5e", *arguments)
    row = output.out.splitlines()[2].split()
    assert code == 0 and row[:2] == ["data_expert", "no"]
    config = switch_base.get_config()
    config.data.batch_size, config.model.remat, config.mesh.layout = 256, True, "data_expert"
    device = planner.DEVICES["v5e"]
    peaks = [
        planner.make(from_config(config), PAPER, int(row[2]) // n, 1, device).memory.peak for n in (1, 2)
    ]
    assert peaks[0] <= 16 * 2**30 < peaks[1]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--layout=diagonal"], "--layout=diagonal: accepted is all, or one of data, model"),
        (["--hbm=32"], "--hbm=32: accepted is a number > 0 and a unit of GiB"),
        (["--hbm=infGiB"], "--hbm=infGiB: accepted is a number > 0 and a unit of GiB"),
        (["--devices=0"], "--devices=0: accepted is an integer >= 1"),
        (["--devices=many"], "--devices=many: accepted is an integer >= 1"),
        (["--device=abacus"], "--device=abacus: accepted is one of tpu_v3"),
        (["--devices=8", "--slices=3", "--layout=data"], "--slices=3: accepted is a divisor"),
        (
            ["--devices=64", "--device=h100"],
            "--devices=64: accepted with --device=h100 is at most 8 a slice (--slices=8)",
        ),
        (["--devices=20", "--device=a100", "--slices=2"], "--device=a100 is at most 8 a slice (--slices=3)"),
        (["--devices=24", "--layout=data_expert"], "data.batch_size=2048: accepted is a multiple of 24"),
        (["--devices=256", "--layout=data_expert"], "a multiple of the 256 devices along the expert axis"),
        (["--compile"], "--compile: accepted with one --layout"),
        (["--config.mesh.layout=data"], "--config.mesh.layout=data: accepted by a plan is --layout=NAME"),
        (["--workdir=runs/plan"], "--workdir=runs/plan: accepted by a plan is --layout=NAME"),
        (["--slice=2"], "argument --slice=2 (did you mean --slices=?): accepted are"),
        (["fastest"], "argument fastest: accepted are smallest, layouts"),
        (["smallest", "--devices=8"], "--devices=8: smallest takes --device=, --hbm=, --layout="),
        (["layouts"], "accepted by layouts is --out=DIR"),
    ],
)
def test_bad_input_gets_one_line(arguments, named, capsys):
    what = [a for a in arguments if not a.startswith("-")]
    code, output = run(capsys, *what, BASE, *(a for a in arguments if a not in what))
    assert code == 2 and output.out == "" and output.err.count("\n") == 1 and named in output.err


def test_every_part_of_an_array_is_on_as_many_devices_as_the_layout_says():
    """What the picture is drawn from: 16 devices hold 16 parts of the tokens, or 4 parts four times."""
    rules = dict(sharding.LAYOUTS["data_expert_model"].rules)
    sizes = dict(data=1, expert=4, model=4)
    devices = [dict(data=0, expert=e, model=m) for e in range(4) for m in range(4)]
    tokens = [layouts._part(rules["batch"], at, sizes) for at in devices]
    widths = [layouts._part(rules["mlp"], at, sizes) for at in devices]
    assert sorted(tokens) == sorted([(i, 4) for i in range(4)] * 4)
    assert len(set(zip(tokens, widths, strict=True))) == 16


def test_the_picture_is_written_where_it_is_asked_for(tmp_path, capsys):
    code, output = run(capsys, "layouts", f"--out={tmp_path / 'pictures'}")
    path = tmp_path / "pictures" / "layouts.png"
    assert code == 0 and output.out.strip() == str(path) and path.read_bytes().startswith(b"\x89PNG")
    code, output = run(capsys, "layouts", f"--out={path / 'under_a_file'}")
    assert code == exits.EXIT_IO and output.err.count("\n") == 1 and "Not a directory" in output.err
