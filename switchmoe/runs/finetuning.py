"""Fine-tuning on a mixture of tasks: pairs of text, judged by the tasks' own metrics on the model's answers.

A `Kind` of run beside pre-training: loop, checkpoints, faults, layouts and reports are the same.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switchmoe.data import pairs, progress
from switchmoe.data.tasks import Example, Task
from switchmoe.data.tasks.metrics import METRICS
from switchmoe.inference import generation
from switchmoe.model.transformer import Transformer, sparse_layer_names
from switchmoe.parallel import distributed, sharding
from switchmoe.planning import flops
from switchmoe.runs import distilling, placing, start, trained
from switchmoe.runs.judges import HeldOut
from switchmoe.runs.parts import Context, Kind, Parts, Start
from switchmoe.runs.rundir import PREDICTIONS_FILE, read_run, update_run
from switchmoe.runs.task_data import Pairs
from switchmoe.settings import Settings
from switchmoe.training import objective
from switchmoe.training.train_state import TrainState

SHOWN = 5  # examples in the report


def lengths(settings: Settings) -> dict[str, int]:
    return pairs.lengths(settings.data, settings.stacks, settings.task.fill)


def computed(settings: Settings) -> dict[str, int]:
    """`lengths`, and the places of a row of which logits are computed, where these are not all of the decoder's."""
    found = lengths(settings)
    if "encoder" in found:
        return found
    return found | {"predicted": settings.data.most_predicted(found["decoder"])}


def finetuning(context: Context) -> Parts:
    """The cross-entropy of the targets of `task.names`; judged by the tasks' metrics.

    Raises:
      ValueError: a task, vocabulary or `init.checkpoint` that can't be used, or that a run here did not begin with.
    """
    settings, beginning = context.settings, start.beginning(context)
    sharding.check(settings, pairs.lengths(settings.data, settings.stacks), context.mesh.shape)  # held out
    data = Pairs(context, beginning.vocabulary)
    answers = Answers(data, settings, context.mesh)
    batches = [batch for batch, _ in pairs.eval_batches(data.held_out_examples, data.encoder)]
    held_out = HeldOut("validation", batches, objective.CROSS_ENTROPY, settings, context.mesh)
    parts = Parts(
        data=data,
        objective=objective.CROSS_ENTROPY,
        judges=(held_out, answers),
        best=(answers.name, "shortfall"),
        start=beginning.start,
        flops=flops.train_flops(settings, computed(settings)),
        finish=functools.partial(finish, answers, held_out, context.workdir),
    )
    parts = distilling.taught(parts, context, lengths(settings), data.vocabulary.sha256)
    load = functools.partial(_begin, parts.start, held_out, context.workdir)
    return parts._replace(start=parts.start._replace(load=load))


def _begin(start: Start, held_out: HeldOut, workdir: Path, state: TrainState) -> TrainState:
    """The first state; `run.json` gets the experts' load with it."""
    state = start.load(state)
    before = _expert_load(held_out, state.params)
    if before and distributed.is_main():
        update_run(workdir, expert_load={"before": before})
    return state


def _expert_load(held_out: HeldOut, params: Any) -> list[list[float]]:
    """Of each sparse layer each expert's share of the held-out tokens; [] of a model without them."""
    found = held_out.figures(params).get("layer_expert_load", np.zeros((0, 0)))
    return np.round(np.asarray(found, float), 5).tolist()


FINETUNING = Kind(lengths, finetuning)


def measured(settings: Settings, workdir: Path, note: Callable[[str], None]) -> list[str]:
    """The figures of the model as it is, as lines; the answers are written to the directory.

    Raises:
      ValueError: as `finetuning`.
    """
    if (workdir / "config.json").exists():
        raise ValueError(
            f"--workdir={workdir}: a run's directory, whose {PREDICTIONS_FILE} would be lost; accepted with --steps=0 is another"
        )
    mesh = sharding.make_mesh(settings.mesh)
    sharding.check(settings, pairs.lengths(settings.data, settings.stacks), mesh.shape)
    context = Context(settings, workdir, mesh, False, note)
    data = Pairs(context, start.vocabulary_of(start.locate(settings.init.checkpoint)))
    for line in data.tell_cut():
        note(line)
    answers = Answers(data, settings, mesh)
    with (
        jax.set_mesh(mesh),
        sharding.rules(settings),
        progress.told(note, "compiling and answering", at_once=True),
    ):
        params, _ = trained.mean_parameters(trained.find(settings.init.checkpoint), settings, mesh, 1)
        answers.compile(params)
        found = answers.figures(params)
    workdir.mkdir(parents=True, exist_ok=True)
    write_predictions(workdir / PREDICTIONS_FILE, answers)
    return [*(f"{name} {value:.2f}" for name, value in found.items()), str(workdir / PREDICTIONS_FILE)]


class Answers:
    """The tasks' metrics on what the model writes, one token after the other, each time the likeliest.

    ``score`` is the mean over tasks of their scores (`Task.scored`), 0 to 100; ``shortfall`` is what that of the tasks that are trained on
    lacks of 100: by it the best checkpoint is chosen, which held-out tasks must not decide. A task with classes
    has ``ranked`` too: how often the likeliest of them is the right one, and ``ranked_mean``: the same by the likelihood of a token
    in the mean (lm-eval's `acc_norm` divides by characters), as classes of more tokens are the less likely.
    """

    name = "tasks"

    def of(self, settings: Settings) -> "Answers":
        """The same questions to another model."""
        return Answers(self._data, settings, self._mesh)

    def __init__(self, data: Pairs, settings: Settings, mesh: Mesh):
        self._data, self._settings, self._mesh = data, settings, mesh
        self.layers = sparse_layer_names(settings)
        self.answers: dict[str, list[dict[str, Any]]] = {}  # of the last measurement, by task
        self.found: dict[str, float] = {}

    def compile(self, params: Any) -> None:
        """Compiled at the first call, as there are few programs, of few shapes."""
        whole = NamedSharding(self._mesh, PartitionSpec())
        settings = self._settings
        decode = functools.partial(generation.greedy, tokens=settings.data.target_length, settings=settings)
        self._decode = jax.jit(decode, out_shardings=whole)
        encode = functools.partial(Transformer(settings).apply, method="encode")
        self._encode = jax.jit(lambda *given: encode(*given)[0], out_shardings=whole)
        self._nll = jax.jit(functools.partial(row_nll, settings=settings), out_shardings=whole)

    def figures(self, params: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        scores = []
        for task in self._data.measured:
            examples = self._data.held_out[task.name]
            right, cut_N2 = [example.right for example in examples], self._data.cut_held_out[task.name]
            texts = self._written(params, examples)
            values = {name: METRICS[name](texts, right) for name in task.metrics}
            ranked = self._ranked(params, task, examples) if task.options else {}
            values |= {name: METRICS["accuracy"](likeliest, right) for name, likeliest in ranked.items()}
            scores.append(float(np.mean([values[name] for name in task.scored])))
            found |= {f"{task.name}/{name}": value for name, value in values.items()}
            self.answers[task.name] = [
                {"task": task.name, "inputs": example.prompt, "targets": example.targets, "prediction": text}
                | {name: likeliest[number] for name, likeliest in ranked.items()}
                | ({"cut": True} if cut_N2[number, 0] else {})  # not all of it was read
                for number, (example, text) in enumerate(zip(examples, texts, strict=True))
            ]
        of_trained = scores[: len(self._data.trained)]
        self.found = found | {"score": float(np.mean(scores)), "shortfall": 100 - float(np.mean(of_trained))}
        return dict(self.found)

    def _written(self, params: Any, examples: Sequence[Example]) -> list[str]:
        size = round(self._data.filling[0] * self._settings.data.batch_size)  # as many as a step reads
        texts: list[str] = []
        for first in range(0, len(examples), size):
            prompts = [self._data.encoder.prompt(example) for example in examples[first : first + size]]
            rows = np.zeros((size, self._settings.data.input_length), np.int32)
            counts = np.ones(size, np.int32)
            for row, prompt in enumerate(prompts):
                rows[row, : len(prompt)], counts[row] = prompt, len(prompt)
            placed = placing.whole({"prompts": rows, "counts": counts}, self._mesh)
            answers = jax.device_get(self._decode(params, placed["prompts"], placed["counts"]))
            texts += [self._data.vocabulary.decode(answer) for answer in answers[: len(prompts)]]
        return texts

    def _ranked(self, params: Any, task: Task, examples: Sequence[Example]) -> dict[str, list[str]]:
        """The likeliest option of each example: of its tokens together, and of a token of it in the mean."""
        encoder = self._data.encoder
        asked_O = [[example._replace(targets=option) for example in examples] for option in task.options]
        parts_OB = []
        for batch_O in zip(*(pairs.eval_batches(asked, encoder) for asked in asked_O), strict=True):
            placed_O = [placing.whole(batch, self._mesh) for batch, _ in batch_O]
            read = {}
            if "encoder" in encoder.stacks:  # the same inputs, whatever the option
                read["encoded"] = self._encode({"params": params}, placed_O[0]["inputs"])
            rows = batch_O[0][1]
            parts_OB.append([jax.device_get(self._nll(params, one | read))[:rows] for one in placed_O])
        nll_ON = np.concatenate(parts_OB, axis=1)
        tokens_O1 = [[len(encoder.tokens(Example("", option))[1]) + 1] for option in task.options]  # and EOS
        ranked = {"ranked": nll_ON, "ranked_mean": nll_ON / np.array(tokens_O1)}
        return {
            name: [task.options[best] for best in np.argmin(nll_ON, axis=0)]
            for name, nll_ON in ranked.items()
        }


def row_nll(params: Any, batch: objective.Batch, settings: Settings) -> jax.Array:
    """[B] The sum of the negative log-likelihoods of a row's targets."""
    (nll_BL, *_), _ = Transformer(settings).apply({"params": params}, batch, method="token_losses")
    return jnp.where(batch.get("loss", batch["targets"]) != 0, nll_BL, 0.0).sum(axis=1)


def finish(answers: Answers, held_out: HeldOut, workdir: Path, params: Any) -> dict[str, Any]:
    """Writes the answers of the last measurement, measured now if there was none; returns what `run.json` says of them.

    There the experts' load is as it was before the first step, if the run began with this version, and as it is.
    """
    if not answers.answers:
        answers.compile(params)
        answers.figures(params)
    load = {"after": _expert_load(held_out, params), "layers": answers.layers}
    if distributed.is_main():
        write_predictions(workdir / PREDICTIONS_FILE, answers)
        load = read_run(workdir).get("expert_load", {}) | load
    first = [one for rows in answers.answers.values() for one in rows[:SHOWN]][: 2 * SHOWN]
    shown = [
        {"input": one["inputs"], "target": one["targets"], "prediction": one["prediction"]} for one in first
    ]
    return {"examples": shown, "scores": answers.found} | ({"expert_load": load} if load["after"] else {})


def write_predictions(path: Path, answers: Answers) -> None:
    """A JSON object a line: task, inputs, targets, prediction, of classes the likeliest (`ranked`, `ranked_mean`)."""
    lines = [json.dumps(one, ensure_ascii=False) for rows in answers.answers.values() for one in rows]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)
