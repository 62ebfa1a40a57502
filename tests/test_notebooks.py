"""Notebooks: valid, stored without outputs, one way to install, no logic of their own; each runs from top to bottom."""

import ast
import base64
import importlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import matplotlib.image
import nbclient
import nbformat
import pytest

COLAB = Path(__file__).parents[1] / "colab"
CELL_SECONDS = 120
SHOWN = {  # at least so many pictures and tables
    "quickstart": (6, 3),
    "routing_playground": (10, 1),
    "expert_sweep": (10, 4),
    "specialisation": (9, 1),
    "sharding": (3, 1),
    "real_checkpoints": (7, 2),
    "finetune_and_distill": (10, 2),
}
LOGIC = (ast.FunctionDef, ast.ClassDef, ast.If, ast.While, ast.For, ast.Try, ast.With)
every = pytest.mark.parametrize("name", SHOWN)


def read(name):
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


def codes(name):
    return [cell.source for cell in read(name).cells if cell.cell_type == "code"]


def test_these_are_all():
    assert {path.stem for path in COLAB.glob("*.ipynb")} == set(SHOWN)


@every
def test_it_is_valid_and_stores_no_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata["colab"]["name"] == f"{name}.ipynb"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@every
def test_it_installs_as_all_do_and_asks_for_settings_in_forms(name):
    first, *others = codes(name)
    assert first == codes("quickstart")[0]
    assert 'REPO = ""  # @param {type:"string"}' in first and "SWITCHMOE_REPO" in first
    assert any("# @param" in source for source in others)


def test_a_checkout_is_known_by_a_file_that_it_has():
    (name,) = re.findall(r'folder / "([^"]+)"\)\.is_file', codes("quickstart")[0])
    assert (COLAB.parent / name).is_file()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The first cell in an empty directory of a fresh runtime; what it has pip install."""
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SWITCHMOE_REPO", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))

    def run(repo=""):
        source = codes("quickstart")[0].replace('REPO = ""', f"REPO = {repo!r}")
        with monkeypatch.context() as missing:
            missing.setattr(importlib.util, "find_spec", lambda name: None)
            exec(source, {})
        ((*pip, package),) = asked
        assert pip == [sys.executable, "-m", "pip", "install", "-q"]
        return package

    return run


def test_the_first_cell_installs_the_checkout_that_it_is_in(fresh, monkeypatch):
    monkeypatch.chdir(COLAB)
    name, _, place = fresh("https://elsewhere/switchmoe").partition(" @ ")
    assert place == COLAB.parent.resolve().as_uri() and place.startswith("file:///")
    extras = ast.literal_eval(
        re.search(r"extras_require=(\{.*\n    \})", (COLAB.parent / "setup.py").read_text(), re.DOTALL)[1]
    )
    asked = re.fullmatch(r"switchmoe\[(.*)\]", name)[1].split(",")
    assert "notebooks" in asked and all(extras[one] for one in asked), "none that is empty"


def test_the_first_cell_installs_what_it_is_told_of(fresh, monkeypatch):
    monkeypatch.setenv("SWITCHMOE_REPO", "https://host/one.git")
    assert fresh().endswith(" @ git+https://host/one.git")


def test_the_form_field_comes_before_the_environment(fresh, monkeypatch):
    monkeypatch.setenv("SWITCHMOE_REPO", "https://host/one.git")
    assert fresh("https://host/other.git").endswith(" @ git+https://host/other.git")


def test_the_first_cell_says_that_it_was_told_of_nothing(fresh):
    with pytest.raises(RuntimeError, match="REPO is empty: accepted is the address that git clone takes"):
        fresh()


@every
def test_it_holds_no_logic_of_its_own(name):
    for source in codes(name)[1:]:
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, LOGIC), source
        assert len(source.splitlines()) <= 20, source


@every
def test_what_it_imports_is_there(name):
    known = {}
    for source in codes(name):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                known |= {alias.name: importlib.import_module(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    module = importlib.import_module(node.module)
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
                    known[alias.name] = getattr(module, alias.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = known.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"


def test_another_number_of_tokens_is_traced_into_another_directory():
    """A directory's trace is of one text: the command refuses another there."""
    (source,) = [source for source in codes("specialisation") if "--tokens=" in source]
    given = []
    stub = types.SimpleNamespace(
        pick=lambda usual, small: usual, run=lambda *arguments: given.append(arguments)
    )
    for tokens in ("20000", "300"):
        exec(source.replace("20000", tokens), {"notebooks": stub, "run": Path("run"), "RUN": ""})
    first, second = ([one for one in of if one.startswith("--out=")] for of in given)
    assert first != second and len(first) == 1 and "--tokens=300" in given[1]


FIELD = re.compile(r"^(\w+) = (.+?)  # @param", re.MULTILINE)


@every
def test_what_a_form_changes_goes_into_another_directory(name):
    """A directory's run is of one setting: the command refuses another there. Each field that a cell trains with is in its path."""
    fields = {field for source in codes(name) for field, _ in FIELD.findall(source)} - {"REPO", "RUN"}
    for source in codes(name):
        for node in ast.walk(ast.parse(source)):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "notebooks.train"):
                continue
            directory, *others = node.args
            used = {one.id for other in others for one in ast.walk(other) if isinstance(one, ast.Name)}
            missing = used & fields - {one.id for one in ast.walk(directory) if isinstance(one, ast.Name)}
            assert not missing, f"{ast.unparse(directory)}: not in its name: {missing}"


@pytest.mark.long
@every
def test_it_runs_from_top_to_bottom(name, environment, tmp_path):
    notebook = read(name)
    where = {"metadata": {"path": str(tmp_path)}}
    environment = environment | {"SWITCHMOE_TINY": "1"}
    if "CI" in os.environ:  # the package as it is installed, far from its sources
        del environment["PYTHONPATH"]
    client = nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=where)
    client.execute(env=environment)
    if kept := os.environ.get("SWITCHMOE_NOTEBOOKS"):  # the site shows it as it was executed
        nbformat.write(notebook, Path(kept) / f"{name}.ipynb")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    for picture in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)))
        assert pixels.shape[1] >= 400 and pixels[..., :3].std() > 0.01
    tables = sum("<table>" in data.get("text/html", "") for data in shown)
    assert len(pictures) >= SHOWN[name][0] and tables >= SHOWN[name][1], (len(pictures), tables)
