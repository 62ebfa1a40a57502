"""A model whose experts are on disk: settings and parameters that `generation.Generator` and `serving.programs.Programs` take."""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np

from switchmoe.dispatch.dispatchers import DECODING
from switchmoe.inference import decoding
from switchmoe.inference.offload.cache import POLICIES
from switchmoe.inference.offload.layout import FORMS, Layer, numpy_type
from switchmoe.inference.offload.memory import available
from switchmoe.inference.offload.predict import Table
from switchmoe.inference.offload.runtime import PATIENCE, Pager, in_memory
from switchmoe.inference.offload.shelf import Shelf
from switchmoe.inference.offload.store import Store
from switchmoe.model.moe import ON_DISK
from switchmoe.model.moe_rules import router_columns, router_name
from switchmoe.model.transformer import sparse_layer_names
from switchmoe.settings import Settings

ROUTER = "router"  # as a predictor: the next layer's


@dataclasses.dataclass(frozen=True)
class Paging:
    """How much of the experts is in memory, and which."""

    budget: int  # bytes
    policy: str = "lfru"  # one of cache.POLICIES
    predictor: str = "none"  # none | router | a file of `predict.Table`
    patience: float = PATIENCE  # seconds that a layer waits for the disk

    def __post_init__(self) -> None:
        if not available():
            raise ValueError(f"--expert_memory={self.budget}: accepted on Linux; here is {sys.platform}")
        if self.budget < 1:
            raise ValueError(
                f"--expert_memory={self.budget}: accepted is a size such as 512MiB, 2GB or bytes"
            )
        if self.policy not in POLICIES:
            raise ValueError(f"--expert_policy={self.policy}: accepted is one of {', '.join(POLICIES)}")


def is_apart(settings: Settings) -> bool:
    """Whether a program of decoding has an array for each expert, its kernels turned; on a CPU."""
    empty = {stack: {"blocks": {}} for stack in settings.stacks}
    return decoding.as_computed(decoding.prepared(settings, empty)[0]).moe.dispatch == DECODING


def paged(settings: Settings, params: Any, store: Store, how: Paging) -> tuple[Settings, Any, Pager]:
    """(settings, parameters, what brings experts in), the parameters with a `Shelf` in each sparse layer.

    Args:
      params: as they were trained, without the experts'.

    Raises:
      ValueError: not on a CPU, a store or a table of another model, a predictor that the router can't be, a budget too
        small for any step; one line.
      OSError: a table that can't be read.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(f"--expert_memory={how.budget}: accepted on a CPU; here is {jax.default_backend()}")
    names = sparse_layer_names(settings)
    of_store = [layer.name for layer in store.layers]
    if of_store != names:
        raise ValueError(f"{store.directory}: it has the layers {of_store}; accepted is a store of {names}")
    forms = {form for layer in store.layers for form in layer.forms}
    integers = {form for form in forms if FORMS[form]}
    if integers and not settings.moe.expert_bits:  # so that products are those of a model of integers
        settings = dataclasses.replace(settings, moe=dataclasses.replace(settings.moe, expert_bits=8))
    prepared, _ = decoding.prepared(settings, params)
    computed = decoding.as_computed(prepared)
    layers = in_memory(store.layers, computed.model.dtype, computed.moe.dispatch == DECODING)
    table = None
    if how.predictor not in ("none", ROUTER):
        table = Table.load(how.predictor, len(names), settings.moe.total_experts)
    pager = Pager(store, layers, settings.model.dtype, how.budget, how.policy, table, how.patience)
    pager.holds(settings.moe.total_choices)
    return *shelved(settings, params, pager, layers, how.predictor == ROUTER), pager


def shelved(
    settings: Settings, params: Any, pager: Any, layers: list[Layer], by_router: bool = False
) -> tuple[Settings, Any]:
    """(settings, parameters) with a `Shelf` in each sparse layer, of which ``pager`` has the memory."""
    names, apart = sparse_layer_names(settings), is_apart(settings)
    settings, params = decoding.prepared(settings, params)
    places = [_place(settings, name) for name in names]
    routers = _next_routers(settings, params, names, places) if by_router else [None] * len(names)
    for number, (layer, place, router_DE) in enumerate(zip(layers, places, routers, strict=True)):
        memory = _arrays(pager.memory.array(number), layer, apart)
        params = _with(params, place, Shelf(memory, router_DE, number, layer, apart, pager, pager.fits))
    return settings, params


def _place(settings: Settings, name: str) -> tuple[str, ...]:
    """Where a sparse layer's parameters are, without the scan."""
    stack, number, *attention = name.split("/")
    block, at = divmod(int(number) - settings.first(stack), settings.period(stack))
    return stack, f"blocks_{block}", f"block_{at}", "self_moe" if attention else "moe"


def _at(params: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        params = params.get(key, {})
    return params


def _with(params: Any, place: tuple[str, ...], shelf: Shelf) -> Any:
    if not place:
        return {name: part for name, part in params.items() if name != "experts"} | {ON_DISK: shelf}
    first, *rest = place
    return dict(params) | {first: _with(params.get(first, {}), tuple(rest), shelf)}


def _next_routers(
    settings: Settings, params: Any, names: list[str], places: list[tuple[str, ...]]
) -> list[Any]:
    """Of each layer the kernel of the next one's router; None where that is another stack's, or where there is none."""
    for stack in settings.sparse_stacks:
        name = router_name(settings.moe, stack == "decoder")
        if router_columns(settings.moe, name) != settings.moe.total_experts:
            raise ValueError(
                f"--predictor={ROUTER}: accepted with a router that has a column for each expert; {name} is none of these"
            )
    found: list[Any] = []
    for number, name in enumerate(names):
        following = number + 1
        same = following < len(names) and names[following].split("/")[0] == name.split("/")[0]
        found.append(_at(params, places[following])["router"] if same else None)
    return found


def _arrays(raw: np.ndarray, layer: Layer, apart: bool) -> Any:
    """A layer's memory as arrays that are not copies."""
    alias = lambda array: jax.device_put(array, may_alias=True)  # noqa: E731
    if not apart:
        types = {part.dtype for record in layer.records.values() for part in record.parts}
        return {name: alias(raw.view(numpy_type(name))) for name in sorted(types)}
    return {
        name: tuple(alias(layer.record(e).part(name).of(raw[e])) for e in range(len(layer.forms)))
        for name, _ in layer.kernels
    }
