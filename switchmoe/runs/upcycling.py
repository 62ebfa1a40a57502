"""Dense models made sparse: each expert begins as a copy of the feed-forward it replaces (Komatsuzaki et al. 2022, 2212.05055).

What becomes of one is a `Plan`, which makes the sparse model's state part by part: a layer of an array at a time.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from switchmoe.parallel.sharding import path_keys
from switchmoe.settings import Settings, from_config, to_dict
from switchmoe.training import places, train_state

Index = tuple[int, ...]  # a layer of an array, or all of it: ()
Made = tuple[str, Index, Callable[[], np.ndarray]]  # an array's name, the part of it, what makes that


class Saved(NamedTuple):
    """The dense model's state, by names such as params/embedding. Both raise ValueError where there is no such array."""

    shape: Callable[[str], tuple[int, ...]]
    read: Callable[[str, Index], np.ndarray]


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
      ValueError: a model that is sparse or is to have experts in its attention, or blocks that ``every`` does not divide.
    """
    if dense.sparse:
        raise ValueError(f"--source: it has {dense.moe.num_experts} experts; accepted is a dense model")
    if dense.moe.attention:
        raise ValueError("--source: moe.attention=True: accepted to upcycle is False")
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


class Plan:
    """The sparse model's state, each part of it made from the dense one's."""

    def __init__(self, dense: Settings, settings: Settings, how: Upcycling, saved: Saved):
        self._settings, self._how, self._saved = settings, how, saved
        self.shapes = places.names(settings)
        self._origins = {name: _dense_name(dense, settings, name) for name in self.shapes}

    def like(self, dtype: str) -> Any:
        """The shapes of the parameters, of this type."""
        shapes = train_state.parameter_shapes(self._settings)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)

    def parts(self, name: str) -> list[Index]:
        """Of a parameter: its layers, or all of it."""
        return [index for _, _, index in places.places(self._settings, name)]

    def part(self, name: str, index: Index) -> np.ndarray:
        """Of a parameter, float32; of an expert's kernel a layer's experts."""
        origin, _ = self._origins[name]
        shape, how = self.shapes[name][len(index) :], self._how
        if not origin:
            drawn = self._random(name, index).standard_normal(shape, np.float32)
            return np.float32(self._settings.moe.router_init_stddev) * drawn
        part = self._copied(f"params/{origin}", name, index).astype(np.float32, copy=False)
        if _of_experts(name) and (how.noise or how.reinit):
            part = self._differ(name, index, part, shape)
        return np.broadcast_to(part, shape)

    def _copied(self, saved: str, name: str, index: Index) -> np.ndarray:
        """The dense model's; of an expert's with an axis for the experts."""
        _, layers = self._origins.get(name, (name, None))
        there = index if layers is None else (layers[index[0] if index else 0],)
        part = self._saved.read(saved, there)
        return part[None] if _of_experts(name) else part

    def _random(self, name: str, index: Index) -> np.random.Generator:
        return np.random.default_rng([self._settings.train.seed, zlib.crc32(name.encode()), *index])

    def _differ(self, name: str, index: Index, part: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Noise, and parts drawn anew: of one expert the same places of its width in all its kernels."""
        layer, _, kernel = name.rpartition("/")
        width = shape[1 if kernel == "wo" else 2]
        count, rng, spread = round(self._how.reinit * width), self._random(name, index), part.std()
        mean = part.mean()
        if count:
            drawn = self._random(layer, index).random((shape[0], width)).argsort(axis=-1) < count
            anew = drawn[..., None] if kernel == "wo" else drawn[:, None]
            part = np.where(anew, mean + spread * rng.standard_normal(shape, np.float32), part)
        if self._how.noise:
            part = part + np.float32(self._how.noise) * spread * rng.standard_normal(shape, np.float32)
        return part

    def optimizer(self) -> tuple[Any, list[Made]]:
        """(the shapes of the optimizer's state, its parts): each expert's a copy of the feed-forward's; a router's is a first one.

        Raises:
          ValueError: the source has none, or another optimizer's.
        """
        like = jax.eval_shape(self._fresh, train_state.parameter_shapes(self._settings))
        found: list[Made] = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(like):
            keys = "/".join(path_keys(path))
            name = self._named(keys)
            origin, layers = self._origins.get(name, (keys, None))
            if name and not origin:
                found.append((f"opt_state/{keys}", (), lambda keys=keys: self._first[keys]))
                continue
            saved = f"opt_state/{keys.replace(name, origin, 1) if name else keys}"
            skipped = (layers is not None) + _of_experts(name)
            there = self._saved.shape(saved)
            if there[layers is not None :] != leaf.shape[skipped:]:
                raise ValueError(f"{saved}: shape {there}, expected one that gives {leaf.shape}")
            for index in self.parts(name) if name else [()]:
                make = functools.partial(self._state, leaf, saved, name, index)
                found.append((f"opt_state/{keys}", index, make))
        return like, found

    def _state(self, leaf: Any, saved: str, name: str, index: Index) -> np.ndarray:
        part = self._copied(saved, name, index).astype(leaf.dtype, copy=False)
        return np.broadcast_to(part, leaf.shape[len(index) :])

    def _fresh(self, params: Any) -> Any:
        """The state of an optimizer that has seen nothing."""
        return train_state.optimizer(self._settings).init(train_state.split(params, self._settings)[0])

    def _named(self, keys: str) -> str:
        """Whose leaf it is: a parameter's name; "" of none."""
        return max((name for name in self.shapes if f"/{name}/" in f"/{keys}/"), key=len, default="")

    @functools.cached_property
    def _first(self) -> dict[str, np.ndarray]:
        """The routers' leaves of it. The other parameters are zeros in a program that needs none of them."""
        shapes = flatten_dict(train_state.parameter_shapes(self._settings), sep="/")
        routers = {name: self._whole(name) for name, (origin, _) in self._origins.items() if not origin}

        def leaves(routers: dict[str, jax.Array]) -> dict[str, jax.Array]:
            given = {n: routers.get(n, jnp.zeros(leaf.shape, leaf.dtype)) for n, leaf in shapes.items()}
            found = jax.tree_util.tree_leaves_with_path(self._fresh(unflatten_dict(given, sep="/")))
            named = {"/".join(path_keys(path)): leaf for path, leaf in found}
            return {keys: leaf for keys, leaf in named.items() if self._named(keys) in routers}

        return jax.device_get(jax.jit(leaves)(routers))

    def _whole(self, name: str) -> np.ndarray:
        return _joined([self.part(name, index) for index in self.parts(name)], self.shapes[name])

    def parameters(self) -> Any:
        """All of them, in memory."""
        return unflatten_dict({name: self._whole(name) for name in self.shapes}, sep="/")

    def optimizer_state(self) -> Any:
        """All of it, in memory. Raises ValueError: as `optimizer`."""
        like, parts = self.optimizer()
        found: dict[str, list[np.ndarray]] = {}
        for name, _, make in parts:
            found.setdefault(name, []).append(make())

        def one(path: tuple, leaf: Any) -> np.ndarray:
            return _joined(found["opt_state/" + "/".join(path_keys(path))], leaf.shape)

        return jax.tree_util.tree_map_with_path(one, like)


def _of_experts(name: str) -> bool:
    return "experts" in name.split("/")


def _joined(parts: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    return parts[0] if parts[0].shape == shape else np.stack(parts)
