"""What models made of one are compared by: loss, a task's score and speed, and how much each expert is used.

Letters: B batch, L MoE layers, E experts.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switchmoe.data import batches, pairs, sources
from switchmoe.inference import generation
from switchmoe.inference.decoding import Choosing
from switchmoe.model.transformer import Transformer, sparse_layer_names
from switchmoe.parallel import sharding
from switchmoe.runs import finetuning, start, task_data, trained
from switchmoe.runs.judges import HeldOut
from switchmoe.runs.parts import Context
from switchmoe.settings import Settings, from_config, to_dict
from switchmoe.training import objective

TOKENS, TIMED = 32, 3  # generated for each row, and how often
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """A text, a task or both. ``counted`` are batches of the training split, on which use is counted: of the task if there is one."""

    settings: Settings  # how they are read
    counted: Sequence[batches.Batch]
    held_out: Sequence[batches.Batch]  # of the text if one was asked for, else of the task
    task: tuple[Settings, task_data.Pairs] | None
    mesh: Any

    @property
    def counted_settings(self) -> Settings:
        return self.task[0] if self.task else self.settings

    def like(self, settings: Settings, model: Settings) -> Settings:
        """The settings with another model's experts."""
        fields = ("num_experts", "route_one", "expert_bits", "expert_group")
        changed = {name: getattr(model.moe, name) for name in fields}
        return dataclasses.replace(settings, moe=dataclasses.replace(settings.moe, **changed))


def yardstick(
    model: trained.Source,
    text: str,
    task: str,
    overrides: Mapping[str, Any],
    count: int,
    workdir: Path,
    note: Note,
) -> Yardstick:
    """Reads a text (``""``: the run's own, unless there is a task) and a task (``""``: none).

    Args:
      overrides: what a reader may choose (`trained.READERS`), and fields of ``task``, by ``group.field``.
      count: batches at most, of either split; 0: all.

    Raises:
      ValueError: what can't be read; one line.
    """
    asked = {name: value for name, value in overrides.items() if not name.startswith("task.")}
    settings = trained.changed(model.settings, asked | ({"data.source": text} if text else {}))
    vocabulary = model.vocabulary
    if vocabulary is None or vocabulary.size > settings.embedding_rows:
        has = (
            "no vocabulary"
            if vocabulary is None
            else f"a vocabulary of {vocabulary.size} ids, another model's"
        )
        raise ValueError(f"--source={model.step.parent.parent}: it has {has}; accepted is a run with its own")
    mesh = sharding.make_mesh(settings.mesh)
    found, judged = {}, None
    if text or not task:
        for split, documents in sources.load_splits(settings.data, note).items():
            found[split] = batches.eval_batches(settings.data, vocabulary, documents, count, padded=True)
    if task:
        judged = _task(model, settings, task, overrides, mesh, workdir, note)
        own, data = judged
        examples = {"train": [one for task in data.trained for one in task.examples("train")]}
        if not text:
            settings, examples["validation"] = own, data.held_out_examples
        for split, all_ in examples.items():
            some = pairs.spread(all_, count * own.data.batch_size or len(all_))
            found[split] = [batch for batch, _ in pairs.eval_batches(some, data.encoder)]
    return Yardstick(settings, found["train"], found["validation"], judged, mesh)


def _task(
    model: trained.Source, settings: Settings, task: str, overrides: Mapping[str, Any], mesh: Any, workdir: Path, note: Note
) -> tuple[Settings, task_data.Pairs]:  # fmt: skip
    groups, plain = to_dict(settings), to_dict(Settings())
    groups["distill"] = plain["distill"]  # a student is measured without its teacher
    groups["task"] = plain["task"] | {"names": task}
    groups["task"] |= {n.partition(".")[2]: v for n, v in overrides.items() if n.startswith("task.")}
    groups["init"]["checkpoint"] = str(model.step)
    free = [name for name in ("input_length", "target_length") if f"data.{name}" not in overrides]
    own = task_data.fitted(from_config(groups), free)
    sharding.check(own, finetuning.lengths(own), mesh.shape)
    file = start.vocabulary_of(model.step)
    return own, task_data.Pairs(Context(own, workdir, mesh, False, note), file)


def use(model: trained.Source, ruler: Yardstick, by_sentence: bool) -> dict[str, np.ndarray]:
    """How much each MoE layer's experts are used on what was counted, by `sparse_layer_names`: [E], shares of its choices.

    ``by_sentence``: whole sentences go to the experts that most of their tokens choose (as many as a token has choices), and
    an expert's share is that of the sentences: routing of sentences or tasks, by which a sub-network is
    extracted (Kudugunta et al. 2021, 2110.03742); tokens' shares decide where sentences are equal.
    """
    settings = ruler.like(ruler.counted_settings, model.settings)
    with jax.set_mesh(ruler.mesh), sharding.rules(settings):
        params = trained.parameters(model, settings, ruler.mesh)
        rows = jax.jit(functools.partial(row_loads, settings=settings))
        load_BLE = np.concatenate([jax.device_get(rows(params, batch)) for batch in ruler.counted])
    real_B = np.concatenate([np.any(batch["targets"] != 0, axis=1) for batch in ruler.counted])
    load_BLE = load_BLE[real_B]
    tokens_BL = np.concatenate([_tokens(batch, settings) for batch in ruler.counted])[real_B]
    found_LE = (load_BLE * tokens_BL[..., None]).sum(axis=0) / tokens_BL.sum(axis=0)[:, None]
    if by_sentence:
        choices = settings.moe.total_choices
        order_BLE = np.argsort(np.argsort(-load_BLE, axis=-1, kind="stable"), axis=-1)
        voted_BLE = (order_BLE < choices) & (load_BLE > 0)
        # Less than the least difference of two shares of sentences.
        found_LE = voted_BLE.mean(axis=0) + found_LE / (2 * len(load_BLE))
    return dict(zip(sparse_layer_names(settings), found_LE, strict=True))


def _tokens(batch: objective.Batch, settings: Settings) -> np.ndarray:
    """[B, L] Each row's tokens in the stack of each MoE layer."""
    arrays = {stack: batch["targets" if stack == "decoder" else "inputs"] for stack in settings.sparse_stacks}
    names = [name.partition("/")[0] for name in sparse_layer_names(settings)]
    return np.stack([np.sum(arrays[stack] != 0, axis=1) for stack in names], axis=1)


def row_loads(params: Any, batch: objective.Batch, settings: Settings) -> jax.Array:
    """[B, L, E] The shares of each row's choices, without what is beside it."""

    def one(row: objective.Batch) -> jax.Array:
        row = {name: values[None] for name, values in row.items()}
        _, aux = Transformer(settings).apply({"params": params}, row, method="token_losses")
        return jnp.concatenate([aux[stack]["expert_load"] for stack in settings.sparse_stacks])

    return jax.lax.map(one, batch)


def figures(model: trained.Source, ruler: Yardstick) -> dict[str, Any]:
    """``records``, metrics by split; ``memory``, bytes of the parameters as they are held; ``score`` (None without a task);
    ``tokens_per_second`` (`speed`)."""
    settings, found = ruler.like(ruler.settings, model.settings), {"score": None, "records": {}}
    with jax.set_mesh(ruler.mesh), sharding.rules(settings):
        params = trained.parameters(model, settings, ruler.mesh)
        found["memory"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        judge = None
        for split, parts, own in (
            ("train", ruler.counted, ruler.counted_settings),
            ("validation", ruler.held_out, ruler.settings),
        ):
            like = judge if ruler.settings == ruler.counted_settings else None
            own = ruler.like(own, model.settings)
            judge = HeldOut(split, parts, objective.CROSS_ENTROPY, own, ruler.mesh, like)
            judge.compile(params)
            found["records"][split] = judge.figures(params)
        if ruler.task:
            own, data = ruler.task
            answers = finetuning.Answers(data, ruler.like(own, model.settings), ruler.mesh)
            answers.compile(params)
            found["records"]["tasks"] = answers.figures(params)
            found["score"] = answers.found["score"]
    found["tokens_per_second"] = speed(settings, params, ruler.held_out[0])
    return found


def speed(settings: Settings, params: Any, batch: objective.Batch) -> float:
    """Tokens a second that are generated after the prompts of a batch, on one device; the median of several times."""
    prompts = [
        row[row != 0].tolist() or [settings.data.bos_id] for row in batch.get("inputs", batch["targets"])
    ]
    one = jax.device_put(params, jax.devices()[0])
    generator = generation.Generator(settings, one, TOKENS, Choosing(stop_ids=()), batch_size=len(prompts))
    generator(prompts)
    seconds = []
    for _ in range(TIMED):
        began = time.perf_counter()
        generator(prompts)
        seconds.append(time.perf_counter() - began)
    return len(prompts) * TOKENS / float(np.median(seconds))
