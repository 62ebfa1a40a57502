"""What the notebooks in `colab/` share: a command followed live in its cell, pictures, tables, sliders.

A command is a process of its own, on whatever device there is; what a notebook's own process computes, it computes on
the CPU (`cpu`), as an accelerator belongs to one process.
"""

import csv
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from IPython.display import HTML, Image, display
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import command_line
from switchmoe.analysis import plots
from switchmoe.analysis.sweep_plots import COLOURS
from switchmoe.runs.reporting import METRICS_FILE, Record, read_metrics
from switchmoe.runs.rundir import read_run
from switchmoe.settings import default_config

RESULTS = Path(__file__).parent / "results"
TINY = "SWITCHMOE_TINY"  # set: all that a notebook does is small, as in its test
TINY_RUN = {
    "train.num_steps": 4, "train.log_every": 1, "train.eval_every": 2, "train.eval_batches": 1, "checkpoint.every": 2,
    "data.batch_size": 16, "model.scan_unroll": 1,
}  # fmt: skip
POLL, REDRAW = 0.5, 3.0  # seconds between looks at a command and between its pictures
GRACE = 60.0  # seconds in which a command that was interrupted saves its state
WIDTH = 800  # of a picture, in pixels
CELL = "text-align: left; vertical-align: top; white-space: pre-wrap"


def pick(usual: Any, small: Any) -> Any:
    """``small`` where the environment has SWITCHMOE_TINY=1, else ``usual``."""
    return small if os.environ.get(TINY, "") not in ("", "0") else usual


def steps(count: int) -> list[str]:
    """Arguments of a run of so many steps, in which there is something to see from the first on; 0: as its config has it."""
    given = {
        "train.num_steps": count,
        "train.log_every": max(1, count // 50),
        "train.eval_every": max(1, count // 8),
        "checkpoint.every": max(1, count // 4),
    }
    given = pick(given if count else {}, TINY_RUN)
    return [f"--config.{field}={value}" for field, value in given.items()]


def cpu(devices: int = 1) -> None:
    """This process computes on so many (virtual) CPU devices; its programs are compiled fast, as they run once or twice.

    Raises:
      RuntimeError: it has computed on others already.
    """
    import jax

    before = os.environ.get("XLA_FLAGS", "")
    flags = f"{before} --xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = flags.strip()
    jax.config.update("jax_platforms", "cpu")
    found = jax.devices()
    os.environ["XLA_FLAGS"] = before  # commands have theirs
    if found[0].platform != "cpu" or len(found) != devices:
        raise RuntimeError(
            f"{len(found)} x {found[0].platform}: accepted is {devices} x cpu; restart the kernel"
        )


def run(command: str, *arguments: str, pictures: Callable[[], Sequence[Figure]] = list) -> str:
    """``python -m experiments.COMMAND``, with ``pictures()`` and its last line in the cell as it goes; returns its output.

    Raises:
      RuntimeError: it failed; how, and the end of its output.
    """
    given = [sys.executable, "-m", f"experiments.{command}", *arguments]
    said, shown = "", _Live()
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(given, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                said = Path(output.name).read_text(encoding="utf-8", errors="replace")
                shown.line(" ".join(["$ python", *given[1:]]), said)
                shown.draw(pictures)
        except KeyboardInterrupt:  # which the command was told, too
            process.wait(GRACE)
            raise
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        said = Path(output.name).read_text(encoding="utf-8", errors="replace")
    shown.line(" ".join(["$ python", *given[1:]]), said)
    shown.draw(pictures, at_once=True)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {' '.join(given)}\n{said[-2000:]}")
    return said


def train(workdir: str | Path, *arguments: str, command: str = "run") -> Path:
    """`run` of a command that trains, with its loss and its experts' load as they come; returns its directory.

    One that is done there is not begun again; its pictures are shown.
    """
    directory = Path(workdir)
    run(command, f"--workdir={workdir}", *arguments, pictures=lambda: progress(directory))
    return directory


def sweep(workdir: str | Path, *arguments: str) -> Path:
    """`run` of a sweep, with the held-out loss of its runs as it comes; returns its directory."""
    directory = Path(workdir)

    def runs() -> list[Figure]:
        there = [file.parent for file in directory.glob(f"*/{METRICS_FILE}")]
        there.sort(key=lambda run: (len(run.name), run.name))  # num_experts=8 before num_experts=16
        return [held_out({run.name: run for run in there})]

    run("sweep", f"--workdir={workdir}", *arguments, pictures=runs)
    return directory


def converted(source: str | Path, target: str | Path, *arguments: str) -> Path:
    """`run` of a conversion into a directory, which it returns; one that is there is left as it is.

    A source that is not on disk is a hub's name: what fetches it is installed where it is missing.
    """
    if not Path(target).exists():
        if not Path(source).exists():
            needs("huggingface_hub", "hf")
        run("convert", f"--source={source}", f"--target={target}", *arguments)
    return Path(target)


def needs(package: str, extra: str) -> None:
    """Installs what an extra of this package brings, where ``package`` is missing.

    Raises:
      RuntimeError: this package is not installed, but a checkout's sources.
    """
    if importlib.util.find_spec(package):
        return
    try:
        importlib.metadata.version("switchmoe")
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError(
            f"{package}: the package is missing; accepted is after pip install '.[{extra}]' in the checkout"
        ) from error
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"switchmoe[{extra}]"], check=True)
    importlib.invalidate_caches()


def experts_config(path: str | Path, experts: str) -> Path:
    """Writes a sweep of `configs/sweeps/experts_tiny.py` over other numbers of experts, such as "1, 2, 8"; returns the path.

    Raises:
      ValueError: they are no such numbers.
    """
    try:
        counts = [int(one) for one in pick(experts, "1, 4").split(",")]
    except ValueError as error:
        raise ValueError(f"{experts}: accepted are integers with commas between, such as 1, 2, 8") from error
    Path(path).write_text(
        "from configs.sweeps.experts_tiny import get_config as get_config\n\n\n"
        f'def get_sweep():\n    return [{{"moe.num_experts": {counts}}}]\n',
        encoding="utf-8",
    )
    return Path(path)


def records(directory: Path) -> list[Record]:
    """Of a run, as far as it is; [] of one that has not begun."""
    path = directory / METRICS_FILE
    return read_metrics(path) if path.exists() else []


@plots.own_style
def progress(directory: Path) -> list[Figure]:
    """The learning curve of a run as far as it is, and the load of its experts."""
    found = records(directory)
    if not found:
        return []
    figures = [plots.loss_curves(found, read_run(directory).get("unigram_cross_entropy"))]
    return figures + ([plots.expert_load(found)] if plots.layer_names(found) else [])


@plots.own_style
def held_out(runs: Mapping[str, Path]) -> Figure:
    """Held-out loss of several runs over their steps, by their names."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, directory) in enumerate(runs.items()):
        at, loss = plots.series(records(directory), "validation", "cross_entropy")
        last = f"{name}, last {loss[-1]:.3f}" if len(loss) else name
        axes.plot(
            at, loss, "o-", markersize=4, linewidth=1.4, color=COLOURS[number % len(COLOURS)], label=last
        )
    plots.finish(axes, "held-out cross-entropy (nats per target token)")
    axes.set_xlabel("step")
    if runs:
        axes.legend(frameon=False, fontsize=9)
    return figure


def show(*pictures: str | Path | Figure) -> None:
    """Figures, and pictures in files or in directories of them."""
    for one in pictures:
        if isinstance(one, Figure):
            display(_png(one))
            continue
        for file in sorted(Path(one).glob("*.png")) if Path(one).is_dir() else [one]:
            display(Image(filename=str(file), width=WIDTH))


def table(rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows with the same keys; text is shown as it is, sentinels included."""
    rows = list(rows)
    if not rows:
        return
    lines = [_cells(rows[0], "th"), *(_cells(row.values(), "td") for row in rows)]
    display(HTML("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"))


def page(path: str | Path, height: int = 700) -> None:
    """An HTML file that needs no other, in a frame."""
    whole = html.escape(Path(path).read_text(encoding="utf-8"), quote=True)
    frame = f'<iframe srcdoc="{whole}" width="100%" height="{height}" style="border: 0"></iframe>'
    display(HTML(f"<div>{frame}</div>"))


def read_csv(path: str | Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of a CSV file; numbers where there are any, "" where there is nothing."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        return [{name: _number(line[name]) for name in columns} for line in csv.DictReader(file)]


def read_jsonl(path: str | Path, count: int) -> list[dict[str, Any]]:
    """The first records of a file that has one a line."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def law(path: str | Path) -> None:
    """The scaling law of a sweep's `fit.json`: its coefficients with their intervals, and what is to be said of them."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    display(HTML(f"<p>{html.escape(found['law'])}</p>"))
    for fit in found["fits"]:
        rows = fit["coefficients"].items()
        table(
            {
                "coefficient": name,
                "value": of["value"],
                "from": (of["interval"] or ["-"])[0],
                "to": (of["interval"] or ["-"])[-1],
            }
            for name, of in rows
        )
        display(HTML("".join(f"<p>{html.escape(note)}</p>" for note in fit["notes"])))
    for reason in found["not_fitted"].values():
        display(HTML(f"<p>not fitted: {html.escape(reason)}</p>"))


def figures(path: str | Path, names: Sequence[str]) -> None:
    """Some of the figures of a trace's `figures.json` by layer, with interval and baseline."""
    from switchmoe.analysis.routing import estimates, summary

    found = json.loads(Path(path).read_text(encoding="utf-8"))

    def written(of: Mapping[str, Any], name: str) -> str:
        plain = of[name] if name in of else None
        values = plain and {key: math.nan if value is None else value for key, value in plain.items()}
        return summary.written(values and estimates.Figure(**values), found["units"][name])

    table(
        {"layer": layer}
        | {summary.shown(name): written(of, name) for name in names if name in found["units"]}
        for layer, of in found["layers"].items()
    )


def settings(config: ConfigDict) -> None:
    """The fields of a config that are not the library's defaults, and what they mean."""
    meant, default = command_line.meanings(), default_config()
    table(
        {"field": f"{group}.{field}", "value": value, "meaning": meant[f"{group}.{field}"]}
        for group, fields in config.items()
        for field, value in fields.items()
        if value != default[group][field]
    )


def examples(directory: Path) -> list[dict[str, str]]:
    """Held-out inputs of a run, what was asked, and its own answers."""
    return read_run(directory)["examples"]


def sliders(draw: Callable[..., Figure], **values: Sequence[Any]) -> None:
    """``draw(name=value, ...)`` with a slider for each name, over its values; the first ones come first.

    Without ipywidgets, and where SWITCHMOE_TINY is set, pictures that stand still: of the first values, and of each
    name's last one beside the others' first.
    """
    first = {name: of[0] for name, of in values.items()}
    try:
        import ipywidgets
    except ImportError:
        ipywidgets = None
    if ipywidgets and not pick("", TINY):
        moved = {
            name: ipywidgets.SelectionSlider(
                options=sorted(of), value=of[0], description=name, continuous_update=False
            )
            for name, of in values.items()
        }
        ipywidgets.interact(lambda **chosen: show(draw(**chosen)), **moved)
        return
    for change in ({}, *({name: of[-1]} for name, of in values.items())):
        show(draw(**first | change))


class _Live:
    """What a cell shows of a command under way: a line, and below it pictures that are drawn anew."""

    def __init__(self) -> None:
        self._line: Any = None
        self._places: list[Any] = []
        self._drawn: list[bytes] = []
        self._next = 0.0

    def line(self, command: str, said: str) -> None:
        lines = said.strip().splitlines()
        shown = HTML(f"<pre>{html.escape(command)}\n{html.escape(lines[-1] if lines else '')}</pre>")
        self._line = _put(self._line, shown)

    def draw(self, pictures: Callable[[], Sequence[Figure]], at_once: bool = False) -> None:
        if time.monotonic() < self._next and not at_once:
            return
        for number, figure in enumerate(pictures()):
            image = _png(figure)
            if number == len(self._places):
                self._places.append(None)
                self._drawn.append(b"")
            if image.data != self._drawn[number]:
                self._places[number] = _put(self._places[number], image)
                self._drawn[number] = image.data
        self._next = time.monotonic() + REDRAW


def _put(place: Any, shown: Any) -> Any:
    """Shows it in its place, which is made where there is none yet."""
    if place is None:
        return display(shown, display_id=True)
    place.update(shown)
    return place


def _png(figure: Figure) -> Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return Image(data=file.getvalue(), format="png", width=WIDTH)


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _cells(values: Iterable[Any], tag: str) -> str:
    texts = (f"{value:,.3f}" if isinstance(value, float) else str(value) for value in values)
    return "".join(f'<{tag} style="{CELL}">{html.escape(text)}</{tag}>' for text in texts)
