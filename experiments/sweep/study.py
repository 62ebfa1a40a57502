"""What a sweep is: a config, the products of its overrides, and what each run will cost.

A sweep's config is an ordinary one, whose ``get_config()`` is the base of all runs, with a second function
``get_sweep()``: a list of products, each ``{"group.field": [values]}``. The runs are those of all products,
in their order. Fields that go together, such as the options of one router, are a product of their own.

A run may begin with another one of the sweep, or learn from it, which is then made before: ``init.checkpoint`` or
``distill.teacher`` is all of the other's overrides, ``"moe.num_experts=1,train.seed=0"`` (`reference`).
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import command_line, process
from switchmoe.runs import resuming, rundir
from switchmoe.runs.reporting import duration
from switchmoe.settings import Settings, from_config, to_dict

DEFAULT_CONFIG = "configs/sweeps/experts_tiny.py"
DEFINITION_FILE = "sweep.json"
REFERENCES = ("init.checkpoint", "distill.teacher")  # fields that may name another run of the sweep
LONGEST = 160  # letters of a run's name, after which a hash stands for the rest
ASSUMED_PEAK_SHARE = 0.3  # of the matrix-product peak, until a run of this sweep is done


@dataclasses.dataclass(frozen=True)
class Run:
    name: str  # its overrides, and its directory in the sweep's
    overrides: dict[str, Any]
    settings: Settings
    parents: dict[str, str] = dataclasses.field(default_factory=dict)  # runs of `REFERENCES`, by the field


@dataclasses.dataclass(frozen=True)
class Sweep:
    workdir: Path
    arguments: list[str]  # of `experiments.run`, for the base config
    base: Settings
    runs: list[Run]
    whole: list[
        Run
    ]  # all runs of the directory; ``runs`` are those asked for, each with a line in `results.csv`


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run: all parameters, those of a token, and per step FLOPs and real tokens of both stacks."""

    parameters: int
    parameters_active: int
    flops: float
    tokens: int
    places: int  # tokens and padding


def read(argv: Sequence[str], doc: str, only: Sequence[dict[str, Any]] | None = None) -> Sweep:
    """The sweep of a command line, every run's settings validated; ``only`` asks for the runs with these overrides.

    Raises:
      ValueError: one line; where a run is at fault, its name, field, value and what would be accepted.
    """
    base, workdir = command_line.parse(
        argv, DEFAULT_CONFIG, doc, own=("--launcher=", "--resources=", "--dry_run")
    )
    arguments = command_line.joined(argv[1:])
    chosen = [a.lstrip("-").partition("=")[2] for a in arguments if a.lstrip("-").startswith("config=")]
    config = command_line.resolve(chosen[-1] if chosen else DEFAULT_CONFIG)
    overridden = [a for a in arguments if re.match(r"--?(no)?config\.", a)]
    products = _products(config.partition(":")[0])
    varied = {field for product in products for field in product}
    each = [
        dict(zip(product, values, strict=True))
        for product in products
        for values in itertools.product(*product.values())
    ]
    # What fine-tuned runs alone say of themselves may be said of the others.
    fixed = {field for one in [o for o in each if not o.get("task.names")] or each for field in one}
    for argument in overridden:
        field = re.sub(r"^--?(no)?config\.|=.*$", "", argument)
        if field in fixed:
            raise ValueError(f"{argument}: accepted are fields that the sweep does not vary")
    names = {reference(overrides): _name(overrides, varied) for overrides in each}
    runs = [_run(base, overrides, varied, Path(workdir), names) for overrides in each]
    for name, same in itertools.groupby(sorted(run.name for run in runs)):
        if len(list(same)) > 1:
            raise ValueError(
                f"get_sweep(): two runs {name}; accepted are runs that differ in their overrides"
            )
    wanted = {run.name for run in runs if only is None or run.overrides in only}
    parents = {run.name: run.parents.values() for run in runs}
    after = list(wanted)
    for name in after:  # with what they need, and what that needs
        after += parents[name]
    wanted.update(after)
    asked = [run for run in runs if run.name in wanted]
    return Sweep(Path(workdir), [f"--config={config}", *overridden], base, asked, runs)


def _products(path: str) -> list[dict[str, list]]:
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_sweep"):
        raise ValueError(
            f"--config={path}: no sweep; accepted is a config with get_sweep(), as {DEFAULT_CONFIG}"
        )
    try:
        products = module.get_sweep()
    except Exception as error:  # whatever a user's code raises
        raise ValueError(
            f"--config={path}: get_sweep(): {type(error).__name__}: {error}; accepted is a list of products"
        ) from error
    if not (products and isinstance(products, list) and all(p and isinstance(p, dict) for p in products)):
        raise ValueError(f"get_sweep()={products!r}: accepted is a list of {{'group.field': [values]}}")
    for field, values in (item for product in products for item in product.items()):
        if not (isinstance(field, str) and field.count(".") == 1 and values and isinstance(values, list)):
            raise ValueError(f"get_sweep(): {field!r}: {values!r}: accepted is 'group.field': [values]")
    return products


def reference(overrides: dict[str, Any]) -> str:
    """What ``init.checkpoint`` of another run of the sweep calls the run with these overrides."""
    return ",".join(f"{field}={value}" for field, value in overrides.items())


def _name(overrides: dict[str, Any], varied: set[str]) -> str:
    name = ",".join(f"{_short(field, varied)}={_word(value)}" for field, value in overrides.items())
    if len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{hashlib.sha256(reference(overrides).encode()).hexdigest()[:8]}"


def _run(
    base: Settings, overrides: dict[str, Any], varied: set[str], workdir: Path, names: dict[str, str]
) -> Run:
    name, groups = _name(overrides, varied), to_dict(base)
    parents = {field: names[overrides[field]] for field in REFERENCES if overrides.get(field) in names}
    own = overrides | {field: str(workdir / parent) for field, parent in parents.items()}
    for path, value in own.items():
        group, field = path.split(".")
        groups.setdefault(group, {})[field] = value
    try:
        return Run(name, overrides, from_config(groups), parents)
    except ValueError as error:
        raise ValueError(f"run {name}: {error}") from error


def _short(field: str, varied: set[str]) -> str:
    """The field without its group, where no other that varies is called so."""
    short = field.partition(".")[2]
    return field if [other.partition(".")[2] for other in varied].count(short) > 1 else short


def _word(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]", "_", str(value))


def _idle(run: Run) -> list[str]:
    """The run's own overrides that nothing reads."""
    from switchmoe.model.moe_rules import without_effect

    idle = without_effect(run.settings.moe, run.settings.stacks)
    return [f"moe.{name}" for name in idle if f"moe.{name}" in run.overrides]


def check_directory(sweep: Sweep) -> None:
    """Refuses a directory with another sweep, or with other runs under this one's names. A sweep may grow.

    Raises:
      ValueError: names the fields or runs that differ.
    """
    where = f"--workdir={sweep.workdir}"
    if (sweep.workdir / "config.json").exists():
        raise ValueError(f"{where} holds a run; accepted is a directory of this sweep, or a new one")
    found = read_definition(sweep.workdir)
    if found is not None:
        resuming.compare(found["base"], sweep.base, f"{where} holds another sweep, or this one")
        here = definition(sweep)["runs"]
        different = [
            f"run {name} ({value} there, {here.get(name, 'none')} asked)"
            for name, value in found["runs"].items()
            if here.get(name) != value
        ]
        if different:
            more = f" and {len(different) - 2} more" if len(different) > 2 else ""
            raise ValueError(
                f"{where} holds another sweep: {', '.join(different[:2])}{more}; accepted is the same one with the same"
                " or more runs, or another --workdir"
            )
    for run in sweep.whole:
        rundir.check(sweep.workdir / run.name, run.settings)


def definition(sweep: Sweep) -> dict[str, Any]:
    """What `sweep.json` holds."""
    return {"base": to_dict(sweep.base), "runs": {run.name: run.overrides for run in sweep.whole}}


def read_definition(workdir: Path) -> dict[str, Any] | None:
    """What `sweep.json` holds, None if there is none.

    Raises:
      ValueError: it is not what a sweep wrote.
    """
    path = workdir / DEFINITION_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        resuming.flat(found["base"])
        found["runs"].items()
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); accepted is what a sweep wrote") from error
    return found


def survey(runs: Sequence[Run], measure: bool, here: bool = True) -> tuple[list[Cost], float]:
    """Costs of the runs, and the FLOP/s of this machine's matrix products, 0 unless asked to ``measure``.

    Takes the devices, which some platforms give to one process at a time: call it in one of its own. Where
    runs are not for this machine's (``here``), it takes its CPU, and leaves the layouts to the runs.

    Raises:
      ValueError: a run that this machine's devices, its router or its text's lengths do not allow.
    """
    import jax

    from switchmoe.data import batches
    from switchmoe.parallel import sharding
    from switchmoe.planning import flops
    from switchmoe.runs import kinds
    from switchmoe.training import train_state

    if not here:
        jax.config.update("jax_platforms", "cpu")
    process.check_devices()
    costs = []
    for run in runs:
        data = run.settings.data
        try:
            lengths = kinds.of(run.settings).lengths(run.settings)
            if here:
                mesh = sharding.make_mesh(run.settings.mesh)
                sharding.check(run.settings, lengths, mesh.shape)
        except ValueError as error:
            raise ValueError(f"run {run.name}: {error}") from None
        counts = train_state.parameter_counts(run.settings)
        work = flops.train_flops(run.settings, lengths)
        places = data.batch_size * sum(lengths.values())
        # How much of a task's rows is padding is not known before they are read.
        real = places if run.settings.task.names else data.batch_size * batches.real_tokens(data)
        costs.append(Cost(*counts, work, real, places))
    peak = flops.matmul_peak(runs[0].settings.model.dtype) * jax.device_count() if measure else 0.0
    return costs, peak


def table(sweep: Sweep, costs: Sequence[Cost], peak: float, results: Sequence[dict[str, Any]]) -> str:
    """The runs with their parameters, FLOPs, tokens, and the seconds of training: predicted, or taken if done.

    A run that is not done is predicted from the share of the peak that the done run nearest to it in
    parameters reached: more experts take more time for the same FLOPs.
    """
    done = [
        (cost.parameters, cost.flops / cost.tokens * result["tokens_per_second"] / peak)
        for cost, result in zip(costs, results, strict=True)
        if result["state"] == "done" and result["tokens_per_second"]
    ]
    rows = [("run", "parameters", "per token", "FLOPs a step", "FLOPs", "tokens", "time")]
    left = total = 0.0
    for run, cost, result in zip(sweep.runs, costs, results, strict=True):
        steps = run.settings.train.num_steps
        nearest = (
            min(done, key=lambda d, p=cost.parameters: abs(d[0] - p)) if done else (0, ASSUMED_PEAK_SHARE)
        )
        if result["state"] == "done" and result["seconds"] is not None:
            time = f"{duration(result['seconds'])} (done)"
        else:
            seconds = cost.flops * steps / (peak * nearest[1])
            left += seconds
            time = duration(seconds)
        total += cost.flops * steps
        counts = (f"{n / 1e6:,.2f} M" for n in (cost.parameters, cost.parameters_active))
        tokens = f"{cost.tokens * steps / 1e6:,.1f} M"
        if cost.places != cost.tokens:
            tokens += f" ({cost.places * steps / 1e6:,.1f} M padded)"
        rows.append((run.name, *counts, f"{cost.flops:.3g}", f"{cost.flops * steps:.3g}", tokens, time))
    lines = [command_line.aligned(rows)]
    lines += [f"{run.name}: without effect: {', '.join(idle)}" for run in sweep.runs if (idle := _idle(run))]
    shares = ", ".join(f"{share:.0%}" for _, share in done)
    basis = f"the {shares} of done runs" if done else f"an assumed {ASSUMED_PEAK_SHARE:.0%}"
    lines.append(
        f"{len(sweep.runs)} runs, {total:.3g} FLOPs; {duration(left)} of training to come, at {basis} of the"
        f" {peak / 1e9:,.0f} GFLOP/s of matrix products here (compilation, evaluation and start-up come on top)"
    )
    return "\n".join(lines)
