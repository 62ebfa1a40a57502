"""A run's directory: who it belongs to (`config.json`) and what is known of it (`run.json`)."""

import json
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from switchmoe.runs import buckets, resuming
from switchmoe.runs.checkpoints import write_json
from switchmoe.runs.lock import Lock
from switchmoe.runs.reporting import METRICS_FILE, read_metrics
from switchmoe.settings import Settings, to_dict

REPORT_FILE = "report.html"
PREDICTIONS_FILE = "predictions.jsonl"  # of a fine-tuned model


def check(
    workdir: Path, settings: Settings, checkpoints: Path | epath.Path | None = None
) -> resuming.Differences:
    """Refuses a directory that another run lives in, or a damaged one's; returns what differs where it may.

    Args:
      checkpoints: where they are, if not in the directory.

    Raises:
      ValueError: names the fields that may not differ (`resuming.RULES`), or the file that is damaged.
    """
    same = resuming.Differences([], {})
    checkpoints = workdir / buckets.CHECKPOINTS if checkpoints is None else checkpoints
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir}: a file; accepted is a directory, or a name that is free")
    if (workdir / METRICS_FILE).exists():
        read_metrics(workdir / METRICS_FILE)
    path = workdir / "config.json"
    if not path.exists():
        if checkpoints.exists():
            raise ValueError(
                f"--workdir={workdir} holds checkpoints but no config.json that says whose; accepted is a"
                " directory with both, or with neither"
            )
        return same
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        resuming.flat(there)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--workdir={workdir}: its config.json is not a run's ({error})") from error
    steps = buckets.complete_steps(checkpoints)
    try:
        found = resuming.compare(there, settings, f"--workdir={workdir} holds a run")
    except ValueError as error:
        if steps:
            raise
        raise ValueError(f"{error}; no step of it is saved: it may be deleted") from error
    if max(steps, default=0) > settings.train.num_steps:
        raise ValueError(
            f"train.num_steps={settings.train.num_steps}: the run in {workdir} is at step {max(steps)}; accepted is that"
            " or more"
        )
    moved = {"data.source", "data.data_dir"} & found.changed.keys()
    if moved and "documents_sha256" not in read_run(workdir):
        raise ValueError(
            f"--workdir={workdir} does not say what text its run began with (run.json), so {' and '.join(sorted(moved))}"
            " may not change; accepted is the same there"
        )
    return found


def check_documents(workdir: Path, asked: str, fingerprints: dict[str, str]) -> None:
    """Refuses to go on with other text than the run began with; ``asked`` is what names it, FIELD=VALUE.

    Raises:
      ValueError: names the splits that differ.
    """
    known = read_run(workdir).get("documents_sha256", fingerprints)
    changed = [split for split in fingerprints if known.get(split) != fingerprints[split]]
    if changed:
        raise ValueError(
            f"{asked}: its {' and '.join(changed)} documents are not those that the run in {workdir}"
            " began with; accepted are the same files (was one removed, added or changed?), or another --workdir"
        )


def claim(workdir: Path, settings: Settings, lock: Lock, **facts: Any) -> None:
    """Makes the directory this run's; called when settings and data are known to be good.

    Args:
      facts: for `run.json`, there before the settings are: a start that ends in between has noted what it changes.

    Raises:
      ValueError: another process was faster.
      OSError: it, or its checkpoints' directory, can't be written; nothing was.
    """
    for directory in (workdir, workdir / "checkpoints"):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if directory.exists():  # Orbax makes the second one
                tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise OSError(error.errno, f"can't be written: {error.strerror}", str(directory)) from error
    lock.take()
    if facts:
        update_run(workdir, **facts)
    write_json(workdir / "config.json", to_dict(settings))


def read_run(workdir: Path | epath.Path) -> dict[str, Any]:
    """`run.json`, {} if there is none.

    Raises:
      ValueError: it is not what `update_run` writes.
    """
    path = workdir / "run.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); accepted is JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged; accepted is a JSON object")
    return values


def last_step(settings: Settings, known: dict[str, Any]) -> int:
    """The step that a run ends with: `train.num_steps`, or where its patience ended, as its `run.json` says."""
    return (known.get("stopped_early") or {}).get("step", settings.train.num_steps)


def update_run(workdir: Path, add: dict[str, float] | None = None, **values: Any) -> None:
    """Sets values in `run.json`; those in ``add`` are added to what is there."""
    known = read_run(workdir) | values
    for name, value in (add or {}).items():
        known[name] = known.get(name, 0) + value
    write_json(workdir / "run.json", known)
