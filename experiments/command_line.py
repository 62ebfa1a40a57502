"""The command line that all experiments share: a config file, overrides of its fields, a directory."""

import ast
import dataclasses
import difflib
import fractions
import inspect
import io
import json
import re
import shutil
import textwrap
import tokenize
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import configs
from switchmoe.settings import Settings, from_config, to_dict

GROUPS = {
    group.name: {field.name: field for field in dataclasses.fields(group.type)}
    for group in dataclasses.fields(Settings)
}

UNITS = {  # of sizes, in bytes
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "B": 1,
}


def parse(
    argv: Sequence[str], default_config: str, doc: str, buckets: bool = False, own: Sequence[str] = ()
) -> tuple[Settings, str]:
    """Settings and ``--workdir`` (default: runs/NAME for configs/NAME.py), which may be in a bucket if so said.

    Args:
      own: the command's other flags (``--NAME=``, ``--NAME``), which it has taken out of ``argv``.

    Raises:
      ValueError: one line that names the argument, its value and what would be accepted.
      SystemExit: after ``--help``.
    """
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(_help(doc))
        raise SystemExit(0)
    argv = [argv[0], *(_check(argument) for argument in joined(argv[1:]))]
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        if name not in ("config", "workdir") and not name.startswith(("config.", "noconfig.")):
            raise ValueError(unknown(argument, ["--config=", "--workdir=", *own]))
    values = flags.FlagValues()
    path = resolve(default_config)
    config = config_flags.DEFINE_config_file("config", path, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", "", "the run's directory", flag_values=values)
    try:
        values(argv)
        found = config.value
    except flags.IllegalFlagValueError as error:
        raise ValueError(_wrong_type(argv, error)) from error
    except flags.Error as error:
        raise ValueError(f"{str(error).splitlines()[0]}; see --help") from error
    except Exception as error:
        raise ValueError(f"--config: {_last_line(error)}") from error
    if not isinstance(found, ConfigDict):
        raise ValueError(f"--config: get_config() returned {found!r}; accepted is a ConfigDict")
    if "://" in values.workdir and not (buckets and values.workdir.startswith(("gs://", "s3://"))):
        where = (
            "a directory, gs://BUCKET/PLACE or s3://BUCKET/PLACE"
            if buckets
            else "a directory of a mounted file system"
        )
        raise ValueError(f"--workdir={values.workdir}: accepted is {where}")
    name = Path(config_flags.get_config_filename(values["config"]).split(":")[0]).stem
    return from_config(found), values.workdir or f"runs/{name}"


def begun(workdir: str, names: Sequence[str]) -> list[str]:
    """As flags what the run there has of these groups and fields, the default where it lacks one: it goes on as it began."""
    try:
        there = json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8"))
        return [
            f"--config.{group}.{name}={there[group].get(name, default)}"
            for group, fields in to_dict(Settings()).items()
            for name, default in fields.items()
            if group in names or f"{group}.{name}" in names
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # no run, or one that can't be read, which is for the run to say


def joined(arguments: Sequence[str]) -> list[str]:
    """``--name value`` as ``--name=value``, for the names that take one."""
    found: list[str] = []
    for argument in arguments:
        before = found[-1].lstrip("-") if found else ""
        takes_value = before in ("config", "workdir") or (before.startswith("config.") and "=" not in before)
        if takes_value and not argument.startswith("--"):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def options(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(values of ``--NAME=VALUE`` by name, "" where it is not given; the other arguments)."""
    found, others = dict.fromkeys(names, ""), []
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if name in found and equals:
            found[name] = value
        else:
            others.append(argument)
    return found, others


def values(
    arguments: Sequence[str], defaults: Mapping[str, str], flags: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(`overrides`, the values of ``--NAME=VALUE`` and whether there is a ``--FLAG``, by name), of commands that take nothing else.

    Raises:
      ValueError: another argument, or an empty value.
    """
    found, others = overrides(arguments)
    own = dict(defaults) | dict.fromkeys(flags, False)
    for argument in others:
        name, _, value = argument.removeprefix("--").partition("=")
        if argument in [f"--{flag}" for flag in flags]:
            own[name] = True
        elif argument.startswith("--") and name in defaults and value:
            own[name] = value
        else:
            raise ValueError(
                unknown(argument, [f"--{option}=" for option in defaults] + [f"--{flag}" for flag in flags])
            )
    return found, own


def size(text: str) -> int:
    """Bytes of a number with or without one of `UNITS`, in large or small letters, such as ``512MiB``.

    Raises:
      ValueError: it is none.
    """
    units = {"": 1} | {unit.lower(): factor for unit, factor in UNITS.items()}
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([a-z]*)", text.lower(), re.ASCII)
    if not found or found[2] not in units:
        raise ValueError(f"{text}: accepted is a size such as 512MiB, 2GB or bytes")
    return int(fractions.Fraction(found[1]) * units[found[2]])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table in columns, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in lines
    )


def unknown(argument: str, flags: Sequence[str]) -> str:
    """One line on an argument that a command of these flags (``--NAME=``, ``--NAME``) does not take: what may be meant, and what is accepted."""
    names = {flag.strip("-="): flag for flag in flags}
    names |= {
        field: f"--config.{group}.{field}="
        for group, fields in GROUPS.items()
        for field in fields
        if field not in names
    }
    name = argument.lstrip("-").partition("=")[0]
    meant = (
        "" if name in names and names[name] in flags else _meant(name, names, names.get)
    )  # known, but its value is none
    return (
        f"argument {argument}{meant}: accepted are {', '.join(flags)} and --config.GROUP.FIELD= (see --help)"
    )


def free_lengths(arguments: Sequence[str]) -> list[str]:
    """The lengths of `data` that no argument gives, which fine-tuning fits to its tasks."""
    given = {argument.lstrip("-").partition("=")[0] for argument in arguments}
    return [field for field in ("input_length", "target_length") if f"config.data.{field}" not in given]


def _check(argument: str) -> str:
    """Refuses what absl and ml_collections would answer with a traceback, or not at all."""
    name, equals, value = argument.removeprefix("-").removeprefix("-").partition("=")
    if not argument.startswith("-"):
        return argument
    if name == "config" and equals:
        return f"--config={resolve(value)}"
    if not name.startswith(("config.", "noconfig.")):
        return argument
    group, _, field = name.partition(".")[2].partition(".")
    if group not in GROUPS:
        raise ValueError(
            f"--{name}: no group {group}{_meant(group, GROUPS)}; accepted are {', '.join(GROUPS)}"
        )
    if not field:
        raise ValueError(
            f"--{name}={value}: a whole group can't be overwritten; accepted is --{name}.FIELD=VALUE"
        )
    if field not in GROUPS[group]:
        elsewhere = [f"config.{other}.{field}" for other in GROUPS if field in GROUPS[other]]
        meant = f" (did you mean {elsewhere[0]}?)" if elsewhere else _meant(field, GROUPS[group])
        raise ValueError(
            f"--{name}: config.{group} has no field {field}{meant}; accepted is one of its {len(GROUPS[group])} fields (see"
            " --help)"
        )
    return argument


def overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values of ``--config.GROUP.FIELD=VALUE`` by ``group.field``, the other arguments).

    Raises:
      ValueError: a field that does not exist, or a value that is not of its type.
    """
    found, others = {}, []
    for argument in joined(arguments):
        name, equals, value = _check(argument).lstrip("-").partition("=")
        if not name.startswith("config."):
            others.append(argument)
            continue
        _, group, field = name.split(".")
        kind = GROUPS[group][field].type
        try:
            if kind is bool and value not in ("", "True", "False", "true", "false"):
                raise ValueError
            found[f"{group}.{field}"] = value.lower() != "false" if kind is bool else kind(value)
        except ValueError as error:
            raise ValueError(f"--{name}={value}: accepted is a value of type {kind.__name__}") from error
    return found, others


def resolve(value: str) -> str:
    """FILE.py[:ARGS], where FILE.py is looked for here, then among the configs that came with the package."""
    path, colon, arguments = value.partition(":")
    if Path(path).is_file():
        return value
    if not path:
        raise ValueError("--config=: accepted is a file, FILE.py[:ARGUMENTS]")
    room = Path(configs.__file__).parent
    packaged = room / Path(path).relative_to("configs") if Path(path).is_relative_to("configs") else room
    if packaged.is_file():
        return f"{packaged}{colon}{arguments}"
    known = sorted(str(p.relative_to(room).with_suffix("")) for p in room.rglob("[a-z]*.py"))
    raise ValueError(
        f"--config={value}: no such file; accepted is a file, or configs/NAME.py with NAME of {', '.join(known)}"
    )


def _wrong_type(argv: Sequence[str], error: Exception) -> str:
    message = str(error)
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        parts = name.split(".")
        if f"--{name}=" in message and len(parts) == 3:
            return f"--{name}={value}: accepted is a value of type {GROUPS[parts[1]][parts[2]].type.__name__}"
    return f"--config: {_last_line(error)}"


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _meant(name: str, known: Any, shown: Callable[[str], str] = str) -> str:
    """The nearest name, and the second where it is near, too."""
    close = (
        difflib.get_close_matches(name, known, n=1)
        + difflib.get_close_matches(name, known, n=2, cutoff=0.75)[1:]
    )
    return f" (did you mean {' or '.join(map(shown, close))}?)" if close else ""


def _help(doc: str) -> str:
    width, lines = max(60, shutil.get_terminal_size().columns), []
    for name, meaning in meanings().items():
        group, field = name.split(".")
        lines.append(f"  --config.{name}={GROUPS[group][field].default!r}")
        lines += textwrap.wrap(meaning, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(
        [doc.strip(), "", "Fields and their library defaults (a config file may set others):", *lines]
    )


def meanings() -> dict[str, str]:
    """What each field means, by ``group.field``: the comments beside and above its declaration in `switchmoe.settings`."""
    found = {}
    for group in dataclasses.fields(Settings):
        source = inspect.getsource(group.type)
        comments = {
            token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for field in ast.parse(source).body[0].body:
            if not isinstance(field, ast.AnnAssign):
                continue
            first = field.lineno
            while comments.get(first - 1, ("", False))[1]:
                first -= 1
            parts = [comments[line][0] for line in range(first, field.end_lineno + 1) if line in comments]
            found[f"{group.name}.{field.target.id}"] = " ".join(parts)
    return found
