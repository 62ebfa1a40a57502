"""``--expert_memory=SIZE`` and what goes with it, of experiments.generate and experiments.serve: experts on disk (docs/offload.md)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments import command_line
from switchmoe.inference.offload import WAYS
from switchmoe.inference.offload.cache import POLICIES

OPTIONS = {"expert_memory": "", "predictor": "none", "expert_policy": "lfru", "expert_reads": "direct"}


def checked(given: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """(bytes, 0: all experts in memory; the other options).

    Raises:
      ValueError: a value that is not accepted, or one of the others without a size; one line.
    """
    found = {name: given.get(name) or default for name, default in OPTIONS.items()}
    text = found.pop("expert_memory")
    if not text:
        for name, value in found.items():
            if value != OPTIONS[name]:
                raise ValueError(f"--{name}={value}: accepted with --expert_memory=SIZE")
        return 0, found
    try:
        budget = command_line.size(text)
    except ValueError:
        budget = 0
    if not budget:
        raise ValueError(f"--expert_memory={text}: accepted is a size such as 512MiB, 2GB or bytes")
    for name, known in (("expert_policy", POLICIES), ("expert_reads", WAYS)):
        if found[name] not in known:
            raise ValueError(f"--{name}={found[name]}: accepted is one of {', '.join(known)}")
    if found["predictor"] not in ("none", "router") and not Path(found["predictor"]).is_file():
        raise ValueError(
            f"--predictor={found['predictor']}: accepted is none, router, or a file that experiments.offload predict wrote"
        )
    return budget, found


def opened(
    model: Any, settings: Any, budget: int, found: Mapping[str, str], note: Callable[[str], None]
) -> Any:
    """(settings, parameters, `Pager`) of a run whose experts stay on disk. Raises ValueError or OSError, one line."""
    from switchmoe.data import progress
    from switchmoe.inference.offload.model import Paging
    from switchmoe.interop import expert_store

    how = Paging(budget, found["expert_policy"], found["predictor"])
    told = lambda state: progress.told(note, "writing the experts' files", state)  # noqa: E731
    return expert_store.opened(model, settings, how, found["expert_reads"], told)
