"""What the commands that read a trace share."""

from collections.abc import Sequence
from pathlib import Path

from experiments import command_line
from experiments.analyze import routing

PLACE = "a trace's directory or a server's .npz or .npy"


def values(arguments: Sequence[str], defaults: dict[str, str], needed: dict[str, str]) -> dict[str, str]:
    """Values of ``--NAME=VALUE`` by name.

    Args:
      needed: names that must be given, and what is accepted.

    Raises:
      ValueError: another argument, no value, or without one that is needed.
    """
    found, others = command_line.options(arguments, list(defaults))
    wrong = others + [f"--{name}=" for name in defaults if f"--{name}=" in arguments]
    if wrong:
        raise ValueError(
            f"argument {wrong[0]}: accepted are {', '.join(f'--{name}=VALUE' for name in defaults)}"
        )
    for name, accepted in needed.items():
        if not found[name]:
            raise ValueError(f"no {name}; accepted is --{name}=, {accepted}")
    return {name: value or defaults[name] for name, value in found.items()}


def whole(name: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ValueError(f"--{name}={text}: accepted is an integer >= {least}")
    return int(text)


def beside(place: Path) -> Path:
    """Where results of a trace go by default."""
    return (place.with_suffix("") if place.suffix in (".npz", ".npy") else place) / "offload"


def trace(place: Path, out: Path) -> Path:
    """The trace's directory; of arrays that a server gave, one that is made in ``out``, once for each file as it is then.

    Raises:
      ValueError: it can't be read, or ``out`` has a trace of its own.
    """
    from switchmoe.analysis.routing import arrays, traces

    if place.suffix not in arrays.SUFFIXES:
        traces.read_info(place)
        return place
    return routing.of_arrays(place, out / "trace")
