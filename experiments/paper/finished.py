"""A scale's finished runs: those of a sweep's directory, and those kept in a small file that outlives it.

The file has a JSON object a line, a line a run: what it overrides of the scale's config, and what verdicts and pictures are
made of. A run that is kept need not be made again, and its directory may go.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import claims
from experiments.claims import SCALES, Overrides
from experiments.launchers import choice
from experiments.sweep import study
from switchmoe.analysis import report, sweeps
from switchmoe.runs.resuming import flat
from switchmoe.runs.rundir import read_run
from switchmoe.settings import Settings, from_config, to_dict

Key = tuple[tuple[str, Any], ...]  # a run's overrides
ORIGIN = (
    "device", "machine", "versions", "commit", "documents", "documents_sha256", "train_seconds", "not_finite",
)  # fmt: skip
ARRAYS = ("step_V", "loss_V", "step_T", "seconds_T")
NUMBERS = ("parameters", "parameters_active", "step_seconds")
# Of the base, what may differ between runs that are compared: where files lie, and what only shows.
FREE = ("data.source", "data.data_dir", "data.prefetch", "mesh.", "checkpoint.")


class Finished(NamedTuple):
    base: dict[str, Any]  # settings, by group, of which the runs override some
    runs: dict[Key, tuple[sweeps.Run | None, dict[str, Any]]]  # and `run.json`; None: diverged

    def run(self, overrides: Overrides) -> tuple[sweeps.Run | None] | None:
        """(run,), (None,) if its loss was no number, None if there is none."""
        found = self.runs.get(tuple(overrides.items()))
        return None if found is None else found[:1]


def read(workdir: Path, scale: str, kept: Path | None = None) -> Finished:
    """The runs that are done of a scale's directory, and of the file.

    Raises:
      ValueError: neither has runs, or they are not of this scale or of one base; one line.
    """
    base, runs = _kept(kept, scale) if kept and kept.exists() else (None, {})
    definition = study.read_definition(workdir)
    if definition is None and base is None:
        raise ValueError(
            f"--workdir={workdir}: no runs; accepted is a directory of this command's, or run a claim first"
        )
    if definition is not None:
        _check(f"--workdir={workdir}", definition["runs"].values(), scale)
        if base is not None:
            _same(kept, base, from_config(definition["base"]), f"are in {workdir}")
        base = definition["base"]
        for name, overrides in definition["runs"].items():
            outcome = _outcome(workdir / name)
            if outcome is not None:
                runs[tuple(overrides.items())] = outcome
    return Finished(base, runs)


def missing(
    wanted: Sequence[Overrides], argv: Sequence[str], doc: str, scale: str, kept: Path | None
) -> list[Overrides]:
    """Those of the runs of a sweep's command line that the file does not have.

    Raises:
      ValueError: the file's runs have another base; one line.
    """
    if not (kept and kept.exists()):
        return list(wanted)
    base, runs = _kept(kept, scale)
    _, arguments = choice.read([argument for argument in argv if argument != "--dry_run"])
    _same(kept, base, study.read(arguments, doc, ()).base, "are asked")
    return [run for run in wanted if tuple(run.items()) not in runs]


def update(kept: Path, workdir: Path, scale: str) -> None:
    """Adds the runs that are done in the directory to the file, at once or not at all."""
    found = read(workdir, scale, kept)
    base = _portable(found.base, scale)
    lines = [
        json.dumps({"run": dict(key), "base": base, **_written(run, origin)})
        for key, (run, origin) in found.runs.items()
    ]
    kept.parent.mkdir(parents=True, exist_ok=True)
    report.write_whole(kept, "".join(line + "\n" for line in sorted(lines)))


def _check(where: str, found: Iterable[Overrides], scale: str) -> None:
    known = [{field: value for field, (value,) in one.items()} for one in claims.products(scale)]
    if not all(overrides in known for overrides in found):
        raise ValueError(f"{where}: not the runs of --scale={scale}; accepted is the scale's own directory")


def _same(kept: Path, base: dict[str, Any], other: Settings, there: str) -> None:
    """Refuses runs of another base than the file's."""
    a, b = flat(to_dict(from_config(base))), flat(to_dict(other))
    differ = [
        f"{field} ({a[field]} kept, {b[field]} asked)"
        for field in a
        if a[field] != b[field] and not field.startswith(FREE)
    ]
    if differ:
        raise ValueError(
            f"--kept={kept}: runs that differ from those that {there} in {', '.join(differ)}; accepted is a file of the same base"
        )


def changed(base: dict[str, Any], scale: str) -> dict[str, Any]:
    """The fields of a base that are not those of the scale's config."""
    plain = flat(_plain(scale))
    return {field: value for field, value in flat(base).items() if plain.get(field) != value}


@functools.cache
def _plain(scale: str) -> dict[str, Any]:
    config = import_module(SCALES[scale].config.removesuffix(".py").replace("/", ".")).get_config()
    return to_dict(from_config(config))


def _portable(base: dict[str, Any], scale: str) -> dict[str, Any]:
    """Without this machine's directories."""
    found = {field: value for field, value in changed(base, scale).items() if field != "data.data_dir"}
    if "data.source" in found:
        found["data.source"] = Path(found["data.source"]).name
    return found


def _outcome(directory: Path) -> tuple[sweeps.Run | None, dict[str, Any]] | None:
    known = read_run(directory)
    try:
        return sweeps.read(directory), known
    except ValueError:
        return (None, known) if "not_finite" in known else None


def _written(run: sweeps.Run | None, origin: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"origin": {name: origin[name] for name in ORIGIN if name in origin}}
    if run is None:
        return found | {"diverged": True}
    # Four digits of a time, six of a loss: more than either is worth.
    found |= {name: [float(f"{value:.6g}") for value in getattr(run, name)] for name in ARRAYS}
    found |= {name: getattr(run, name) for name in NUMBERS}
    found["parts"] = {
        part: [[float(f"{value:.6g}") for value in values] for values in series]
        for part, series in run.parts.items()
    }
    return found | {"routing": run.routing._asdict() if run.routing else None}


def _kept(path: Path, scale: str) -> tuple[dict[str, Any] | None, dict[Key, Any]]:
    base, runs = None, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"--kept={path}, line {number}"
        try:
            found = json.loads(line)
            here = merged(_plain(scale), found["base"])
            runs[tuple(found["run"].items())] = _restored(found, from_config(merged(here, found["run"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: not a run that this command kept ({error})") from error
        base = base or here
        _same(path, base, from_config(here), f"are in line {number}")
    _check(f"--kept={path}", map(dict, runs), scale)
    return base, runs


def merged(groups: dict[str, Any], fields: Overrides) -> dict[str, Any]:
    """Settings by group with some fields ("group.field") in place of theirs."""
    found = {group: dict(values) for group, values in groups.items()}
    for path, value in fields.items():
        group, field = path.split(".")
        found[group][field] = value
    return found


def _restored(found: dict[str, Any], settings: Settings) -> tuple[sweeps.Run | None, dict[str, Any]]:
    origin = dict(found["origin"])
    if found.get("diverged"):
        return None, origin
    arrays = {name: np.array(found[name]) for name in ARRAYS}
    routing = sweeps.Routing(**found["routing"]) if found["routing"] else None
    values = {
        field.name: found[field.name] for field in dataclasses.fields(sweeps.Run) if field.name in NUMBERS
    }
    name = ",".join(f"{field}={value}" for field, value in found["run"].items())
    values["parts"] = {part: tuple(map(np.array, series)) for part, series in found["parts"].items()}
    told = {"device": str(origin.get("device", "not recorded")), "versions": origin.get("versions") or {}}
    return sweeps.Run(name, settings, **arrays, **values, routing=routing, **told), origin
