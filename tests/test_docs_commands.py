"""Every command that README and docs show is accepted by its parser, and every local link leads somewhere. Nothing is trained."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from experiments import command_line
from experiments.__main__ import commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [path for path in (ROOT / "CHANGELOG.md",) if path.exists()]
DEFAULT = "configs/quickstart.py"
WITH_A_RUN = (
    "configs/from_run.py",
    "configs/finetune.py",
    "configs/distill.py",
)  # they read a run's directory


def shown(page):
    """The arguments of every `python -m experiments.NAME` in indented and fenced lines and between backticks."""
    text = page.read_text(encoding="utf-8")
    spans = [span.replace("\n", " ") for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    blocks = re.sub(r"\\\n\s*", " ", text).splitlines()
    lines = [line for line in blocks if line.startswith("    ") or re.match(r"[^|`]*\bpython -m", line)]
    for line in (*spans, *lines):
        for found in re.finditer(r"python -m experiments\.(\w+)([^`]*)", line):
            given = plain(re.sub(r"\s#.*", "", found[2]))
            if not re.search(r"=\.\.\.| \.\.\.|NAME", given):
                yield found[1], shlex.split(given.rstrip(" .,:)"))


def plain(given):
    """Arguments without what may be left out, [...], and with the first of what a|b offers and 4 for K; DIR|STEP is a value as it is."""
    while re.search(r"\[[^][]*\]", given):
        given = re.sub(r"\s*\[[^][]*\]", "", given)
    given = re.sub(r"(=[a-z0-9]+)(\|[a-z0-9]+)+(?=\s|$)", r"\1", given)
    return re.sub(r"=K(?=\s|$)", "=4", given)


def parse_config(rest, default, buckets=False):
    """As the commands do; a config that reads a run's directory is left out, as none is there."""
    own = [
        argument for argument in rest if argument.startswith(tuple(f"--config={name}" for name in WITH_A_RUN))
    ]
    command_line.overrides(rest)
    if not own:
        kept = [argument for argument in rest if not argument.startswith("--config=FILE")]
        command_line.parse(["command", *kept], default, "", buckets=buckets)


def accept(name, arguments):
    """Raises what the command would answer a mistake with."""
    if "--help" in arguments:
        assert name in commands()
    elif name == "run":
        parse_config(arguments, DEFAULT, buckets=True)
    elif name in ("finetune", "distill"):
        names = {"finetune": ("init", "task", "steps"), "distill": ("teacher", "task")}[name]
        own, rest = command_line.options(arguments, names)
        assert own[names[0]], arguments
        _, others = command_line.overrides(rest)
        assert all(argument.startswith("--workdir=") for argument in others), others
    elif name in ("evaluate", "generate", "convert", "slim"):
        if arguments:
            importlib.import_module(f"experiments.{name}").parse(arguments)
    elif name == "serve":
        importlib.import_module("experiments.serve.__main__").parse(arguments)
    elif name == "analyze":
        command = importlib.import_module("experiments.analyze.command")
        if command._of_routing(arguments):
            importlib.import_module("experiments.analyze.routing").parse(arguments[1:])
        else:
            command._arguments(arguments)
    elif name == "sweep":
        sweep(arguments, "configs/sweeps/experts_tiny.py")
    elif name == "paper":
        paper = importlib.import_module("experiments.paper.__main__")
        if arguments and arguments != ["--list"]:
            found = paper.parse(arguments)
            sweep(found.rest, paper.SCALES[found.scale].config)
    elif name == "plan":
        what, _, _, rest = importlib.import_module("experiments.plan.__main__")._own(arguments)
        if what != "layouts":
            parse_config(rest, "configs/switch_base.py")
    elif name == "offload":
        importlib.import_module("experiments.offload.__main__").COMMANDS[arguments[0]].parse(arguments[1:])
    elif name == "bench":
        if arguments[:1] == ["accelerator"]:
            importlib.import_module("experiments.bench.accelerator")._parse(arguments[1:])
        elif arguments[:1] in (["serving"], ["offload"], ["trace"]):
            name = {"trace": "tracing"}.get(arguments[0], arguments[0])
            importlib.import_module(f"experiments.bench.{name}").parse(arguments)
        else:
            importlib.import_module("experiments.bench.__main__")._parse(arguments)
    else:
        raise ValueError(f"{name}: no parser is known to this test")


def sweep(arguments, default):
    from experiments.launchers import choice

    _, rest = choice.read(arguments)
    parse_config([argument for argument in rest if argument != "--dry_run"], default)


COMMANDS = {f"{page.stem}-{n}": found for page in PAGES for n, found in enumerate(shown(page))}


@pytest.mark.parametrize("name, arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_is_accepted(name, arguments):
    accept(name, arguments)


def test_what_may_be_left_out_is_and_comments_are():
    assert plain("--source=S [--of=use|merge [--bits=8|4]] --by=use|merge --from=DIR|3") == (
        "--source=S --by=use --from=DIR|3"
    )
    found = dict(shown(ROOT / "docs" / "slim.md"))
    assert set(found) == {"slim"}
    benches = [arguments for name, arguments in shown(ROOT / "docs" / "speed.md") if name == "bench"]
    assert ["layer"] in benches  # its comment has a " ... "


def asked_of_pytest(page):
    """The arguments of each pytest command of a page."""
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        for found in re.finditer(r"(?:python -m |`)pytest((?: +(?:-\w+|[\w./:\[\]-]+))*)", line):
            yield shlex.split(found[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pytest_is_asked_for_is_there(page):
    for arguments in asked_of_pytest(page):
        paths = [word.partition("::")[0] for word in arguments if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), arguments
        files = [file for path in paths or ["tests"] for file in files_of_tests(ROOT / path)]
        sources = [file.read_text(encoding="utf-8") for file in files]
        named = [arguments[at + 1] for at, word in enumerate(arguments) if word == "-k"]
        for name in named:
            found = (f"{file.stem} {source}" for file, source in zip(files, sources, strict=True))
            assert any(re.search(rf"def test_\w*{name}|^\w*{name}", text) for text in found), arguments
        marked = [arguments[at + 1] for at, word in enumerate(arguments) if word == "-m"]
        for mark in marked:
            assert any(f"pytest.mark.{mark}" in source for source in sources), arguments


def files_of_tests(path):
    return [path] if path.is_file() else sorted(path.rglob("test_*.py"))


def test_pytests_commands_are_found():
    found = [arguments for page in PAGES for arguments in asked_of_pytest(page)]
    assert len(found) >= 7 and ["-n", "0", "tests/routing/test_routers.py", "-k", "top_k"] in found


def test_the_commands_are_found():
    assert {name for name, _ in COMMANDS.values()} == set(commands()) and len(COMMANDS) > 50


@pytest.mark.parametrize(
    "name, argument",
    [
        ("run", "--config.moe.experts=8"),
        ("run", "--config.moe.num_experts=many"),
        ("sweep", "--config.moe.num_expert=1"),
        ("generate", "--source=RUN --heat=1"),
        ("serve", "--source=RUN --port=many"),
        ("plan", "smallest --devices=4"),
        ("bench", "layer --dispatch=magic"),
        ("paper", "table99"),
        ("offload", "simulate --trace=TRACE --budgets=2"),
    ],
)
def test_a_wrong_one_is_not(name, argument):
    with pytest.raises((ValueError, SystemExit)):
        accept(name, argument.split())


def anchor(heading):
    """As GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def words(page):
    """Of a notebook its cells of text."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    text = words(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, part = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not part or part in anchors(there), target
    for path in re.findall(
        r"`((?:docs|configs|scripts|tests|switchmoe|experiments|colab)/[\w./]+\.\w+)`", text
    ):
        assert list(ROOT.glob(path)), path
