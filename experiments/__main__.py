"""Lists the commands: ``python -m experiments``."""

import ast
import pkgutil
from pathlib import Path

import experiments
from experiments import exits


def commands() -> dict[str, str]:
    """What each command does, by name, from the first lines of their files; nothing is imported."""
    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        path = Path(experiments.__path__[0]) / module.name
        source = path / "__main__.py" if module.ispkg else path.with_suffix(".py")
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        doc = ast.get_docstring(ast.parse(text)) or ""
        what, line, _ = doc.partition(f": ``python -m experiments.{module.name}")
        if line and not module.name.startswith("_"):
            found[module.name] = what
    return found


def main(argv: list[str]) -> int:
    found = commands()
    if len(argv) > 1 and argv[1] not in ("--help", "-h"):
        error = f"{argv[1]}: no such command; accepted are python -m experiments.NAME with NAME of {', '.join(found)}"
        return exits.fail("experiments", error, exits.EXIT_BAD_INPUT)
    width = max(map(len, found))
    print("python -m experiments.NAME --help says more of each:\n")
    for name, what in found.items():
        print(f"  {name.ljust(width)}  {what}")
    return 0


if __name__ == "__main__":
    exits.leave("experiments", main)
