"""The training step compiled ahead of time for devices that are not there: virtual CPUs, shapes only.

XLA partitions the step as it would for that many accelerators, so its collectives are those of a real run;
its memory analysis is that of its CPU back end. Of one device alone that is without whole logits, which an accelerator has
(`model.output_loss`).
"""

import collections
import json
import math
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from switchmoe.data.batches import array_lengths
from switchmoe.parallel import sharding
from switchmoe.settings import Settings, from_config, to_dict
from switchmoe.training import train_state, train_step

COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


def compile_step(settings: Settings, lengths: dict[str, int], mesh: Mesh) -> jax.stages.Compiled:
    """The training step on the mesh; no array is made."""
    where = sharding.batch_sharding(mesh)
    tokens = {
        name: jax.ShapeDtypeStruct((settings.data.batch_size, length), jnp.int32, sharding=where)
        for name, length in array_lengths(lengths).items()
    }
    tx = train_state.optimizer(settings)
    with jax.set_mesh(mesh), sharding.rules(settings):
        return train_step.compile_step(settings, tx, train_state.sharded_state(settings, tx, mesh), tokens)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, temporaries, and outputs that don't take an argument's place, of one device."""
    found = compiled.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + outputs


def collectives(text: str) -> dict[str, dict[str, int]]:
    """``{kind: {count, bytes}}`` of an HLO text: calls as written, and their results' bytes on one device.

    A call in the body of a scan over layers is written once.
    """
    pattern = re.compile(rf"^.* = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", re.MULTILINE)
    found: dict[str, collections.Counter] = {kind: collections.Counter() for kind in COLLECTIVES}
    for shapes, kind in pattern.findall(text):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        size = sum(
            ITEM_BYTES.get(item, 4) * math.prod(map(int, dims.split(",")))
            if dims
            else ITEM_BYTES.get(item, 4)
            for item, dims in sizes
        )
        found[kind].update(count=1, bytes=size)
    return {kind: dict(counter) for kind, counter in found.items() if counter}


def measure(settings: Settings, lengths: dict[str, int], sizes: tuple[int, ...]) -> dict[str, Any]:
    """`peak_bytes`, `collectives` and seconds of the step for so many devices along data, expert, model.

    Compiled in a process of its own, as the number of virtual devices is fixed when JAX starts.

    Raises:
      ValueError: the compilation failed; its last line.
    """
    flag = f"--xla_force_host_platform_device_count={math.prod(sizes)}"
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    environment = os.environ | {"XLA_FLAGS": " ".join([*kept, flag]), "JAX_PLATFORMS": "cpu"}
    asked = {"settings": to_dict(settings), "lengths": lengths, "sizes": sizes}
    done = subprocess.run(
        [sys.executable, "-m", "switchmoe.planning.aot"],
        input=json.dumps(asked),
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"the step can't be compiled for {math.prod(sizes)} virtual devices: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    devices = np.array(jax.devices()).reshape(asked["sizes"])
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * devices.ndim)
    started = time.monotonic()
    compiled = compile_step(from_config(asked["settings"]), asked["lengths"], mesh)
    return {
        "peak_bytes": peak_bytes(compiled),
        "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
        "seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
