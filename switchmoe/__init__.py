"""The Switch Transformer and the mixture-of-experts work around it, in JAX.

`PUBLIC` is what a program may rely on; it is loaded when it is first asked for, so that ``import switchmoe`` costs
nothing. The rooms below are its parts, the lowest first: each imports only from those before it.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

ROOMS = (
    "settings",
    "products",
    "quantised",
    "routing",
    "dispatch",
    "model",
    "data",
    "parallel",
    "training",
    "planning",
    "inference",
    "runs",
    "interop",
    "analysis",
)
PUBLIC = {  # a name: where it lives
    "Settings": "switchmoe.settings",
    "ModelSettings": "switchmoe.settings",
    "MoESettings": "switchmoe.settings",
    "DataSettings": "switchmoe.settings",
    "OptimizerSettings": "switchmoe.settings",
    "TrainSettings": "switchmoe.settings",
    "MeshSettings": "switchmoe.settings",
    "CheckpointSettings": "switchmoe.settings",
    "from_config": "switchmoe.settings",
    "to_dict": "switchmoe.settings",
    "ROUTERS": "switchmoe.routing",
    "Routing": "switchmoe.routing",
    "expert_capacity": "switchmoe.routing",
    "DISPATCHERS": "switchmoe.dispatch.dispatchers",
    "FeedForward": "switchmoe.model.layers",
    "MoELayer": "switchmoe.model.moe",
    "Transformer": "switchmoe.model.transformer",
    "Generator": "switchmoe.inference.generation",
    "LAYOUTS": "switchmoe.parallel.sharding",
}

__all__ = [*PUBLIC, *ROOMS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    if name in ROOMS:
        return importlib.import_module(f"switchmoe.{name}")
    raise AttributeError(f"module 'switchmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
