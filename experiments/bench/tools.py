"""What the benchmarks share: options, the machine's description, whether Hugging Face's cases can be measured."""

import argparse
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from switchmoe.analysis import timing
from switchmoe.runs.origin import commit

Rows = list[dict[str, Any]]
COLOURS = (
    "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#F0E442", "#CC79A7", "#8c6d31", "#999999", "#333333",
)  # fmt: skip
VERSIONS_OF = ("jax", "jaxlib", "flax", "torch", "transformers")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"experiments.bench: {message}; see --help\n")


def at_least(least: int):
    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: accepted is an integer >= {least}")
        return value

    return convert


def origin(argv: Sequence[str]) -> dict[str, str]:
    """What made a file of figures: the command without its --out, and the commit of its code ("" of an installed copy)."""
    given = [argument for argument in argv if not argument.startswith("--out=")]
    return {"command": shlex.join(["python", "-m", "experiments.bench", *given]), "commit": commit()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "processor": _processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_cases(make, *arguments: Any) -> dict[str, timing.Case]:
    """Hugging Face's cases, or none where torch and transformers aren't installed."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError:
        return {}
    torch.set_num_threads(cores())
    return make(*arguments)
