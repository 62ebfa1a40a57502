"""The house: which room imports from which, no circles, and what ``import switchmoe`` hands out."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import switchmoe

ROOT = Path(__file__).parents[1]


def modules(*packages):
    """File by module name; a package's own file has the package's name."""
    files = (path for package in packages for path in (ROOT / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }


def imports(path, known):
    """The modules among the known ones that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def upward(name, imported):
    """Those of the imported modules that lie in a room above the module's own."""
    order = list(switchmoe.ROOMS)
    room = name.split(".")[1]
    return {
        other for other in imported if "." in other and order.index(other.split(".")[1]) > order.index(room)
    }


def test_a_room_imports_only_from_those_below_it():
    known = modules("switchmoe")
    rooms = {name.split(".")[1] for name in known if "." in name}
    assert rooms == set(switchmoe.ROOMS)
    for name, path in known.items():
        if "." in name:
            assert not upward(name, imports(path, known)), name
    assert upward("switchmoe.routing.token_choice", {"switchmoe.model.moe"})


def test_the_library_does_not_know_its_commands():
    known = modules("switchmoe", "experiments", "configs")
    for name, path in known.items():
        if name.startswith("switchmoe"):
            assert not [other for other in imports(path, known) if not other.startswith("switchmoe")], name


def test_what_answers_others_unpickles_nothing():
    """Neither a request's bytes nor a file that it reads can be a program."""

    def unpickles(tree):
        for node in ast.walk(tree):
            named = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in named} & {
                "pickle",
                "marshal",
                "shelve",
                "dill",
                "cloudpickle",
            }:
                return True
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    return True
        return False

    known = modules("switchmoe", "experiments")
    own = [
        path for name, path in known.items() if name.startswith(("experiments.serve", "switchmoe.inference"))
    ]
    assert len(own) > 20 and not [
        path for path in own if unpickles(ast.parse(path.read_text(encoding="utf-8")))
    ]
    for text in ("import pickle", "from marshal import loads", "np.load(f, allow_pickle=True)"):
        assert unpickles(ast.parse(text))
    assert not unpickles(ast.parse("np.load(f, allow_pickle=False)"))


def test_no_circles():
    known = modules("switchmoe", "experiments")
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises where there is one
    with pytest.raises(graphlib.CycleError):
        tuple(
            graphlib.TopologicalSorter(graph | {"switchmoe.settings": {"switchmoe.runs.loop"}}).static_order()
        )


def test_the_map_has_the_rooms_in_their_order():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", text, flags=re.MULTILINE)
    assert drawn == list(switchmoe.ROOMS)
    for path in re.findall(r"`((?:switchmoe|experiments|configs|tests|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_public_names_are_there_and_cost_nothing_until_asked_for():
    for name in switchmoe.PUBLIC:
        assert getattr(switchmoe, name).__name__ if callable(getattr(switchmoe, name)) else True
    for room in switchmoe.ROOMS:
        assert getattr(switchmoe, room).__name__ == f"switchmoe.{room}"
    with pytest.raises(AttributeError, match="no attribute 'Router'"):
        switchmoe.Router  # noqa: B018
    code = "import sys, switchmoe; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'numpy')))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_readmes_example():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(example, names)
    assert names["y_GSD"].shape == names["x_GSD"].shape and "loss" in names["aux"]


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, so two of one name cannot be collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", ["run", "finetune", "distill", "slim"])
def test_what_trains_and_what_slims_are_thin_over_the_library(name):
    assert len((ROOT / "experiments" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 150
