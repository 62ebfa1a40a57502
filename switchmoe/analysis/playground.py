"""A group of real text through every router and back end: who goes where, what is dropped, what the losses say.

The layer is `model.moe.MoELayer` as it trains; nothing here routes by itself.

Letters: S tokens of the group, D model, E experts, K choices per token, C slots of an expert.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchmoe.analysis import plots
from switchmoe.analysis.sweep_plots import COLOURS
from switchmoe.data import batches, sources
from switchmoe.data.vocabulary import BLANK, load_vocabulary
from switchmoe.dispatch.dispatchers import DISPATCHERS
from switchmoe.model.moe import MoELayer
from switchmoe.model.moe_rules import check
from switchmoe.routing import ROUTERS, Routing
from switchmoe.runs import trained
from switchmoe.settings import DataSettings, ModelSettings, MoESettings

TWO = ("top_k", "noisy_top_k")  # routers that are shown with two choices
FIGURES = {
    "fraction_dropped": "choices dropped",
    "balance_loss": "balance loss, without its weight",
    "z_loss": "z-loss, without its weight",
    "loss": "sum of the weighted losses",
}
EMPTY, DROPPED = "#eeeeee", plots.ORANGE
STYLES = ("-", "--")


class Group(NamedTuple):
    pieces: tuple[str, ...]  # what its S tokens are written as
    ids_S: np.ndarray
    mask_S: np.ndarray
    x_SD: jax.Array  # what the layer reads: the tokens' embeddings, of mean square 1


class Routed(NamedTuple):
    y_SD: jax.Array
    aux: dict[str, jax.Array]
    routing: Routing  # of a single group


def text(run: str = "", sequences: int = 2, width: int = 64, length: int = 24) -> Group:
    """The first held-out sequences of the embedded corpus.

    Args:
      run: a run's directory, whose vocabulary, embedding and lengths are taken; "": of the quickstart's vocabulary size,
        and embeddings drawn at random.

    Raises:
      ValueError: no such run, or one without a vocabulary.
    """
    data = DataSettings(batch_size=sequences, input_length=length, vocab_size=1948)
    if run:
        source = trained.find(run)
        if source.vocabulary is None:
            raise ValueError(f"--source={run}: it has no vocabulary; accepted is a run's directory")
        data = dataclasses.replace(source.settings.data, batch_size=sequences, streams=0)
        vocabulary, documents = source.vocabulary, sources.load_splits(data)
        embedding_VD = trained.on_one_device(source, source.settings)["embedding"]
    else:
        documents = sources.load_splits(data)
        vocabulary = load_vocabulary(data, documents["train"])
        embedding_VD = jax.random.normal(jax.random.key(0), (vocabulary.size, width))
    batch = batches.eval_batches(data, vocabulary, documents["validation"], 1)[0]
    ids_S = batch["inputs" if "inputs" in batch else "targets"].reshape(-1)
    x_SD = jnp.asarray(embedding_VD, jnp.float32)[ids_S]
    x_SD /= jnp.sqrt(jnp.square(x_SD).mean(axis=-1, keepdims=True) + 1e-6)
    words = [
        vocabulary.piece(int(token)) if token < vocabulary.pieces else vocabulary.decode([int(token)])
        for token in ids_S
    ]
    return Group(tuple(word.replace(" ", BLANK) for word in words), ids_S, ids_S != vocabulary.pad_id, x_SD)


def of(router: str, moe: MoESettings, tokens: int) -> MoESettings:
    """The settings with this router, and with the choices or the slots that it asks for."""
    slots = max(1, tokens // moe.num_experts)
    return dataclasses.replace(moe, router=router, choices=1 + (router in TWO), slots=slots)


def routed(group: Group, moe: MoESettings, seed: int = 0) -> Routed:
    """The layer's output in training, its figures, and the routing that it made."""
    layer, given = _layer(group, moe)
    variables = layer.init({"params": jax.random.key(0), "router": jax.random.key(seed)}, *given)
    (y_GSD, aux), kept = layer.apply(
        variables,
        *given,
        rngs={"router": jax.random.key(seed)},
        mutable="intermediates",
        capture_intermediates=lambda _, method: method == "_route",
    )
    return Routed(y_GSD[0], aux, kept["intermediates"]["_route"][0])


def through(group: Group, moe: MoESettings, seed: int = 0) -> dict[str, Routed]:
    """`routed` by each router."""
    return {name: routed(group, of(name, moe, len(group.ids_S)), seed) for name in ROUTERS}


def back_ends(group: Group, moe: MoESettings) -> dict[str, Routed]:
    """`routed` with each back end that can hold the router's routing."""
    found = {}
    for name in DISPATCHERS:
        one = dataclasses.replace(moe, dispatch=name)
        try:
            check(one, causal=False)
        except ValueError:
            continue
        found[name] = routed(group, one)
    return found


def compared(group: Group, moe: MoESettings) -> list[dict[str, Any]]:
    """Of each router the rows that each back end moves, "-" where it can't, and how far their outputs are apart."""
    lines = []
    for router in ROUTERS:
        found = back_ends(group, of(router, moe, len(group.ids_S)))
        first = next(iter(found.values())).y_SD
        apart = max(float(jnp.abs(one.y_SD - first).max()) for one in found.values())
        rows = {name: len(rows_of(name, one.routing)) if name in found else "-" for name, one in _all(found)}
        lines.append({"router": router} | rows | {"largest difference of outputs": f"{apart:.1e}"})
    return lines


def rows_of(back_end: str, routing: Routing) -> np.ndarray:
    """The token that lies in each row that goes to the experts, in their order; -1 where a row is empty."""
    tokens = routing.gate_SK.shape[1]
    numbers_GSD = jnp.arange(1.0, tokens + 1)[None, :, None]
    return np.asarray(DISPATCHERS[back_end](routing).dispatch(numbers_GSD)).reshape(-1).astype(int) - 1


def reactions(
    group: Group,
    moe: MoESettings,
    field: str,
    values: Sequence[float],
    routers: Iterable[str] = tuple(ROUTERS),
) -> dict[str, dict[str, list[float]]]:
    """Of each router the figures of `FIGURES` at each value of a field of `moe`."""
    found: dict[str, dict[str, list[float]]] = {}
    for router in routers:
        settings = of(router, moe, len(group.ids_S))
        each = [routed(group, dataclasses.replace(settings, **{field: value})).aux for value in values]
        found[router] = {name: [float(aux[name]) for aux in each] for name in FIGURES}
    return found


def alone(group: Group, moe: MoESettings, steps: int = 100, rate: float = 1.0) -> dict[str, list[float]]:
    """`FIGURES` over steps of gradient descent on the layer's own losses, without any other."""
    layer, given = _layer(group, moe)

    def loss(variables: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        aux = layer.apply(variables, *given, rngs={"router": key})[1]
        return aux["loss"], aux

    @jax.jit
    def step(variables: Any, key: jax.Array) -> tuple[Any, dict]:
        slopes, aux = jax.grad(loss, has_aux=True)(variables, key)
        return jax.tree.map(lambda value, slope: value - rate * slope, variables, slopes), aux

    key = jax.random.key(0)
    variables = layer.init({"params": key, "router": key}, *given)
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    for number in range(steps):
        variables, aux = step(variables, jax.random.fold_in(key, number))
        for name, values in found.items():
            values.append(float(aux[name]))
    return found


@plots.own_style
def who_goes_where(group: Group, found: Mapping[str, Routed]) -> Figure:
    """A panel for each router: tokens across, experts down; the darker, the larger the gate. A cross: dropped there."""
    figure = Figure(figsize=(13, 1.1 + 1.55 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, one) in zip(panels, found.items(), strict=True):
        image = _gates(axes, group, one.routing)
        load_E = np.asarray(one.aux["expert_load"])
        told = [
            f"dropped {float(one.aux['fraction_dropped']):.0%}",
            f"busiest {load_E.max() * len(load_E):.1f}",
        ]
        told += [f"{loss} {float(value[0]):.2f}" for loss, value in one.routing.losses.items()]
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
        axes.set_title("   ".join(told), loc="right", fontsize=9)
        axes.set_ylabel("expert")
    panels[-1].set_xticks(range(len(group.pieces)), group.pieces, rotation=90, fontsize=8)
    figure.colorbar(image, ax=panels, label="gate", aspect=60, pad=0.01)
    return figure


@plots.own_style
def where_rows_lie(group: Group, found: Mapping[str, Routed]) -> Figure:
    """A panel for each back end of one routing: the rows that it hands to the experts, with their tokens; grey is empty."""
    figure = Figure(figsize=(13, 4.2 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (name, one) in zip(panels, found.items(), strict=True):
        routing, rows_N = one.routing, rows_of(name, one.routing)
        capacity, experts = routing.capacity, routing.num_experts
        if len(rows_N) == capacity * experts and name != "ragged":
            expert_N = np.repeat(np.arange(experts), capacity)
        else:
            kept_SK = np.asarray(routing.kept_SK[0])
            expert_N = np.sort(np.asarray(routing.expert_SK[0])[kept_SK])
            expert_N = np.pad(expert_N, (0, len(rows_N) - len(expert_N)), constant_values=-1)
        _rows(axes, group, rows_N, expert_N, capacity, experts)
        filled = int((rows_N >= 0).sum())
        axes.set_title(f"{name}: {len(rows_N)} rows, {filled} of them filled", loc="left", fontsize=10)
    return figure


@plots.own_style
def curves(field: str, values: Sequence[float], found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """`reactions` or `alone` as lines: a panel for each figure, a line for each of ``found``."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (name, label) in zip(panels.flat, FIGURES.items(), strict=True):
        for number, (line, figures) in enumerate(found.items()):
            style = STYLES[number // len(COLOURS) % len(STYLES)]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(values, figures[name], style, color=colour, linewidth=1.5, label=line)
        axes.set_title(label, loc="left", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel(field)
    lines = panels[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _layer(group: Group, moe: MoESettings) -> tuple[MoELayer, tuple]:
    model = ModelSettings(
        d_model=group.x_SD.shape[-1], d_ff=32, num_heads=1, activation="relu", dtype="float32"
    )
    return MoELayer(model, moe, train=True), (group.x_SD[None], group.mask_S[None], group.ids_S[None])


def _all(found: Mapping[str, Routed]) -> list[tuple[str, Routed | None]]:
    return [(name, found.get(name)) for name in DISPATCHERS]


def _gates(axes: Axes, group: Group, routing: Routing) -> Any:
    expert_SK, gate_SK, kept_SK = (
        np.asarray(value[0]) for value in (routing.expert_SK, routing.gate_SK, routing.kept_SK)
    )
    tokens, choices = expert_SK.shape
    gate_ES = np.zeros((routing.num_experts, tokens))
    np.add.at(gate_ES, (expert_SK, np.arange(tokens)[:, None]), gate_SK)
    image = axes.imshow(gate_ES, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    lost_SK = ~kept_SK & group.mask_S[:, None]
    if choices == routing.num_experts:  # experts chose: lost is who was not taken by any
        best_S = np.asarray(routing.prob_SE[0]).argmax(axis=-1)
        lost_SK = (expert_SK == best_S[:, None]) & ~kept_SK.any(axis=1, keepdims=True) & group.mask_S[:, None]
    at_S, choice_K = np.nonzero(lost_SK)
    axes.plot(at_S, expert_SK[at_S, choice_K], "x", color=DROPPED, markersize=6, markeredgewidth=1.8)
    axes.set_yticks(range(routing.num_experts), minor=True)
    axes.grid(which="minor", axis="y", alpha=0.25)
    return image


def _rows(
    axes: Axes, group: Group, rows_N: np.ndarray, expert_N: np.ndarray, capacity: int, experts: int
) -> None:
    """Rows in lines of an expert's slots each, or of so many as fit where they have no slots."""
    place_N = np.zeros(len(rows_N), int)
    for expert in range(-1, experts):
        mine = expert_N == expert
        place_N[mine] = np.arange(mine.sum())
    line_N = np.where(expert_N < 0, experts, expert_N)
    for row, line, place in zip(rows_N, line_N, place_N, strict=True):
        colour = EMPTY if row < 0 else COLOURS[line % len(COLOURS)]
        axes.barh(line, 0.92, left=place - 0.46, height=0.86, color=colour, alpha=0.5 if row >= 0 else 1)
        if row >= 0:
            axes.text(place, line, group.pieces[row], ha="center", va="center", fontsize=7)
    axes.set_ylim(line_N.max() + 0.6, -0.6)
    axes.set_xlim(-0.6, max(place_N.max() + 0.6, capacity - 0.4))
    left_over = ["left over"] if line_N.max() == experts else []
    axes.set_yticks(range(experts + len(left_over)), [*map(str, range(experts)), *left_over])
    axes.set_ylabel("expert")
    axes.set_xlabel("row of the expert")
    axes.spines[["top", "right"]].set_visible(False)
