"""Stores of experts for tests, written of parameters in memory."""

import time

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from switchmoe.inference.offload.store import Writer
from switchmoe.interop import expert_store
from switchmoe.quantised import SCALE, quantise
from switchmoe.runs import slimming


def write(of, params, directory, form="float32", kept_forms=None):
    """The layers' descriptions; ``kept_forms``: each expert's, by layer."""
    directory.mkdir(exist_ok=True)
    flat = flatten_dict(params, sep="/")
    forms = kept_forms or expert_store.alike(of, form)
    layers, there = expert_store.described(of, forms), slimming.kernels(of)
    writer = Writer(directory, layers)
    for number, (layer, kernels) in enumerate(zip(layers, there.values(), strict=True)):
        for kernel, (name, index) in kernels.items():
            for expert in range(len(layer.forms)):
                part = np.asarray(flat[name][(*index, expert)])
                writer.write(number, expert, expert_store.lying(layer, expert, kernel, part))
    writer.finish({"step": "1"})
    return layers


def without_experts(params):
    kept = {name: value for name, value in flatten_dict(params).items() if "experts" not in name}
    return unflatten_dict(kept)


def as_integers(of, params):
    """The parameters of a model with `moe.expert_bits`, of one without."""
    found = {}
    for name, value in flatten_dict(params).items():
        if "experts" not in name:
            found[name] = value
            continue
        lead = value.shape[: value.ndim - 2 if "moe" in name else value.ndim - 3]
        whole = np.asarray(value).reshape(
            -1, value.shape[len(lead)], int(np.prod(value.shape[len(lead) + 1 :]))
        )
        codes, scale = quantise(whole, of.moe.expert_bits, of.moe.expert_group)
        found[name] = codes.reshape(*lead, *codes.shape[1:])
        found[(*name[:-1], name[-1] + SCALE)] = scale.reshape(*lead, *scale.shape[1:])
    return unflatten_dict(found)


def asks(*experts):
    """Rows of these, of 20."""
    rows_E = np.zeros(20, np.int32)
    rows_E[list(experts)] = 1
    return rows_E


def until(done):
    for _ in range(500):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be")
