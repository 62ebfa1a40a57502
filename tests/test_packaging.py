"""What the installed package promises: its dependencies, the README's commands."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("switchmoe", "experiments", "configs")
MAX_BYTES = 2_000_000

# What a GPU host with nothing but JAX and Flax can load: models, routing and what benchmarks need.
MODEL_MODULES = [
    f"switchmoe.{name}"
    for name in (
        "settings routing dispatch.exchange model.moe model.transformer parallel.sharding training.train_step"
        " planning.flops inference.decoding"
    ).split()
]
# Imports modules where looking for some packages is an error; the error is one that no library's
# `except ImportError` hides.
IMPORT_WITHOUT = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise AssertionError(f"import of {name}")

refused, modules = sys.argv[1].split(","), sys.argv[2].split(",")
sys.meta_path.insert(0, Refuse())
for module in modules:
    importlib.import_module(module)
"""


def import_without(refused, modules, environment):
    subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, ",".join(refused), ",".join(modules)],
        env=environment,
        check=True,
        timeout=120,
    )


def setup_argument(name):
    """The literal value of a keyword argument of setup()."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def imported_names(path):
    """Top-level names of the packages that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module.partition(".")[0]


def tracked_files():
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.decode().split("\0") if (ROOT / name).is_file()]


def test_nothing_imports_tensorflow(user_environment):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "switchmoe").rglob("*.py"))
        if path.name != "__init__.py"
    ]
    import_without(["tensorflow"], [*modules, "experiments.run"], user_environment)


def test_model_code_imports_without_the_data_stack(user_environment):
    data_stack = ["grain", "tensorflow_datasets", "ml_collections", "array_record"]
    import_without(data_stack, MODEL_MODULES, user_environment)
    bench = ["experiments.bench.accelerator", "experiments.bench.accelerator_parts"]
    import_without([*data_stack, "orbax", "sentencepiece", "tensorboardX"], bench, user_environment)


def test_installed_versions_satisfy_the_floors():
    for line in setup_argument("install_requires"):
        requirement = Requirement(line)
        installed = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), (
            f"{line}: {installed} is installed"
        )


def test_every_imported_package_is_declared():
    declared = setup_argument("install_requires")
    for extra in setup_argument("extras_require").values():
        declared = declared + extra
    declared = {canonicalize_name(Requirement(line).name) for line in declared}
    distributions = importlib.metadata.packages_distributions()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for name in set(imported_names(path)) - sys.stdlib_module_names - set(PACKAGES):
                owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
                assert owners & declared, f"{path}: setup.py does not declare {name}"


def test_readme_has_the_two_commands_each_of_one_line():
    blocks = re.findall(
        r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M
    )
    commands = [
        line for block in blocks for line in block.splitlines() if line.startswith("python3 -m venv ")
    ]
    assert [command.rpartition(" -m ")[2] for command in commands] == ["experiments.run", "pytest"]


def test_no_file_is_large():
    assert [path for path in tracked_files() if path.stat().st_size > MAX_BYTES] == []
