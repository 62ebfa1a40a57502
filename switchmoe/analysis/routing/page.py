"""One page of a trace: the text coloured by expert, and all figures. A single file without links, that works offline.

Letters: N tokens of a stack, K choices, E experts.
"""

import base64
import itertools
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from switchmoe.analysis import report
from switchmoe.analysis.routing import chains, loads, specialisation, summary, traces
from switchmoe.analysis.routing.estimates import Figure
from switchmoe.analysis.routing.traces import Info, Layer

MOST_TOKENS = 20_000
MOST_BYTES = 3_000_000  # of the tokens' arrays, before base64 takes a third more
# Bytes of the page: tables and pictures are what they are, favourites have a part of their own, tokens what is left.
PAGE_BYTES, FAVOURITES_BYTES, LEAST_BYTES = 5_000_000, 700_000, 200_000
FAVOURITES, MOST_EXPERTS = 6, 64  # that the page lists

NOTE = (
    "Each figure of a table has its 95 % interval, of documents drawn again, and in the same place what shuffled tokens give: the mean over"
    " 20 shuffles. Loads are set beside experts drawn at random, all alike; the information of labels beside documents with each"
    " other's labels. Entropy, confidence, margins and drops of a whole layer are the same however its tokens are shuffled."
    " Information that a shuffled trace has as well is the bias of counting few tokens, or few documents of a label."
)


def page(
    directory: Path,
    found: dict[str, Any],
    pictures: Sequence[tuple[Path, str]],
    saturation: dict[str, dict[int, Figure]] | None = None,
) -> str:
    """HTML of a trace and its `summary.figures`, at most `PAGE_BYTES`; pictures are PNG files with captions.

    Pictures of 3.5 MB and more would leave no room for the text: then it has `LEAST_BYTES` all the same.
    """
    info, pieces = traces.read_info(directory), traces.read_tokens(directory)
    said = [(summary.shown(name), text) for name, text in found["says"].items()]
    body = [
        *(f"<h2>{escape(title)}</h2>" + report.grid(*grid) for title, grid in summary.tables(found).items()),
        *([_saturation(saturation)] if saturation else []),
        *_published(found),
        "<details><summary>What the figures are</summary>" + report.table(said) + "</details>",
        "<h2>Pictures</h2>" if pictures else "",
        *(report.picture(path, caption) for path, caption in pictures),
        "<h2>What experts like best</h2>",
        f'<p class="note">Tokens, of those read {specialisation.OFTEN} times or more in {MOST_TOKENS:,}, that an expert gets more often'
        " than its load says: how many choices they made, the share of these that it gets, over its load; and where it was surest."
        f" Counts alone, of the tokens that were picked because they are high.{_left_out(info)}</p>",
        *(_favourites(directory, info, pieces)),
    ]
    template = resources.files("switchmoe.analysis.routing").joinpath("page.html").read_text(encoding="utf-8")
    filled = {
        "@STYLE@": report.STYLE,
        "@TITLE@": escape(f"Routing of {info.source or info.system}"),
        "@HEAD@": f'<p class="note">{escape(NOTE)}</p>',
        "@BODY@": "\n".join(body),
    }
    taken = sum(len(text.encode()) for text in (template, *filled.values(), filled["@TITLE@"])) + 5_000
    tokens, filled["@DATA@"] = _fitting(directory, info, pieces, max(LEAST_BYTES, PAGE_BYTES - taken))
    filled["@HEAD@"] = _head(info, tokens) + filled["@HEAD@"]
    # Each once, in the template alone: a text that holds a mark is left as it is.
    parts, rest = [], template
    while rest:
        places = {rest.find(mark): mark for mark in filled if mark in rest}
        if not places:
            break
        first = min(places)
        parts += [rest[:first], filled[places[first]]]
        rest = rest[first + len(places[first]) :]
    return "".join([*parts, rest])


def _fitting(directory: Path, info: Info, pieces: Sequence[str], room: int) -> tuple[int, str]:
    """(tokens, JSON of `explored`) in at most ``room`` bytes."""
    most = min(MOST_BYTES, room * 3 // 4)
    while True:
        data = explored(directory, info, pieces, most)
        # Nothing in a script's text may end it.
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        if len(text) <= room or not data["tokens"]:
            return data["tokens"], text
        most = int(most * 0.95 * room / len(text))  # what ids are written as comes on top, and the loads


def explored(directory: Path, info: Info, pieces: Sequence[str], most: int = MOST_BYTES) -> dict[str, Any]:
    """What the page's script reads: whole sequences from the first on, as many as `MOST_TOKENS` and ``most`` bytes allow.

    Args:
      most: of the tokens' arrays, before base64.

    Raises:
      ValueError: layers of a stack have not the same tokens.
    """
    wide = info.num_experts > 254
    layers = [traces.read_layer(directory, name, tokens=MOST_TOKENS) for name in info.layers]
    kept_bytes = -(-info.choices // 8)
    first: dict[str, Layer] = {}
    for layer in layers:
        traces.check_rows(first.setdefault(layer.name.stack, layer), layer)
    ends = {}
    sequences = np.unique(np.concatenate([layer.sequence_N for layer in first.values()]))
    depth = {stack: sum(one.name.stack == stack for one in layers) for stack in first}
    size_of = {stack: token_bytes(depth[stack], info.choices, wide) for stack in first}
    rows = sum(np.searchsorted(one.sequence_N, sequences, "right") for one in first.values())
    used = sum(
        np.searchsorted(one.sequence_N, sequences, "right") * size_of[stack] for stack, one in first.items()
    )
    fit = int(((rows <= MOST_TOKENS * 1.02) & (used <= most)).sum())
    last = sequences[max(0, fit - 1)]
    for stack, one in first.items():
        end = int(np.searchsorted(one.sequence_N, last, "right"))
        ends[stack] = end if fit else min(end, MOST_TOKENS, most // (2 * size_of[stack]))
    ids = [
        getattr(one, name)[: ends[stack]]
        for stack, one in first.items()
        for name in ("token_N", "target_N", "predicted_N")
    ]
    known = np.unique(np.concatenate(ids))
    known = known[known >= 0]
    labels = sorted({text for one in first.values() for text in one.labels})

    def place(id_N: np.ndarray) -> np.ndarray:
        return np.where(id_N < 0, -1, np.searchsorted(known, id_N)).astype(np.int32)

    stacks = {}
    for stack, one in first.items():
        cut = one.take(slice(ends[stack]))
        number = np.array([labels.index(text) for text in cut.labels] + [-1], np.int32)
        stacks[stack] = {
            name: _packed(value.astype(np.int32), "i32")
            for name, value in (
                ("token", place(cut.token_N)), ("target", place(cut.target_N)), ("predicted", place(cut.predicted_N)),
                ("sequence", cut.sequence_N), ("position", cut.position_N), ("document", cut.document_N),
                ("label", number[cut.label_N]),
            )
        }  # fmt: skip
    return {
        "choices": info.choices,
        "keptBytes": kept_bytes,
        "gates": not all(np.isnan(one.gate_NK).all() for one in layers),
        "pieces": [pieces[id] if id < len(pieces) else f"[{id}]" for id in known.tolist()],
        "labels": labels,
        "tokens": sum(ends.values()),
        "stacks": stacks,
        "layers": [_layer(one, ends[one.name.stack], wide) for one in layers],
    }


def token_bytes(layers: int, choices: int, wide: bool) -> int:
    """Of a token in a stack with so many sparse layers, before base64; ``wide``: an expert's number takes two bytes."""
    return 28 + layers * (choices * (3 if wide else 2) + -(-choices // 8) + 4)


def _layer(layer: Layer, end: int, wide: bool) -> dict[str, Any]:
    load_E = loads.load_E(layer)
    layer = layer.take(slice(end))
    kept_NB = np.packbits(layer.kept_NK, axis=1, bitorder="little")
    gate_NK = np.maximum(np.nan_to_num(layer.gate_NK, nan=0.0, posinf=0.0), 0)
    most = float(gate_NK.max(initial=0)) or 1.0

    def scaled(value_N: np.ndarray, times: int) -> dict[str, str]:
        finite = np.isfinite(value_N)
        return _packed(
            np.where(finite, np.clip(np.nan_to_num(value_N) * times, 0, 65534), 65535).astype(np.uint16),
            "u16",
        )

    return {
        "name": str(layer.name),
        "stack": layer.name.stack,
        "experts": layer.num_experts,
        "load": np.round(load_E, 5).tolist(),
        "expert": _packed(
            (layer.expert_NK + 1).astype(np.uint16 if wide else np.uint8), "u16" if wide else "u8"
        ),
        "gate": _packed(np.round(gate_NK * (255 / most)).astype(np.uint8), "u8"),
        "gateTop": most,
        "kept": _packed(kept_NB, "u8"),
        "margin": scaled(layer.margin_N, 100),
        "entropy": scaled(layer.entropy_N, 1000),
    }


def _packed(values: np.ndarray, kind: str) -> dict[str, str]:
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    return {"kind": kind, "b64": base64.b64encode(little.tobytes()).decode("ascii")}


def _head(info: Info, tokens: int) -> str:
    entries = [
        ("Source", info.source or info.system),
        ("Text", info.text or report.MISSING),
        ("Tokens traced", f"{info.tokens:,}" + ("" if info.complete else " (not complete)")),
        ("Tokens on this page", f"{tokens:,}"),
        ("Sparse layers", str(len(info.layers))),
        (
            "Experts, choices of a token",
            f"{info.num_experts}{' (guessed: the largest index and one)' * info.guessed}, {info.choices}",
        ),
    ]
    return report.tiles(entries)


def _saturation(found: dict[str, dict[int, Figure]]) -> str:
    steps = sorted({step for of in found.values() for step in of})
    rows = [[name, *(summary.written(of.get(step), "share") for step in steps)] for name, of in found.items()]
    note = "Share of a token's experts that are those of the run's last checkpoint (OLMoE)."
    return f'<h2>Saturation</h2><p class="note">{note}</p>' + report.grid(["layer", *map(str, steps)], rows)


def _published(found: dict[str, Any]) -> list[str]:
    """Papers' figures: of models of hundreds of times the size, to be read for their shape."""
    sections = []
    if any("sentinel_entropy" in of for of in found["layers"].values()):
        rows = [[stack, ", ".join(map(str, values))] for stack, values in specialisation.ST_MOE.items()]
        sections.append(
            "<h2>Beside: ST-MoE, Table 14</h2><p class=note>Entropy of the experts that sentinels go to, nats, by sparse layer;"
            " 32 experts, even: 3.5. (Encoder experts specialise, decoder ones do not.)</p>"
            + report.grid(["stack", "layers"], rows)
        )
    rows = [
        [f"{which} again", *(f"{low:.1%} to {high:.1%}" for low, high in layers.values())]
        for which, layers in chains.MIXTRAL.items()
    ]
    sections.append(
        "<h2>Beside: Mixtral, Table 5</h2><p class=note>Next tokens with the same first expert, or with one of two in common; 8"
        f" experts. By chance {1 / 8:.1%} and {chains.chance_of_any(8, 2):.1%}.</p>"
        + report.grid(["", *(f"layer {layer}" for layer in chains.MIXTRAL["first"])], rows)
    )
    return sections


def _left_out(info: Info) -> str:
    if info.num_experts <= MOST_EXPERTS:
        return ""
    return f" Of the {info.num_experts} experts of a layer the first {MOST_EXPERTS} are listed."


def _favourites(directory: Path, info: Info, pieces: Sequence[str]) -> list[str]:
    """Tables by layer, each with its part of `FAVOURITES_BYTES`: first the best token of each expert, then the second."""
    made, heads = [], ["expert", "token", "times", "its share", "over load", "snippet"]
    for name in info.layers:
        layer = traces.read_layer(directory, name, tokens=MOST_TOKENS)
        experts = range(min(info.num_experts, MOST_EXPERTS))
        found = [specialisation.favourites(layer, expert, FAVOURITES, 1) for expert in experts]
        rows, room = [], FAVOURITES_BYTES // len(info.layers)
        for rank, expert in itertools.product(range(FAVOURITES), experts):
            if rank >= len(found[expert]):
                continue
            best = found[expert][rank]
            before, token, after = (
                specialisation.snippet(layer, best.rows[0], pieces) if best.rows else ("", "", "")
            )
            row = [
                expert, token.strip() or token, best.times, f"{best.share:.0%}", f"{best.lift:.1f}",
                f"{before}[{token}]{after}",
            ]  # fmt: skip
            room -= len(f"<tr>{report.cells(row)}</tr>".encode())
            if room < 0:
                break
            rows.append(row)
        if rows:
            rows.sort(key=lambda row: row[0])  # of an expert, the best first
            made.append(
                f"<details><summary>{escape(str(name))}</summary>{report.grid(heads, rows, 'tokens')}</details>"
            )
    return made
