"""docs/router_mathematics.md: every case worked out by hand there is what the router gives."""

import ast
import importlib
import json
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchmoe.routing import ROUTERS, RouterSettings

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "router_mathematics.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def routed(name, case):
    case = dict(case)
    key = jax.random.key(0) if case.pop("train", False) else None
    if "ids" in case:
        scores = jnp.array(case.pop("ids"), jnp.int32)
    else:
        scores = np.log(np.array(case.pop("exp_logits"), np.float64))
        more = np.array(case.pop("more_columns", []), np.float64)
        scores = np.concatenate([scores, np.broadcast_to(more, (len(scores), len(more)))], axis=1)
        scores = jnp.array(scores, jnp.float32)
    return ROUTERS[name](scores, jnp.ones(len(scores), bool), key, RouterSettings(**case))


def rows(section, column):
    """A column of the section's table; None where it has a dash."""
    header, _, *lines = [
        line.strip("| ").split(" | ") for line in re.findall(r"^\|.*\|$", section, re.MULTILINE)
    ]
    at = header.index(column)
    return [[None if part == "-" else float(part) for part in line[at].split(", ")] for line in lines]


def test_every_router_has_a_section():
    assert list(SECTIONS) == list(ROUTERS)


@pytest.mark.parametrize("name", SECTIONS)
def test_it_stands_beside_its_code(name):
    """A link for those who read the page as it is, and the function itself on the site."""
    ((shown, place),) = re.findall(r"^Code: \[`(\w+)`\]\((.+)\)$", SECTIONS[name], re.MULTILINE)
    assert ROUTERS[name] is vars(importlib.import_module(ROUTERS[name].__module__))[shown]
    file = (DOCS / place).resolve()
    assert ".".join(file.relative_to(DOCS.parent).with_suffix("").parts) == ROUTERS[name].__module__
    functions = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert shown in functions
    reference = runpy.run_path(str(DOCS / "reference.py"))
    included = reference["with_code"](SECTIONS[name]).split("```{literalinclude} ")
    assert len(included) == 2 and included[1].startswith(f"{place}\n:pyobject: {shown}\n```\n")


@pytest.mark.parametrize("name", SECTIONS)
def test_by_hand(name):
    section = SECTIONS[name]
    routing = routed(name, json.loads(re.search(r"```json\n(.*?)```", section, re.DOTALL)[1]))
    gates = rows(section, "gate")
    np.testing.assert_array_equal(routing.expert_SK, rows(section, "expert"))
    np.testing.assert_allclose(routing.gate_SK, [[gate or 0.0 for gate in row] for row in gates], atol=1e-6)
    np.testing.assert_array_equal(routing.kept_SK, [[gate is not None for gate in row] for row in gates])
    for token, slots in enumerate(rows(section, "slot")):
        for choice, slot in enumerate(slots):
            assert slot is None or routing.slot_SK[token, choice] == slot
    if name == "soft":
        np.testing.assert_allclose(routing.mix_SK, rows(section, "mix"), atol=1e-6)
    told = {key: float(value) for key, value in re.findall(r"`(\w+) = ([\d.]+)`", section)}
    dropped = told.pop("dropped", 0.0)
    assert float(routing.fraction_dropped) == pytest.approx(dropped, abs=1e-6)
    assert {key: float(value) for key, value in routing.losses.items()} == pytest.approx(told, abs=2e-5)


def test_the_hash_with_integers_of_python():
    case = json.loads(re.search(r"```json\n(.*?)```", SECTIONS["hash"], re.DOTALL)[1])

    def mixed(token, expert):
        x = (token * 0x9E3779B9 ^ expert * 0x7FEB352D) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    for token, (expert,) in zip(case["ids"], rows(SECTIONS["hash"], "expert"), strict=True):
        assert expert == max(range(case["num_experts"]), key=lambda e, token=token: mixed(token, e))


def test_the_bias_of_loss_free_is_pulled_towards_even_loads():
    def bias(bias_E):
        logits_SE = jnp.log(jnp.array([[0.6, 0.4], [0.7, 0.3], [0.55, 0.45]]))
        scores_S2E = jnp.concatenate([logits_SE, jnp.broadcast_to(bias_E[None], (3, 2))], axis=1)
        return ROUTERS["loss_free"](scores_S2E, jnp.ones(3, bool), None, RouterSettings(3)).losses["bias"]

    np.testing.assert_allclose(jax.grad(bias)(jnp.array([-0.08, 0.08])), [1 / 6, -1 / 6], atol=1e-6)
