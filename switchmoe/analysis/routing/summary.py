"""All figures of a trace, by layer: with intervals and baselines, as a tree of numbers and as tables.

A layer is read at a time, with the one that follows it in its stack.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from switchmoe.analysis.routing import chains, changes, estimates, loads, specialisation, traces
from switchmoe.analysis.routing.estimates import Figure, Statistic
from switchmoe.analysis.routing.traces import Info, Layer, LayerName

Told = Callable[[str], None]
SECTIONS = {  # a table each: the figures in it
    "Load": ("busiest", "idlest", "dead", "overloaded", "load_entropy"),
    "Certainty": ("entropy", "confidence", "margin"),
    "Drops": ("dropped", "late_drops"),
    "Specialisation": ("class_information", "token_information", "label_information"),
    "Entropy of the experts of a class of tokens": tuple(
        f"{name.replace(' ', '_').replace('-', '_')}_entropy" for name in specialisation.CLASSES
    ),
    "Vocabulary": ("input_specialisation", "target_specialisation", "predicted_specialisation"),
    "Repeats": ("first_repeats", "any_repeats"),
    "Co-activation and the next layer": (
        "pair_information", "next_information", "next_hits", "next_hits_twice",
    ),
    "Agreement": ("agreement", "matched_agreement"),
}  # fmt: skip


def figures(directory: Path, told: Told = lambda _: None, against: Path | None = None) -> dict[str, Any]:
    """``{"layers": {name: {figure: Figure, ...}}, "says": {figure: in a line}, "units": ..., "shares": ...}`` of a trace.

    Args:
      told: called with what is being counted.
      against: another trace of the same tokens, for the agreement.

    Raises:
      ValueError: a trace that can't be read, of other tokens, or whose layers have not the same ones.
    """
    info = traces.read_info(directory)
    class_V = specialisation.class_V(traces.read_tokens(directory), info)
    found: dict[str, Any] = {"layers": {}, "says": {}, "units": {}, "classes": {}, "loads": {}, "places": {}}
    found |= {"together": {}}
    if against:
        changes.check(info, traces.read_info(against))
    for layer, following in _with_next(directory, info):
        name = str(layer.name)
        told(name)
        mine = loads.STATISTICS | specialisation.statistics(class_V) | chains.STATISTICS
        if following is not None:
            mine |= chains.next_layer(following)
        if against:
            mine |= compared(layer, traces.read_layer(against, layer.name))
        found["layers"][name] = _estimated(layer, mine)
        found["says"] |= {key: one.says for key, one in mine.items()}
        found["units"] |= {key: one.unit for key, one in mine.items()}
        found["loads"][name] = loads.load_E(layer)
        found["places"][name] = {along: estimates.several(one, layer) for along, one in loads.ALONG.items()}
        if len(class_V):
            class_N = specialisation.class_N(layer, class_V)
            found["classes"][name] = specialisation.shares(layer, class_N, len(specialisation.CLASSES))
        together = chains.together(layer)
        if together is not None:
            found["together"][name] = together
    return found


def compared(layer: Layer, other: Layer) -> dict[str, Statistic]:
    """The agreement of two layers' choices, their experts as they are and matched.

    Raises:
      ValueError: they are of other tokens.
    """
    changes.check_rows(layer, other)
    return {"agreement": changes.agreement(other, False), "matched_agreement": changes.agreement(other, True)}


def saturation(directories: dict[int, Path], told: Told = lambda _: None) -> dict[str, dict[int, Figure]]:
    """By layer and step: the share of a token's experts that are those of the last step."""
    steps = sorted(directories)
    found: dict[str, dict[int, Figure]] = {}
    info = traces.read_info(directories[steps[-1]])
    for name in info.layers:
        last = traces.read_layer(directories[steps[-1]], name)
        statistic = changes.agreement(last, False)
        for step in steps[:-1]:
            told(f"step {step}, {name}")
            layer = traces.read_layer(directories[step], name)
            changes.check_rows(layer, last)
            found.setdefault(str(name), {})[step] = estimates.estimate(statistic, layer)
    return found


def tables(found: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """(heads, rows) by section: a row of each layer; of each figure its value, interval and baseline."""
    made = {}
    for section, names in SECTIONS.items():
        known = [name for name in names if any(name in layer for layer in found["layers"].values())]
        if known:
            rows = [
                [layer, *(written(of.get(name), found["units"][name]) for name in known)]
                for layer, of in found["layers"].items()
            ]
            made[section] = (["layer", *(f"{shown(name)}, {found['units'][name]}" for name in known)], rows)
    return made


def shown(name: str) -> str:
    return name.replace("_", " ")


def written(figure: Figure | None, unit: str) -> str:
    """``0.132 (0.121 to 0.143); shuffled 0.125``."""
    if figure is None or np.isnan(figure.value):
        return "none"
    form = "{:.0f}" if unit == "experts" else "{:.3f}"
    value, low, high, shuffled = (
        form.format(round(number, 3) + 0.0) if np.isfinite(number) else "unknown" for number in figure[:4]
    )
    return f"{value} ({low} to {high}); shuffled {shuffled}"


def brief(figure: Figure | None) -> str:
    """``0.132 (0.125)``: the value, and what shuffled tokens give."""
    if figure is None or np.isnan(figure.value):
        return "none"
    shuffled = f"{figure.shuffled:.3f}" if np.isfinite(figure.shuffled) else "unknown"
    return f"{round(figure.value, 3) + 0.0:.3f} ({shuffled})"


def plain(found: Any) -> Any:
    """As JSON has it: figures as dictionaries, arrays as lists, NaN as null."""
    if isinstance(found, Figure):
        return plain(found._asdict())
    if isinstance(found, dict):
        return {str(key): plain(value) for key, value in found.items()}
    if isinstance(found, np.ndarray):
        return plain(found.tolist())
    if isinstance(found, (list, tuple)):
        return [plain(value) for value in found]
    return None if isinstance(found, float) and not np.isfinite(found) else found


def _estimated(layer: Layer, statistics: dict[str, Statistic]) -> dict[str, Figure]:
    made = {name: estimates.estimate(statistic, layer) for name, statistic in statistics.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def _with_next(directory: Path, info: Info) -> Iterator[tuple[Layer, Layer | None]]:
    """Each layer, and the next one of its stack, whose rows are the same tokens."""
    read: dict[LayerName, Layer] = {}
    for name, after in zip(info.layers, [*info.layers[1:], None], strict=True):
        layer = read.pop(name, None) or traces.read_layer(directory, name)
        following = None
        if after is not None and after.stack == name.stack:
            following = read[after] = traces.read_layer(directory, after)
            traces.check_rows(layer, following)
        yield layer, following
