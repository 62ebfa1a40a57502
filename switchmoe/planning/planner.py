"""The plan of a training step on devices that are not here: memory, collectives, FLOPs, time.

Everything is arithmetic on shapes (`memory`, `communication`, `flops`) and on a table of devices. What is
assumed beyond that is in `ASSUMPTIONS`.
"""

import dataclasses
import math
from typing import NamedTuple

from switchmoe.model.moe_rules import dispatch_name, expert_width, group_shape, router_name
from switchmoe.parallel import sharding
from switchmoe.planning import communication, flops, memory
from switchmoe.settings import Settings

GB, GIB = 1e9, 2**30
ASSUMPTIONS = (
    "FLOPs: matrix products only; the backward pass costs twice the forward, remat the forward once more",
    "hardware FLOPs: experts compute all slots of their buffers, so the capacity factor counts",
    "memory traffic: parameters, optimizer state and gradients four times, saved activations twice",
    "time: max(hardware FLOPs at peak, memory traffic) + ICI + DCN at full bandwidth, nothing overlapped",
    "memory: what JAX saves for the backward pass, kernels' copies, and XLA's working space as on a CPU",
    "gradients and gathered parameters travel in the activations' type",
)


class Device(NamedTuple):
    """What one JAX device has; bandwidths in bytes/s, of links those that it sends in all."""

    flops: float  # bfloat16 peak
    hbm: float  # bytes
    bandwidth: float
    ici: float
    dcn: float
    slice: int  # devices that the ICI joins: a pod, or the GPUs of a host; of the same source
    source: str


_TPU = "cloud.google.com/tpu/docs"
_V3 = f"{_TPU}/v3, half a chip: a device is a core; ICI: 340 TB/s a pod; DCN assumed 100 Gbit/s a host"
_A100 = "A100 data sheet 1758950-r4, 80 GB SXM: NVLink 600 GB/s both ways; DGX A100: 200 Gbit/s a GPU"
_H100 = "H100 data sheet, SXM, no sparsity: NVLink 900 GB/s both ways; docs.nvidia.com/dgx-basepod: 400 Gbit/s a GPU"
DEVICES = {
    "tpu_v3": Device(61.5e12, 16 * GIB, 450 * GB, 166 * GB, 1.6 * GB, 2048, _V3),
    "tpu_v4": Device(
        275e12,
        32 * GIB,
        1200 * GB,
        268 * GB,
        6.25 * GB,
        4096,
        f"{_TPU}/v4; ICI: 1.1 PB/s a pod; DCN assumed as v5p's",
    ),
    "v5e": Device(197e12, 16 * GB, 819 * GB, 200 * GB, 3.125 * GB, 256, f"{_TPU}/v5e; DCN: 6.4 Tbit/s a pod"),
    "v5p": Device(
        459e12,
        95 * GIB,
        2765 * GB,
        600 * GB,
        6.25 * GB,
        8960,
        f"{_TPU}/v5p; ICI: 1,200 GB/s both ways; DCN: 50 Gbit/s",
    ),
    "a100": Device(312e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 8, _A100),
    "h100": Device(989e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 8, _H100),
}


class Plan(NamedTuple):
    """Of one step; bytes and seconds are of one device, FLOPs of all."""

    settings: Settings
    device: Device
    inner: dict[str, int]
    outer: dict[str, int]
    memory: memory.Memory
    transfers: list[communication.Transfer]
    model_flops: float
    hardware_flops: float

    @property
    def devices(self) -> int:
        return math.prod(_product(self.inner, self.outer).values())

    @property
    def bound(self) -> float:
        """Seconds of the model's FLOPs at peak: no step is faster."""
        return self.model_flops / self.devices / self.device.flops

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each resource; what devices along `model` repeat, routers and one-hot masks, counts as divided."""
        m = self.memory
        traffic = 4 * (m.parameters + m.optimizer + m.gradients) + 2 * m.activations
        return {
            "compute": self.hardware_flops / self.devices / self.device.flops,
            "memory": traffic / self.device.bandwidth,
            "ICI": sum(t.ici for t in self.transfers) / self.device.ici,
            "DCN": sum(t.dcn for t in self.transfers) / self.device.dcn,
        }

    @property
    def seconds(self) -> float:
        parts = self.parts
        return max(parts["compute"], parts["memory"]) + parts["ICI"] + parts["DCN"]


def make(settings: Settings, lengths: dict[str, int], devices: int, slices: int, device: Device) -> Plan:
    """The plan of ``settings.mesh`` on so many devices in so many slices.

    Raises:
      ValueError: as `check_slices`; devices, batch, groups, experts or widths that do not divide; one line.
    """
    check_slices(devices, slices, device)
    inner, outer = _sizes(settings, lengths, devices, slices)
    mesh = _product(inner, outer)
    boxes = memory.abstract_state(memory.without_mesh(settings))[1]
    return Plan(
        settings,
        device,
        inner,
        outer,
        memory.estimate(settings, lengths, mesh),
        communication.transfers(settings, boxes, lengths, inner, outer),
        flops.train_flops(settings, lengths),
        hardware_flops(settings, lengths, mesh),
    )


def check_slices(devices: int, slices: int, device: Device) -> None:
    """Refuses more devices in a slice than it has."""
    if devices > slices * device.slice:
        name = next((name for name, known in DEVICES.items() if known == device), "this device")
        raise ValueError(
            f"--devices={devices}: accepted with --device={name} is at most {device.slice} a slice"
            f" (--slices={-(-devices // device.slice)})"
        )


def _sizes(
    settings: Settings, lengths: dict[str, int], devices: int, slices: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Devices along each axis within a slice, and slices along it, once `sharding.check` accepts them."""
    if devices % slices:
        raise ValueError(f"--slices={slices}: accepted is a divisor of --devices={devices}")
    inner, outer = (
        dict(zip(sharding.AXES, sizes, strict=True))
        for sizes in sharding.axis_sizes(settings.mesh, devices, slices)
    )
    sharding.check(settings, lengths, _product(inner, outer))
    return inner, outer


def _product(inner: dict[str, int], outer: dict[str, int]) -> dict[str, int]:
    return {axis: inner[axis] * outer[axis] for axis in inner}


def hardware_flops(settings: Settings, lengths: dict[str, int], mesh: dict[str, int]) -> float:
    """FLOPs of one step as they are computed: empty slots and one-hot masks too, and with remat the forward twice."""
    model, moe, data, accumulate = settings.model, settings.moe, settings.data, settings.train.accumulate
    work = data.batch_size * sum(flops.forward_flops(settings, lengths).values())
    shards = mesh["data"] * mesh["expert"]
    projections = flops.attention_expert(model) if moe.attention else 0
    expert = flops.kernels(model) * model.d_model * expert_width(model, moe)
    for stack in settings.sparse_stacks:
        length, causal, layers = lengths[stack], stack == "decoder", len(settings.sparse_blocks(stack))
        batch = data.batch_size // accumulate // shards
        rows = communication.buffer_rows(settings, stack, length, batch, mesh) * shards * accumulate
        if not moe.dropless:
            empty = rows - data.batch_size * flops.expert_rows(settings, causal, length)
            work += 2.0 * layers * empty * (expert + projections)
        if dispatch_name(moe, causal) == "einsum" and router_name(moe, causal) != "soft":
            _, tokens = group_shape(data.batch_size // accumulate, length, moe.group_size)
            widths = 2 * model.d_model + (moe.attention and model.d_model + projections // model.d_model)
            work += 2.0 * layers * rows * tokens * widths
    return (4 if model.remat else 3) * work


def with_layout(settings: Settings, layout: str, fsdp: bool) -> Settings:
    """The layout with the mesh's sizes as they are set, but for axes on which it lays nothing."""
    unused = set(sharding.AXES) - sharding.used_axes(layout)
    mesh = dataclasses.replace(settings.mesh, layout=layout, fsdp=fsdp, **dict.fromkeys(unused, 0))
    return dataclasses.replace(settings, mesh=mesh)


def smallest(
    settings: Settings, lengths: dict[str, int], device: Device, hbm: float, largest: int = 8192
) -> tuple[Plan | None, str]:
    """The plan on the fewest devices, a power of two in one slice, that fits ``hbm`` bytes.

    Where the layout has a model axis beside another one and `mesh.model` is 0, all its sizes are tried.

    Returns:
      (plan, ""), or (None, what the most devices that can hold it would need, and why not more).
    """
    layout = sharding.LAYOUTS[settings.mesh.layout]
    models = [settings.mesh.model]
    if layout.sizes["model"] > 1 and not settings.mesh.model:
        models = [2**n for n in range(1, 8)]
    missed, refused, largest = None, "", min(largest, device.slice)
    for devices in (2**n for n in range(largest.bit_length())):
        for model in models:
            chosen = dataclasses.replace(settings, mesh=dataclasses.replace(settings.mesh, model=model))
            try:
                sizes = _sizes(chosen, lengths, devices, 1)
            except ValueError as error:
                refused = refused or f"{devices} devices: {error}"
                continue
            mesh = _product(*sizes)
            least = sum(memory.state_bytes(chosen, mesh)) + memory.trained_bytes(chosen, mesh)
            missed, refused = (chosen, devices), ""
            if least <= hbm:  # else state and gradients alone are too much
                plan = make(chosen, lengths, devices, 1, device)
                if plan.memory.peak <= hbm:
                    return plan, ""
    if missed:
        peak = make(missed[0], lengths, missed[1], 1, device).memory.peak
        refused = (
            f"{missed[1]} devices: {peak / GIB:.0f} GiB; {refused or f'a slice has no more than {largest}'}"
        )
    return None, refused
