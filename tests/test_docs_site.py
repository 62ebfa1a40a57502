"""What pages say of the code and of recorded results is so: shapes, messages, figures, versions."""

import ast
import csv
import json
import re
from pathlib import Path

import pytest

import switchmoe
from configs import quickstart
from switchmoe.analysis.routing import traces
from switchmoe.data import objectives
from switchmoe.model.moe_rules import group_shape, slots
from switchmoe.settings import from_config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def table(text, first):
    """Rows of the table whose header's first cell is ``first``, by their own first cells."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in (rows[0], *rows[2:])}


def test_the_tour_has_the_quickstarts_shapes():
    settings = from_config(quickstart.get_config())
    data, moe, d = settings.data, settings.moe, settings.model.d_model
    found = objectives.lengths(data)
    assert (data.batch_size, found.inputs, found.targets) == (256, 24, 6)
    groups, tokens = group_shape(data.batch_size, found.inputs, moe.group_size)
    capacity = slots(moe, tokens, moe.capacity_factor)
    text = page("tour.md")
    for name, shape in {
        "inputs_BL": (data.batch_size, found.inputs),
        "targets_BL": (data.batch_size, found.targets),
        "x_BLD": (data.batch_size, found.inputs, d),
        "x_GSD": (groups, tokens, d),
        "logits_GSE": (groups, tokens, moe.num_experts),
        "gate_GSK": (groups, tokens, moe.choices),
        "x_EGCD": (moe.num_experts, groups, capacity, d),
        "y_GSD": (groups, tokens, d),
    }.items():
        assert f"`{name}` {shape}" in text, name
    assert f"{capacity} slots an expert" in text


def strings(path):
    """The text of every string of a file, with a mark where an f-string puts something in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_are_those_of_the_code():
    files = [path for room in ("switchmoe", "experiments") for path in (ROOT / room).rglob("*.py")]
    said = "\n".join(text for path in files for text in strings(path))
    messages = re.findall(r"^\| `([^`]+)` \|", page("troubleshooting.md"), re.MULTILINE)
    assert len(messages) >= 20
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in said, part


def test_the_figures_of_experts_are_those_recorded():
    wanted = table(page("when_sparse.md"), "experts")
    points = list(csv.DictReader((RESULTS / "experts_tiny" / "points.csv").open()))
    speedups = list(csv.DictReader((RESULTS / "experts_tiny" / "speedups.csv").open()))
    assert wanted["experts"] == [row["num_experts"] for row in points]
    assert wanted["held-out loss"] == [f"{float(row['loss']):.3f}" for row in points]
    assert wanted["parameters, M"] == [f"{float(row['parameters']) / 1e6:.2f}" for row in points]
    for name, column in (
        ("fewer steps to dense's loss, times", "step_mean"),
        ("less time to it, times", "time_mean"),
    ):
        found = [f"{float(row[column]):.2f}" if row[column] else "-" for row in speedups]
        assert wanted[name] == ["1", *found]


def test_the_figures_of_the_search_are_those_recorded():
    wanted = table(page("when_sparse.md"), "setting")
    rows = list(csv.DictReader((RESULTS / "paper_search" / "results.csv").open()))

    def loss(experts, **changed):
        fields = {"train.num_steps": "300", "train.seed": "200", "moe.num_experts": experts} | changed
        varied = (
            "model.d_ff",
            "model.num_layers",
            "model.d_model",
            "data.vocab_size",
            "moe.every",
            "moe.router",
        )
        fields = {name: "" for name in varied} | fields
        (row,) = [row for row in rows if all(row[name] == value for name, value in fields.items())]
        return float(row["cross_entropy"])

    for (name, found), (dense, sparse) in zip(
        list(wanted.items())[1:],
        [
            ({}, {}),
            ({"model.d_ff": "128"},) * 2,
            ({"model.num_layers": "4"},) * 2,
            ({"model.d_model": "128", "model.d_ff": "64"},) * 2,
            ({"data.vocab_size": "1948"},) * 2,
            ({}, {"moe.every": "2"}),
            ({}, {"moe.num_experts": "4"}),
            ({}, {"moe.num_experts": "64"}),
        ],
        strict=True,
    ):
        a, b = loss("1", **dense), loss(sparse.get("moe.num_experts", "16"), **sparse)
        assert found == [f"{a:.3f}", f"{b:.3f}", f"{a - b:.3f}"], name


def test_the_figures_of_the_layer_are_those_recorded():
    text = page("when_sparse.md")
    wanted = table(text[text.index("## Time and memory") :], "experts")
    rows = json.loads((RESULTS / "bench" / "layer_cpu.json").read_text())["rows"]
    rows = [row for row in rows if row["case"] == "gather" and row["mode"] != "forward"]
    assert wanted["experts"] == [str(row["experts"]) for row in rows]
    assert wanted["time, of dense's"] == [f"{row['ratio']:.2f}" for row in rows]
    assert wanted["memory, MB"] == [f"{row['temporary_bytes'] / 1e6:,.0f}" for row in rows]


def test_the_schema_of_a_trace_is_that_of_the_code():
    wanted = {name: text.partition(":")[0] for name, text in traces.COLUMNS.items()}
    found = {}
    for names, (kinds, _) in table(page("routing_traces.md"), "column").items():
        one, _, what = kinds.rpartition(" of ")
        kinds = [f"list of {kind}" if one else kind for kind in what.split(", ")]
        names = re.findall(r"`(\w+)`", names)
        found |= dict(zip(names, kinds * (len(names) if len(kinds) == 1 else 1), strict=True))
    assert found == {name: re.sub("of [EK] ", "of ", kind) for name, kind in wanted.items()}


def test_the_readme_begins_with_what_it_is_two_commands_and_a_picture():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("!["))
    assert first < 25 and sum(line.startswith("python3 -m venv") for line in lines[:first]) == 2
    assert [line for line in lines if re.match("#+ ", line)] == [
        "# switchmoe",
        "## Three things to try next",
        "## What of the papers was found here",
        "## Where to read on",
        "## Licences",
    ]


def test_the_readmes_verdicts_are_the_scorecards():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    scorecard = (RESULTS / "scorecard.md").read_text(encoding="utf-8")
    claims = list(table(scorecard[scorecard.index("## Scale `tiny`") :], "claim").values())[1:]
    # With all their runs: of three seeds or more.
    seeds = [int(re.match(r"\d+|", claim[-1])[0] or 0) for claim in claims]
    decided = [
        claim[1].removesuffix(" at this scale")
        for claim, count in zip(claims, seeds, strict=True)
        if count >= 3
    ]
    counts = [decided.count(verdict) for verdict in ("held", "did not hold", "not decidable")]
    told = re.search(r"\((\d+) held, (\d+) did not, (\d+) not\s+decidable\)", text)
    assert [int(count) for count in told.groups()] == counts
    shown = [row[0] for row in table(text, "claim").values()]
    assert [shown.count(verdict) for verdict in ("held", "did not hold")] == counts[:2]


def test_how_long_the_path_of_a_token_is():
    lines = 0
    for room in ("routing", "dispatch", "model"):
        files = (ROOT / "switchmoe" / room).rglob("*.py")
        lines += sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
    told = re.search(r"is ([\d,]+) lines to read", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    assert abs(lines / int(told.replace(",", "")) - 1) < 0.1


def test_what_is_cited_is_this_version():
    yaml = pytest.importorskip("yaml")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == switchmoe.__version__ and cited["cff-version"] == "1.2.0"
    assert f"## {switchmoe.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert cited["license"] in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_every_page_is_in_the_index():
    listed = set(re.findall(r"^(\w+)$", page("index.md"), re.MULTILINE))
    assert listed == {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}


def test_every_room_has_its_page_of_the_api():
    assert re.findall(r"^api/(\w+)$", page("api.md"), re.MULTILINE) == list(switchmoe.ROOMS)
