"""The examples of a mixture of tasks as a run's data: which are trained on and measured, what is cut, with which vocabulary."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from switchmoe.data import pairs, progress, tasks, vocabulary
from switchmoe.data.tasks import Example, Task, baselines
from switchmoe.runs import start
from switchmoe.runs.parts import Context
from switchmoe.runs.rundir import check_documents, read_run
from switchmoe.settings import Settings

CUT_WARNED = 0.05  # share of the examples that are too long


class Pairs:
    """The examples of a mixture of tasks, and the batches of them (`parts.Data`).

    ``trained`` are the tasks that batches are made of, ``measured`` these, first, and the held-out ones.

    Args:
      vocabulary_file: of the run that the parameters are from.

    Raises:
      ValueError: tasks or vocabulary that can't be used, or that the run in the directory did not begin with.
    """

    def __init__(self, context: Context, vocabulary_file: str = ""):
        settings = self._settings = context.settings
        self._note, self._workdir = context.note, context.workdir
        self.trained, self.measured = find_tasks(settings)
        self.vocabulary = _vocabulary(context, vocabulary_file)
        self.encoder = pairs.Encoder(settings.data, settings.stacks, self.vocabulary)
        self.lengths = pairs.array_lengths(settings.data, settings.stacks, settings.task.fill)
        bare = {one.name: one for one in (task.bare or task for task in (*self.trained, *self.measured))}
        self._fingerprints = {
            f"{name}/{split}": pairs.fingerprint(task, split)
            for name, task in bare.items()
            for split in tasks.SPLITS
        }
        check_documents(context.workdir, f"task.names={settings.task.names}", self._fingerprints)
        self.identity = self._fingerprints | {"vocabulary": self.vocabulary.sha256}
        self.held_out = {task.name: pairs.held_out(task, settings.task) for task in self.measured}

    @property
    def held_out_examples(self) -> list[Example]:
        """Of the tasks that are trained on."""
        settings = self._settings.task
        return [example for task in self.trained for example in pairs.held_out(task, settings)]

    def prepare(self) -> None:
        """Scores the baselines, once a run."""
        self._baselines = read_run(self._workdir).get("baselines")
        if self._baselines is None:
            with progress.told(self._note, "scoring the baselines"):
                self._baselines = {
                    task.name: baselines.scores(task, self.held_out[task.name]) for task in self.measured
                }

    def _cut(self, examples: Sequence[Example]) -> np.ndarray:
        """[N, 2] Whether the inputs, and whether the targets, of each example are too long."""
        return np.array([self.encoder.is_cut(example) for example in examples])

    @functools.cached_property
    def cut_held_out(self) -> dict[str, np.ndarray]:
        """`_cut` of each task's held-out examples."""
        return {name: self._cut(examples) for name, examples in self.held_out.items()}

    def tell_cut(self) -> list[str]:
        """A line for each task of whose held-out examples some are too long."""
        shares = {name: cut_N2.mean(axis=0) for name, cut_N2 in self.cut_held_out.items()}
        return [
            f"{name}, held out: too long and cut: {inputs:.1%} of the inputs (solved examples first), {targets:.1%} of the targets"
            for name, (inputs, targets) in shares.items()
            if inputs or targets
        ]

    def keep(self) -> None:
        """The run's own copy of the vocabulary."""
        start.keep_vocabulary(self._workdir, self.vocabulary.model_bytes)

    def batches(self, streams: Sequence[int] | None = None) -> Any:
        settings = self._settings
        return pairs.train_batches(self.trained, settings.task, self.encoder, settings.train.seed, streams)

    @functools.cached_property
    def filling(self) -> tuple[float, float]:
        return pairs.filling(self.trained, self._settings.task, self.encoder, self._settings.train.seed)

    def tell(self) -> tuple[dict[str, Any], list[str]]:
        settings, lines, figures = self._settings, [], {}
        a_row, padding = self.filling
        rows = a_row * settings.train.num_steps * settings.data.batch_size
        for task, share in zip(self.trained, pairs.shares(self.trained, settings.task), strict=True):
            cut = self._cut(pairs.spread(task.examples("train"), 1000)).mean(axis=0).tolist()
            examples = len(task.examples("train"))
            figures[task.name] = {
                "examples": examples, "share": share, "epochs": share * rows / examples, "inputs_cut": cut[0], "targets_cut": cut[1],
            }  # fmt: skip
            lines.append(
                f"{task.name}: {examples:,} examples, {share:.1%} of the rows, each {share * rows / examples:.2g} times in"
                f" {settings.train.num_steps:,} steps; too long and cut: {cut[0]:.1%} of the inputs, {cut[1]:.1%} of the targets"
            )
            if max(cut) > CUT_WARNED:
                lines.append(
                    f"warning: {task.name}: many are cut; data.input_length and data.target_length say how much is read"
                )
        lines += self.tell_cut()
        for name, found in self._baselines.items():
            told = ", ".join(f"{which} {score:.1f}" for which, score in found.items())
            lines.append(f"{name}: baselines: {told}")
        lines.append(f"a row of training holds {a_row:.3g} examples; {padding:.1%} of the places are padding")
        record = {
            "tasks": figures,
            "examples_a_row": a_row,
            "padding_share": padding,
            "baselines": self._baselines,
            "vocabulary_sha256": self.vocabulary.sha256,
            "documents": {name: len(examples) for name, examples in self.held_out.items()},
            "documents_sha256": self._fingerprints,
        }
        return record, lines


def fitted(settings: Settings, free: Sequence[str]) -> Settings:
    """The settings with those of `data.input_length` and `data.target_length` that are free as long as the examples ask.

    Raises:
      ValueError: a task or a vocabulary that can't be used.
    """
    chosen, asked = find_tasks(settings)
    if not free:
        return settings
    chosen = chosen + [task for task in asked if task.bare and task not in chosen]  # with solved examples
    origin = settings.init.checkpoint or settings.distill.teacher
    file = start.vocabulary_of(start.locate(origin))
    found = pairs.fitting(chosen, load_vocabulary(settings, start.tuned_vocabulary(settings, file)))
    longest = dict(zip(("input_length", "target_length"), found, strict=True))
    data = dataclasses.replace(settings.data, **{field: max(8, longest[field]) for field in free})
    return dataclasses.replace(settings, data=data)


def find_tasks(settings: Settings) -> tuple[list[Task], list[Task]]:
    """(the tasks that are trained on, these and the held-out ones with `task.shots` solved examples)."""
    found = tasks.find(settings.task, settings.data)
    measured = found + (
        tasks.find(settings.task, settings.data, "held_out") if settings.task.held_out else []
    )
    shots = settings.task.shots
    return found, [
        task if task.bare else tasks.few_shot.with_shots(task, shots, f"task.shots={shots}")
        for task in measured
    ]


def _vocabulary(context: Context, file: str) -> vocabulary.Vocabulary:
    """The run's own copy, or that of the model it begins with, or `data.vocab`."""
    own = start.own_vocabulary(context)
    return load_vocabulary(context.settings, str(own or start.tuned_vocabulary(context.settings, file)))


def load_vocabulary(settings: Settings, path: str) -> vocabulary.Vocabulary:
    """Raises ValueError: no file, a vocabulary with more ids than the model has rows, or another end than `data.eos_id`."""
    vocabulary.check_end(settings.data)
    if not path:
        raise ValueError(
            f"init.checkpoint={settings.init.checkpoint or chr(39) * 2}: it has no vocabulary; accepted is a run that has one, or"
            " data.vocab=FILE, its SentencePiece model"
        )
    found = vocabulary.Vocabulary.from_bytes(epath.Path(path).expanduser().read_bytes(), path)
    if found.size > settings.embedding_rows:
        raise ValueError(
            f"data.vocab={path}: {found.size} ids; accepted is the vocabulary of a model of {settings.embedding_rows} rows"
        )
    return found
