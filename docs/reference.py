"""What the site takes from elsewhere: the table of all settings, a page for each room of the library, the files at the root."""

import os
import pkgutil
import re
from pathlib import Path
from typing import Any

import switchmoe
from experiments.command_line import GROUPS, meanings

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Written at each build, not committed.
API, ELSEWHERE = DOCS / "api", DOCS / "elsewhere"
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(ROOT.glob("experiments/results/**/*.md")))
# Notebooks as they were executed take the place of those without outputs.
NOTEBOOKS = [ROOT / "colab", *map(Path, filter(None, [os.environ.get("SWITCHMOE_NOTEBOOKS")]))]
PAGES = {ROOT / file: ELSEWHERE / (ROOT / file).relative_to(ROOT) for file in FILES}


def settings_tables() -> str:
    """A table for each group of settings: field, type, default, meaning (the comment where it is declared)."""
    meant, lines = meanings(), []
    for group, fields in GROUPS.items():
        lines += ["", f"## {group}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        for name, field in fields.items():
            default = f'"{field.default}"' if field.type is str else field.default
            meaning = re.sub(r"([|*_<\[\]$])", r"\\\1", meant[f"{group}.{name}"])
            lines.append(f"| `{group}.{name}` | {field.type.__name__} | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


def room_page(room: str) -> str:
    """Every public function and class of a room, by module."""
    whole = __import__(f"switchmoe.{room}", fromlist=["_"])
    names = [f"switchmoe.{room}"]
    if hasattr(whole, "__path__"):
        found = pkgutil.walk_packages(whole.__path__, f"switchmoe.{room}.")
        names += [module.name for module in found if not module.name.rpartition(".")[2].startswith("_")]
    lines = [f"# switchmoe.{room}", ""]
    for name in names:
        lines += [] if name == f"switchmoe.{room}" else [f"## {name.removeprefix('switchmoe.')}", ""]
        lines += [
            "```{eval-rst}",
            f".. automodule:: {name}",
            "   :members:",
            "   :ignore-module-all:",
            "```",
            "",
        ]
    return "\n".join(lines)


def moved(text: str, source: Path, page: Path) -> str:
    """A file's text, as it reads on the site: links to files that are pages there lead to these."""

    def link(found: re.Match) -> str:
        path, _, anchor = found[1].partition("#")
        there = (source.parent / path).resolve()
        if not path or ":" in path or not there.exists():
            return found[0]
        target = os.path.relpath(PAGES.get(there, there), page.parent)
        return f"]({target}#{anchor})" if anchor else f"]({target})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def write_pages(app: Any) -> None:
    """Writes those that are not committed, each if it differs from what is there: else all would be built again."""
    pages = {API / f"{room}.md": room_page(room) for room in switchmoe.ROOMS}
    pages |= {page: moved(file.read_text(encoding="utf-8"), file, page) for file, page in PAGES.items()}
    pages = {
        page: text if text.startswith("# ") else f"# {page.stem.capitalize()}\n\n{text}"
        for page, text in pages.items()
    }
    for directory in NOTEBOOKS:
        files = directory.glob("*.ipynb")
        pages |= {ELSEWHERE / file.name: file.read_text(encoding="utf-8") for file in files}
    for page, text in pages.items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(text, encoding="utf-8")


def with_code(text: str) -> str:
    """Lines such as ``Code: [`NAME`](FILE)`` followed by the function itself."""
    included = r"\g<0>\n\n```{literalinclude} \2\n:pyobject: \1\n```"
    return re.sub(r"^Code: \[`(\w+)`\]\(([^)]+)\)$", included, text, flags=re.MULTILINE)


def fill(app: Any, page: str, source: list[str]) -> None:
    """Links of a page lead to pages; the page `configuration` ends with the tables, `router_mathematics` has the code."""
    if not page.startswith(("api/", "elsewhere/")):
        source[0] = moved(source[0], DOCS / f"{page}.md", DOCS / f"{page}.md")
    if page == "configuration":
        source[0] += settings_tables()
    if page == "router_mathematics":
        source[0] = with_code(source[0])


def as_rst(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: what reStructuredText would read as markup outside of backticks is escaped.

    Lines that are indented below a paragraph (commands, tables of options) are kept as they stand.
    """
    found, literal, section = [], False, False
    for line in lines:
        section = bool(re.match(r"\w+:$", line)) or (section and (line.startswith(" ") or not line))
        if line.startswith(" ") and not section:
            if not literal:
                found += ["", "::", ""]
            literal = True
        elif literal and line:
            found, literal = [*found, ""], False
        if literal:
            found.append(f"  {line}")
            continue
        parts = re.split(r"(``.+?``|`[^`]+`)", line)
        parts[::2] = [re.sub(r"([*|\\])|(?<=\w)(_)(?!\w)", r"\\\1\2", part) for part in parts[::2]]
        found.append("".join(parts))
    lines[:] = found


def not_a_field(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out what a NamedTuple says of its fields, and what Flax adds to each module."""
    doc = getattr(thing, "__doc__", None) or ""
    return True if doc.startswith("Alias for field number") or name in ("replace", "name", "parent") else None


def setup(app: Any) -> None:
    app.connect("builder-inited", write_pages)
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", as_rst, priority=100)  # before napoleon
    app.connect("autodoc-skip-member", not_a_field)
