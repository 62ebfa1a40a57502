"""A run's parts: another objective, another judge, another start go through the same loop."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from test_run import TINY

from experiments import command_line
from switchmoe.analysis import report
from switchmoe.runs import loop, text
from switchmoe.runs.parts import Kind
from switchmoe.runs.reporting import Progress, read_metrics
from switchmoe.training.objective import Objective

# Draws the embeddings to a length, and judges how far they are from it.


def lengths(params, batch, settings, key):
    return {"off": ((jnp.linalg.norm(params["embedding"], axis=-1) - 3.0) ** 2).mean()}


def rows(batch):
    return {"encoder": jnp.float32(len(batch["inputs"])), "decoder": jnp.zeros(())}


def summarize(sums, counts, settings):
    return {"loss": sums["off"], "off": sums["off"]}


class Longest:
    name = "embeddings"

    def compile(self, params):
        self.longest = jax.jit(lambda p: jnp.linalg.norm(p["embedding"], axis=-1).max())

    def figures(self, params):
        return {"longest": self.longest(params), "minus_longest": -self.longest(params)}


def drawn(context):
    parts = text.pretraining(context)
    finish = lambda params: {"embeddings": params["embedding"].shape}  # noqa: E731
    objective = Objective(lengths, rows, summarize)
    return parts._replace(
        objective=objective, judges=(Longest(),), best=("embeddings", "minus_longest"), finish=finish
    )


# It trains, is stopped, goes on, keeps the best and reports.


def run(workdir, *arguments):
    settings, _ = command_line.parse(["run", *TINY, *arguments], "configs/quickstart.py", "A doc.")
    return loop.run(
        settings, workdir, Progress(0, sys.stdout), report.write_report, Kind(text.lengths, drawn)
    )


@pytest.mark.usefixtures("one_device")
def test_a_toy_objective_goes_through_the_loop(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole)
    records = read_metrics(whole / "metrics.jsonl")
    judged = [r for r in records if r["split"] == "embeddings"]
    assert [r["step"] for r in judged] == [8, 16, 24]
    train = [r["off"] for r in records if r["split"] == "train"]
    assert train[-1] < 0.9 * train[0] and "cross_entropy" not in records[0]
    assert json.loads((whole / "run.json").read_text())["embeddings"] == [768, 16]
    assert (whole / "report.html").stat().st_size > 1000
    with monkeypatch.context() as patched:
        patched.setattr(loop._Loop, "_judge", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(cut, "--config.train.eval_every=12")
    run(cut)
    assert [r["off"] for r in read_metrics(cut / "metrics.jsonl") if r["split"] == "train"] == train
