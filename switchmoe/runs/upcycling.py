"""Dense models made sparse: each expert begins as a copy of the feed-forward it replaces (Komatsuzaki et al. 2022, 2212.05055).

All of the sparse model's state is in memory.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from switchmoe.parallel.sharding import path_keys
from switchmoe.settings import Settings, from_config, to_dict
from switchmoe.training import places, train_state

Read = Callable[[str], np.ndarray]  # of the dense model's state, by names such as params/embedding

ROUTERS = ("switch", "top_k", "expert_choice")


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """What becomes of a dense model.

    ``noise`` is added to each copy, a share of its kernel's own standard deviation. ``reinit`` is the share of each expert's
    width that is drawn anew, normal with the kernel's mean and standard deviation (drop-upcycling, Nakamura et al. 2025,
    2502.19261).
    """

    experts: int
    every: int = 2
    router: str = "switch"
    noise: float = 0.0
    reinit: float = 0.0
    optimizer: bool = True

    def __post_init__(self) -> None:
        def refuse(field: str, accepted: str) -> None:
            raise ValueError(f"--upcycle.{field}={getattr(self, field)}: accepted is {accepted}")

        if self.experts < 2:
            refuse("experts", "an integer >= 2")
        if self.every < 1:
            refuse("every", "an integer >= 1")
        if self.router not in ROUTERS:
            refuse("router", f"one of {', '.join(ROUTERS)}")
        if not 0 <= self.noise < math.inf:
            refuse("noise", "a number >= 0")
        if not 0 <= self.reinit <= 1:
            refuse("reinit", "a number from 0 to 1")


def settings_of(dense: Settings, how: Upcycling) -> Settings:
    """The sparse model's. Gates of a token sum to 1 in value, so that copies give what the feed-forward gave.

    Raises:
      ValueError: a model that is sparse, or blocks that ``every`` does not divide.
    """
    if dense.sparse:
        raise ValueError(f"--source: it has {dense.moe.num_experts} experts; accepted is a dense model")
    decoders = "encoder" not in dense.stacks
    if how.router == "expert_choice" and decoders:
        raise ValueError(
            "--upcycle.router=expert_choice: accepted in a decoder alone, which is causal, is switch or top_k"
        )
    groups = to_dict(dense)
    groups["moe"] |= {
        "num_experts": how.experts,
        "every": how.every,
        "offset": -1,
        "router": how.router,
        "unit_gates": True,
        "choices": 2 if how.router == "top_k" else 1,
        "decoder_every": -1,
        "dense_first": 0,
        "d_ff": 0,
        "decoder_router": "switch" if how.router == "expert_choice" else "",
        "granularity": 1,
        "num_shared": 0,
    }
    groups["init"] = to_dict(Settings())["init"]
    groups["train"]["trainable"] = ""
    try:
        return from_config(groups)
    except ValueError as error:
        raise ValueError(f"--upcycle: as settings of a run: {error}") from error


def _dense_name(dense: Settings, settings: Settings, name: str) -> tuple[str, list[int] | None]:
    """(the dense parameter that a sparse model's is made from, of which layers); "": a new one."""
    found = list(places.places(settings, name))
    key, number, _ = found[0]
    if number is None:
        return name, None
    stack, _, rest = key.partition("/")
    if rest.startswith("moe/"):
        if not rest.startswith("moe/experts/"):
            return "", None
        rest = "ff/" + rest.removeprefix("moe/experts/")
    if not dense.model.scan:
        raise ValueError("model.scan=False: accepted to upcycle is a run with model.scan=True")
    return f"{stack}/blocks/block_0/{rest}", [n for _, n, _ in found]


def check(dense: Settings, settings: Settings, saved: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError: ``dense`` is sparse, or its parameters (shapes by name) are not those that the copies need."""
    if dense.sparse:
        raise ValueError(f"it has {dense.moe.num_experts} experts")
    for name, shape in places.names(settings).items():
        origin, layers = _dense_name(dense, settings, name)
        if not origin:
            continue
        skipped = (layers is not None) + ("experts" in name.split("/"))
        there = saved.get(origin, ())
        if there[layers is not None :] != shape[skipped:]:
            raise ValueError(f"{origin} has shape {there or 'none'} there, and {name} {shape} here")


def parameters(dense: Settings, settings: Settings, how: Upcycling, read: Read) -> Any:
    """The sparse model's parameters, float32."""
    rng, found = np.random.default_rng(settings.train.seed), {}
    for name, shape in places.names(settings).items():
        origin, layers = _dense_name(dense, settings, name)
        if not origin:
            found[name] = rng.normal(0.0, settings.moe.router_init_stddev, shape).astype(np.float32)
            continue
        whole = read(f"params/{origin}").astype(np.float32)
        found[name] = whole if layers is None else whole[layers]
        if "experts" in name.split("/"):
            found[name] = np.repeat(found[name][:, None], how.experts, axis=1)
    _differ(found, how, rng)
    return unflatten_dict(found, sep="/")


def _differ(found: dict[str, np.ndarray], how: Upcycling, rng: np.random.Generator) -> None:
    """Noise, and parts drawn anew: of one expert the same places of its width in all its kernels."""
    layers = {name.rpartition("/")[0] for name in found if "experts" in name.split("/")}
    for layer in sorted(layers):
        kernels = {name: found[name] for name in found if name.rpartition("/")[0] == layer}
        wo = kernels[f"{layer}/wo"]
        count = round(how.reinit * wo.shape[2])
        drawn = rng.random(wo.shape[:3]).argsort(axis=-1) < count  # [layers, experts, width]
        for name, kernel in kernels.items():
            spread = kernel.std(axis=(2, 3), keepdims=True)
            new = rng.standard_normal(kernel.shape, np.float32) if how.noise or how.reinit else None
            if how.reinit:
                anew = drawn[..., None] if name.endswith("/wo") else drawn[..., None, :]
                kernel = np.where(anew, kernel.mean(axis=(2, 3), keepdims=True) + spread * new, kernel)
            if how.noise:
                kernel = kernel + how.noise * spread * rng.standard_normal(kernel.shape, np.float32)
            found[name] = kernel.astype(np.float32)


def optimizer_state(dense: Settings, settings: Settings, params: Any, read: Read) -> Any | None:
    """The optimizer's state of the sparse model, each expert's a copy of the feed-forward's; the router's is a first one.

    None where the source has none, or another optimizer's.
    """
    fresh = jax.device_get(train_state.optimizer(settings).init(train_state.split(params, settings)[0]))
    names = {name: _dense_name(dense, settings, name) for name in flatten_dict(params, sep="/")}

    def one(path: tuple, leaf: np.ndarray) -> np.ndarray:
        keys = "/".join(path_keys(path))
        name = max((name for name in names if f"/{name}/" in f"/{keys}/"), key=len, default="")
        origin, layers = names.get(name, (keys, None))
        if name and not origin:
            return leaf
        there = read("opt_state/" + (keys.replace(name, origin, 1) if name else keys))
        there = there if layers is None else there[layers]
        if "experts" in name.split("/"):
            there = np.repeat(there[:, None], leaf.shape[1], axis=1)
        if there.shape != leaf.shape:
            raise ValueError(f"opt_state {keys}: shape {there.shape}, expected {leaf.shape}")
        return there.astype(leaf.dtype)

    try:
        return jax.tree_util.tree_map_with_path(one, fresh)
    except ValueError:
        return None
