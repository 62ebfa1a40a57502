"""Plans a training step on devices that are not here: ``python -m experiments.plan [smallest|layouts] [--OPTION=VALUE ...]``

  python -m experiments.plan --config=configs/switch_base.py --devices=32 --hbm=16GiB --layout=data_expert
  python -m experiments.plan smallest --config=configs/switch_c.py --device=v5p

Prints memory of a device, collectives, FLOPs and an estimated step time, with what is assumed; without
--layout (or with --layout=all) a line for each layout, with and without fsdp. ``smallest`` finds for each
the smallest power of two of devices in one slice that it fits on. ``layouts`` draws the layouts
(--out=DIR).

  --devices=N        devices in all (32); a core on tpu_v3, else a chip
  --device=NAME      tpu_v3 | tpu_v4 | v5e | v5p | a100 | h100 (tpu_v4)
  --hbm=SIZE         memory of a device, such as 32GiB or 80GB (the device's)
  --slices=N         slices that the devices are in (1)
  --layout=NAME      data | model | data_model | data_expert | data_expert_model | all
  --compile          compiles the step for so many virtual CPU devices, too; nothing is allocated

and --config=, --config.GROUP.FIELD= as `experiments.run` takes them. Exit codes: 0 done; 2 bad input;
3 the step does not fit; 4 a picture that can't be written.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import command_line, exits

DEFAULT_CONFIG = "configs/switch_base.py"
OPTIONS = {"devices": "32", "device": "tpu_v4", "hbm": "", "slices": "1", "layout": "", "out": "runs/plan"}
TAKES = {
    "plan": ("devices", "device", "hbm", "slices", "layout"),
    "smallest": ("device", "hbm", "layout"),
    "layouts": ("out",),
}
UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "TiB": 2**40}
EXIT_TOO_LARGE = 3
KIB_STEPS = ("B", "KiB", "MiB", "GiB", "TiB")


def main(argv: Sequence[str]) -> int:
    return exits.guarded("experiments.plan", lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    what, options, compiles, rest = _own(argv[1:])
    if what == "layouts":
        return _draw(Path(options["out"]))
    settings, _ = command_line.parse(
        [argv[0], *rest], DEFAULT_CONFIG, __doc__, own=[f"--{one}=" for one in TAKES[what]]
    )
    return _plan(what, settings, options, compiles)


def _own(arguments: Sequence[str]) -> tuple[str, dict[str, str], bool, list[str]]:
    """(what, this command's options, --compile, the other arguments)."""
    what, arguments = ("plan", list(arguments))
    if arguments and not arguments[0].startswith("-"):
        what = arguments.pop(0)
        if what not in TAKES:
            raise ValueError(f"argument {what}: accepted are smallest, layouts, or none")
    options, rest = dict(OPTIONS), []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in OPTIONS:
            if name not in TAKES[what]:
                raise ValueError(f"{argument}: {what} takes {', '.join(f'--{own}=' for own in TAKES[what])}")
            if not (equals and value):
                raise ValueError(f"--{name}: accepted is --{name}=VALUE")
            options[name] = value
        elif argument.startswith(("--config.mesh.layout=", "--workdir")):
            raise ValueError(f"{argument}: accepted by a plan is --layout=NAME, and nothing is written")
        else:
            rest.append(argument)
    if what == "layouts" and rest:
        raise ValueError(f"argument {rest[0]}: accepted by layouts is --out=DIR")
    compiles = "--compile" in rest
    return what, options, compiles, [argument for argument in rest if argument != "--compile"]


def _number(options: dict[str, str], name: str) -> int:
    if not options[name].isdecimal() or int(options[name]) < 1:
        raise ValueError(f"--{name}={options[name]}: accepted is an integer >= 1")
    return int(options[name])


def _size(text: str) -> float:
    for unit, size in UNITS.items():
        number = text.removesuffix(unit)
        try:
            if number != text and 0 < float(number) < math.inf:
                return float(number) * size
        except ValueError:
            break
    raise ValueError(
        f"--hbm={text}: accepted is a number > 0 and a unit of {', '.join(UNITS)}, such as 32GiB"
    )


def _plan(what: str, settings: Any, options: dict[str, str], compiles: bool) -> int:
    from switchmoe.data import batches
    from switchmoe.parallel import sharding
    from switchmoe.planning import planner

    devices, slices = _number(options, "devices"), _number(options, "slices")
    if options["device"] not in planner.DEVICES:
        raise ValueError(f"--device={options['device']}: accepted is one of {', '.join(planner.DEVICES)}")
    device = planner.DEVICES[options["device"]]
    hbm = _size(options["hbm"]) if options["hbm"] else device.hbm
    layout = options["layout"]
    if layout not in ("", "all", *sharding.LAYOUTS):
        raise ValueError(f"--layout={layout}: accepted is all, or one of {', '.join(sharding.LAYOUTS)}")
    if what == "plan":
        planner.check_slices(devices, slices, device)
    lengths = batches.lengths(settings.data)
    if layout in ("", "all") or what == "smallest":
        if compiles:
            raise ValueError("--compile: accepted with one --layout")
        names = sharding.LAYOUTS if layout in ("", "all") else [layout]
        target = devices, slices, device, hbm
        return 0 if _table(what, settings, lengths, names, target, options["device"]) else EXIT_TOO_LARGE
    settings = dataclasses.replace(settings, mesh=dataclasses.replace(settings.mesh, layout=layout))
    plan = planner.make(settings, lengths, devices, slices, device)
    print("\n".join(_report(plan, options["device"], lengths, hbm)))
    if compiles:
        print("\n".join(_compiled(plan, lengths)), flush=True)
    return 0 if plan.memory.peak <= hbm else EXIT_TOO_LARGE


def _table(what: str, settings: Any, lengths: dict, names: Any, target: tuple, name: str) -> bool:
    """Prints a line for each layout; returns whether any fits."""
    from switchmoe.planning import planner

    devices, slices, device, hbm = target
    where = f"{devices} x {name}, {slices} slice{'s' * (slices > 1)}" if what == "plan" else name
    print(
        f"{where}, {_bytes(hbm)} each; {settings.data.batch_size} sequences of {_tokens(lengths)},"
        f" remat {settings.model.remat}"
    )
    head = "devices" if what == "smallest" else "fits"
    print(
        f"{'layout':<18} {'fsdp':<5} {head:<8} {'mesh':>12} {'state':>10} {'peak':>10} {'bound':>9} {'step':>9}"
    )
    any_fits = False
    for layout in names:
        for fsdp in (False, True):
            chosen = planner.with_layout(settings, layout, fsdp)
            row = f"{layout:<18} {'yes' if fsdp else 'no':<5} "
            try:
                plan, why = planner.smallest(chosen, lengths, device, hbm) if what == "smallest" else (
                    planner.make(chosen, lengths, devices, slices, device), ""
                )  # fmt: skip
            except ValueError as error:
                plan, why = None, str(error)
            if plan is None:
                print(f"{row}{'none' if what == 'smallest' else 'no':<8} {why}")
                continue
            any_fits |= what == "smallest" or plan.memory.peak <= hbm
            fits = plan.devices if what == "smallest" else "yes" if plan.memory.peak <= hbm else "no"
            mesh = "x".join(str(plan.inner[axis] * plan.outer[axis]) for axis in plan.inner)
            state = plan.memory.parameters + plan.memory.optimizer
            print(
                f"{row}{fits:<8} {mesh:>12} {_bytes(state):>10} {_bytes(plan.memory.peak):>10}"
                f" {_seconds(plan.bound):>9} {_seconds(plan.seconds):>9}"
            )
    return any_fits


def _report(plan: Any, name: str, lengths: dict[str, int], hbm: float) -> list[str]:
    from switchmoe.planning import planner

    mesh, settings, m = plan.settings.mesh, plan.settings, plan.memory
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.inner.items())
    slices = " x ".join(f"{axis} {size}" for axis, size in plan.outer.items() if size > 1)
    fits = f"fits {_bytes(hbm)}, {_bytes(hbm - m.peak)} left"
    if m.peak > hbm:
        fits = f"does not fit {_bytes(hbm)}: {_bytes(m.peak - hbm)} too much"
    lines = [
        f"{mesh.layout}{' with fsdp' if mesh.fsdp else ''} on {plan.devices} x {name}: {axes}"
        + (f"; slices: {slices}" if slices else ""),
        f"{settings.data.batch_size} sequences of {_tokens(lengths)},"
        f" {settings.model.dtype}, remat {settings.model.remat}, {settings.optimizer.name}",
        "",
        f"memory of a device: {fits}",
        _line("parameters", _bytes(m.parameters)),
        _line("optimizer state", _bytes(m.optimizer)),
        _line("gradients", _bytes(m.gradients)),
        _line("activations kept", _bytes(m.activations)),
        _line("kernels kept", _bytes(m.kernels), settings.model.dtype),
        _line("peak", _bytes(m.peak), f"in the {m.phase}, which itself needs {_bytes(m.working)}"),
        "",
        f"{'collectives of a step':<33} {'calls':>6} {'ICI':>10} {'DCN':>10}  sent by a device",
    ]
    for t in plan.transfers:
        lines.append(f"  {t.kind:<14} {t.purpose:<16} {t.count:>6} {_bytes(t.ici):>10} {_bytes(t.dcn):>10}")
    parts = ", ".join(f"{part} {_seconds(seconds)}" for part, seconds in plan.parts.items())
    lines += [
        "",
        "time",
        _line("model FLOPs", f"{plan.model_flops:.3g}", f"hardware {plan.hardware_flops:.3g}"),
        _line("bound", _seconds(plan.bound), "the model's FLOPs at peak"),
        _line("step", _seconds(plan.seconds), parts),
        _line("sequences/s", f"{settings.data.batch_size / plan.seconds:,.0f}"),
        "",
        f"assumed: {name}: {plan.device.flops / 1e12:.4g} TFLOP/s bf16, HBM {plan.device.bandwidth / 1e9:.4g} GB/s,"
        f" ICI {plan.device.ici / 1e9:.4g} GB/s, DCN {plan.device.dcn / 1e9:.4g} GB/s ({plan.device.source})",
        *(f"  {assumption}" for assumption in planner.ASSUMPTIONS),
    ]
    return lines


def _compiled(plan: Any, lengths: dict[str, int]) -> list[str]:
    from switchmoe.planning import aot

    sizes = tuple(plan.inner[axis] * plan.outer[axis] for axis in plan.inner)
    found = aot.measure(plan.settings, lengths, sizes)
    lines = [
        "",
        f"compiled for {plan.devices} virtual CPU devices in {found['seconds']:.0f} s",
        _line("arguments", _bytes(found["argument_bytes"])),
        _line("temporaries", _bytes(found["temporary_bytes"])),
        _line("peak", _bytes(found["peak_bytes"]), f"estimated {_bytes(plan.memory.peak)}"),
    ]
    for kind, count in found["collectives"].items():
        lines.append(_line(kind, f"{count['count']} calls", f"results of {_bytes(count['bytes'])}"))
    lines.append(
        "  calls in the scan over layers are written, and counted, once; a CPU computes bfloat16 in float32"
    )
    return lines


def _line(name: str, value: str, remark: str = "") -> str:
    return f"  {name:<18} {value:>12}  {remark}".rstrip()


def _tokens(lengths: dict[str, int]) -> str:
    return f"{' / '.join(map(str, lengths.values()))} tokens"


def _bytes(size: float) -> str:
    unit = 0
    while abs(size) >= 1000 and unit < len(KIB_STEPS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {KIB_STEPS[unit]}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _draw(directory: Path) -> int:
    from experiments.plan import layouts

    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--out={directory}: accepted is a directory")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "layouts.png"
    layouts.picture(4, 4).savefig(path, dpi=110)
    print(path)
    return 0


if __name__ == "__main__":
    exits.leave("experiments.plan", main)
