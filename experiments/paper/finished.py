"""A scale's finished runs: those of a sweep's directory, and those kept in a small file that outlives it.

The file has a JSON object a line, a line a run: scale, settings, what it overrides of them, and what verdicts and pictures are
made of. A run that is kept need not be made again, and its directory may go. What was kept first counts: where a run is made again,
as another begins with its checkpoint, no verdict is drawn a second time.
"""

import contextlib
import fcntl
import functools
import json
import os
from collections.abc import Iterator, Sequence
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

Key = tuple[tuple[str, Any], ...]  # a run's overrides, in the order of their names
Outcome = tuple[sweeps.Run | None, dict[str, Any]]  # (None if it diverged, `run.json`)
ORIGIN = (
    "device", "machine", "versions", "commit", "documents", "documents_sha256", "train_seconds", "not_finite",
)  # fmt: skip
ARRAYS = ("step_V", "loss_V", "step_T", "seconds_T")
NUMBERS = ("parameters", "parameters_active", "step_seconds")
# Of the base, what may differ between runs that are compared: where files lie, and what only shows. The text itself is
# compared by its fingerprints.
FREE = ("data.source", "data.data_dir", "data.prefetch", "mesh.", "checkpoint.")


class Finished(NamedTuple):
    base: dict[str, Any]  # settings, by group, of which the runs override some
    runs: dict[Key, Outcome]

    def run(self, overrides: Overrides) -> tuple[sweeps.Run | None] | None:
        """(run,), (None,) if its loss was no number, None if there is none."""
        found = self.runs.get(key(overrides))
        return None if found is None else found[:1]


def key(overrides: Overrides) -> Key:
    return tuple(sorted(overrides.items()))


def read(workdir: Path, scale: str, kept: Path | None = None) -> Finished:
    """The runs that are done of a scale's directory, and of the file.

    Raises:
      ValueError: neither has runs, or they are not of this scale, of one base and of one text; one line.
    """
    base, runs = _kept(kept, scale)
    definition = study.read_definition(workdir)
    if definition is None and base is None:
        raise ValueError(
            f"--workdir={workdir}: no runs; accepted is a directory of this command's, or run a claim first"
        )
    if definition is not None:
        _check_scale(workdir, definition["runs"].values(), scale)
        if base is not None:
            _same(kept, base, from_config(definition["base"]), f"are in {workdir}")
        base = definition["base"]
        for name, overrides in definition["runs"].items():
            outcome = _outcome(workdir / name)
            if outcome is not None:
                runs.setdefault(key(overrides), outcome)
    _check_text(workdir, kept, runs)
    return Finished(base, runs)


def missing(
    wanted: Sequence[Overrides], argv: Sequence[str], doc: str, scale: str, kept: Path | None
) -> list[Overrides]:
    """Those of the runs of a sweep's command line that the file does not have.

    Raises:
      ValueError: the file's runs have another base; one line.
    """
    base, runs = _kept(kept, scale)
    if base is None:
        return list(wanted)
    _, arguments = choice.read([argument for argument in argv if argument != "--dry_run"])
    _same(kept, base, study.read(arguments, doc, ()).base, "are asked")
    return [run for run in wanted if key(run) not in runs]


def check_base(base: Settings, workdir: Path, scale: str, kept: Path | None) -> None:
    """Raises ValueError, one line: runs of another base are in the directory, or kept."""
    there = study.read_definition(workdir)
    for where, known in (
        (f"--kept={kept}", _kept(kept, scale)[0]),
        (f"--workdir={workdir}", there and there["base"]),
    ):
        if known and (differ := different(known, to_dict(base))):
            raise ValueError(
                f"{where}: its runs differ from those that are asked in {', '.join(differ)}; accepted are the overrides that they"
                " were made with"
            )


def update(kept: Path, workdir: Path, scale: str) -> None:
    """Adds the runs that are done in the directory to the file, at once or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with _alone(kept.parent):
        found = read(workdir, scale, kept)
        base = changed(portable(found.base), to_dict(Settings()))
        lines = [
            json.dumps({"scale": scale, "run": dict(overrides), "base": base, **_written(run, origin)})
            for overrides, (run, origin) in found.runs.items()
        ]
        report.write_whole(kept, "".join(line + "\n" for line in sorted(lines)))


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One command at a time adds to a directory's files."""
    number = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _check_scale(workdir: Path, found: Any, scale: str) -> None:
    """Refuses the runs of another scale: those that this one has not, or all of another's and no more."""
    asked = {key(overrides) for overrides in found}
    runs = {
        name: {key({field: value for field, (value,) in one.items()}) for one in claims.products(name)}
        for name in SCALES
    }
    others = [name for name, known in runs.items() if asked == known]
    if asked - runs[scale] or (others and scale not in others):
        raise ValueError(
            f"--workdir={workdir}: not the runs of --scale={scale}; accepted is the scale's own directory"
        )


def _check_text(workdir: Path, kept: Path | None, runs: dict[Key, Outcome]) -> None:
    found = (origin.get("documents_sha256") or {} for _, origin in runs.values())
    # A task's are named TASK/SPLIT: what runs are fine-tuned on is no matter of the text.
    texts = {json.dumps(hashes, sort_keys=True) for hashes in found if hashes and "/" not in "".join(hashes)}
    if len(texts) > 1:
        where = f"--workdir={workdir}" + (f" and --kept={kept}" if kept else "")
        raise ValueError(
            f"{where}: runs of {len(texts)} texts (documents_sha256 in run.json); accepted are runs of one"
        )


def _same(kept: Path | None, base: dict[str, Any], other: Settings, there: str) -> None:
    """Refuses runs of another base than the file's."""
    if differ := different(base, to_dict(other)):
        raise ValueError(
            f"--kept={kept}: runs that differ from those that {there} in {', '.join(differ)}; accepted is a file of the same base"
        )


def different(base: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The fields in which two bases differ so that their runs can't be compared, with both values."""
    a, b = flat(to_dict(from_config(base))), flat(to_dict(from_config(other)))
    fields = (field for field in a if a[field] != b[field] and not field.startswith(FREE))
    return [f"{field} ({a[field]} and {b[field]})" for field in fields]


def changed(base: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The fields of a base that are not those of another one."""
    other = flat(plain)
    return {field: value for field, value in flat(base).items() if other.get(field) != value}


@functools.cache
def plain(scale: str) -> dict[str, Any]:
    """The settings of a scale's config, by group."""
    return to_dict(from_config(claims.base_config(scale)))


def portable(base: dict[str, Any]) -> dict[str, Any]:
    """Without this machine's directories."""
    return merged(base, {"data.data_dir": "", "data.source": Path(base["data"]["source"]).name})


def _outcome(directory: Path) -> Outcome | None:
    known = read_run(directory)
    try:
        return sweeps.read(directory), known
    except ValueError:
        return (None, known) if known.get("not_finite") else None


def _written(run: sweeps.Run | None, origin: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"origin": {name: origin[name] for name in ORIGIN if name in origin}}
    if run is None:
        return found | {"diverged": True}
    found |= {name: _numbers(getattr(run, name)) for name in ARRAYS}
    found |= {name: getattr(run, name) for name in NUMBERS}
    for name in ("parts", "scores"):
        found[name] = {one: [*map(_numbers, series)] for one, series in getattr(run, name).items()}
    return found | {"routing": run.routing._asdict() if run.routing else None}


def _numbers(values: np.ndarray) -> list[float]:
    """To six digits, more than a loss or a time is worth."""
    return [float(f"{value:.6g}") for value in values]


def _kept(path: Path | None, scale: str) -> tuple[dict[str, Any] | None, dict[Key, Outcome]]:
    """(base, runs) of the file; None where there is no file or no line. Runs that no claim asks for any more stay."""
    base, runs = None, {}
    if not (path and path.exists()):
        return base, runs
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"--kept={path}, line {number}"
        try:
            found = json.loads(line)
            here = merged(to_dict(Settings()), found["base"])
            outcome = _restored(found, from_config(merged(here, found["run"])))
            if found["scale"] != scale:
                raise ValueError(f"it is of --scale={found['scale']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where}: not a run that this command kept of --scale={scale} ({error}); accepted is a file of its own for each"
                " scale"
            ) from error
        base = base or here
        _same(path, base, from_config(here), f"are in line {number}")
        runs[key(found["run"])] = outcome
    return base, runs


def merged(groups: dict[str, Any], fields: Overrides) -> dict[str, Any]:
    """Settings by group with some fields ("group.field") in place of theirs."""
    found = {group: dict(values) for group, values in groups.items()}
    for path, value in fields.items():
        group, field = path.split(".")
        found[group][field] = value
    return found


def _restored(found: dict[str, Any], settings: Settings) -> Outcome:
    origin = dict(found["origin"])
    if found.get("diverged"):
        return None, origin
    values = {name: np.array(found[name]) for name in ARRAYS} | {name: found[name] for name in NUMBERS}
    values["routing"] = sweeps.Routing(**found["routing"]) if found["routing"] else None
    for one in ("parts", "scores"):  # no scores in a file of an earlier version
        values[one] = {part: tuple(map(np.array, series)) for part, series in found.get(one, {}).items()}
    name = ",".join(f"{field}={value}" for field, value in found["run"].items())
    told = {"device": str(origin.get("device", "not recorded")), "versions": origin.get("versions") or {}}
    return sweeps.Run(name, settings, **values, **told), origin
