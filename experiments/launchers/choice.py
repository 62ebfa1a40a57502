"""The launcher that a sweep's command line asks for."""

import dataclasses
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.launchers.local import Local
from experiments.launchers.order import RETRIES, Options

OPTIONS = ("launcher", "address", "resources", "retries")


def read(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """(the launcher's options, the other arguments).

    Raises:
      ValueError: one line that names the option, its value and what would be accepted.
    """
    found: dict[str, str] = {}
    others: list[str] = []
    pending = ""
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if pending:
            found[pending], pending = argument, ""
        elif not argument.startswith("--") or not (name in OPTIONS or name.startswith("slurm.")):
            others.append(argument)
        elif equals:
            found[name] = value
        else:
            pending = name
    if pending:
        raise ValueError(f"--{pending}: accepted is --{pending}=VALUE")
    return _options(found), others


def _options(found: dict[str, str]) -> Options:
    name = found.get("launcher", "local")
    if name not in LAUNCHERS:
        raise ValueError(f"--launcher={name}: accepted are {', '.join(LAUNCHERS)}")
    for option, value in found.items():
        every = option in ("launcher", "resources")
        takes = tuple(LAUNCHERS) if every else ("slurm",) if "." in option else ("ray", "slurm")
        if name not in takes:
            others = " or ".join(f"--launcher={other}" for other in takes)
            raise ValueError(f"--{option}={value}: accepted is with {others}")
        if not value:
            raise ValueError(f"--{option}=: accepted is --{option}=VALUE")
    retries = found.get("retries", str(RETRIES))
    if not retries.isdecimal():
        raise ValueError(f"--retries={retries}: accepted is an integer >= 0")
    options = Options(name, found.get("address", "auto"), retries=int(retries))
    slurm = {key.partition(".")[2]: _typed(value) for key, value in found.items() if "." in key}
    resources = _resources(found["resources"]) if "resources" in found else {}
    default = {} if name == "local" else {"CPU": 1.0}
    return dataclasses.replace(options, resources=default | resources, slurm=slurm)


def _resources(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, amount = part.partition("=")
        if not (re.fullmatch(r"[\w.:-]+", name) and re.fullmatch(r"\d+(\.\d+)?", amount)) or name in found:
            raise ValueError(
                f"--resources={text}: accepted are NAME=AMOUNT of one run, with commas between, as CPU=2,GPU=1"
            )
        found[name] = float(amount)
    return found


def _typed(value: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isdecimal() else value


def create(options: Options, workdir: Path) -> Any:
    """The launcher, ready to start runs.

    Raises:
      ValueError: what it needs is not installed, not there, or does not take these options.
    """
    needed = NEEDS.get(options.launcher)
    if needed and importlib.util.find_spec(needed) is None:
        extra = f"pip install '.[{options.launcher}]'"
        raise ValueError(
            f"--launcher={options.launcher}: {needed} is not installed; accepted is after {extra}"
        )
    return LAUNCHERS[options.launcher](options, workdir)


def _ray(options: Options, _: Path) -> Any:
    from experiments.launchers.ray import Ray

    return Ray(options)


def _slurm(options: Options, workdir: Path) -> Any:
    from experiments.launchers.slurm import Slurm

    return Slurm(options, workdir)


NEEDS = {"ray": "ray", "slurm": "submitit"}
LAUNCHERS = {"local": lambda options, _: Local(options), "ray": _ray, "slurm": _slurm}
