"""Text as a run's data, and pre-training on it: the kind of run that `experiments.run` starts."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from switchmoe.data import batches, sources, vocabulary
from switchmoe.data.progress import told
from switchmoe.planning import flops
from switchmoe.runs import distilling, start
from switchmoe.runs.judges import Examples, HeldOut
from switchmoe.runs.parts import Context, Kind, Parts
from switchmoe.runs.rundir import check_documents, read_run
from switchmoe.settings import Settings
from switchmoe.training import objective

UNIGRAM_BATCHES = 200
UNKNOWN_WARNED, UNKNOWN_REFUSED = 0.01, 0.5  # shares of the held-out pieces


def lengths(settings: Settings) -> dict[str, int]:
    """Tokens of a sequence in each stack."""
    return batches.lengths(settings.data)


def pretraining(context: Context) -> Parts:
    """The cross-entropy of what `data.objective` asks, on the text of `data.source`.

    Raises:
      ValueError: text, vocabulary or `init.checkpoint` that can't be used, or that a run here did not begin with.
    """
    settings, beginning = context.settings, start.beginning(context)
    text = Text(context, beginning.vocabulary)
    minimised = objective.CROSS_ENTROPY
    whole = HeldOut("validation", text.evaluation, minimised, settings, context.mesh)
    of_parts = (
        HeldOut(f"validation/{part}", found, minimised, settings, context.mesh, like=whole)
        for part, found in text.parts.items()
    )
    parts = Parts(
        data=text,
        objective=minimised,
        judges=(whole, *of_parts),
        best=("validation", "cross_entropy"),
        start=beginning.start,
        flops=flops.train_flops(settings, lengths(settings)),
        finish=Examples(text.evaluation[0], text.vocabulary, settings, context.mesh),
    )
    return distilling.taught(parts, context, lengths(settings), text.vocabulary.sha256)


PRETRAINING = Kind(lengths, pretraining)


class Text:
    """Documents, their vocabulary, and the batches of both (`parts.Data`).

    ``evaluation``: the held-out batches, the same whatever the seed; ``parts``: those of each part of a mixture.

    Args:
      vocabulary_file: a model, to be used where the settings name none.

    Raises:
      ValueError: text or vocabulary that can't be used, or that the run in the directory did not begin with.
    """

    def __init__(self, context: Context, vocabulary_file: str = ""):
        settings = self._settings = context.settings
        self._note, self._workdir = context.note, context.workdir
        documents = sources.load_splits(settings.data, context.note)
        self.vocabulary = _vocabulary(context, documents["train"], vocabulary_file)
        self._fingerprints = {split: found.fingerprint for split, found in documents.items()}
        check_documents(context.workdir, f"data.source={settings.data.source}", self._fingerprints)
        self.identity = self._fingerprints | {"vocabulary": self.vocabulary.sha256}
        self._counts = {split: len(found) for split, found in documents.items()}
        self._documents = documents["train"]
        self.lengths = batches.array_lengths(lengths(settings))
        self.evaluation = batches.eval_batches(
            settings.data, self.vocabulary, documents["validation"], settings.train.eval_batches
        )
        held_out = documents["validation"]
        count = max(1, settings.train.eval_batches // max(1, len(held_out.parts)))  # of each, at most
        self.parts = {
            part: self._held_out(sources.part(held_out, part), part, count) for part in held_out.parts
        }
        self._rare = _rare_shares(settings, self.evaluation, self.vocabulary)

    def _held_out(self, documents: sources.Documents, part: str, count: int) -> list[batches.Batch]:
        """Of a part, which a mistake's line names."""
        data = self._settings.data
        named = dataclasses.replace(data, source=f"{data.source} ({part})")
        return batches.eval_batches(named, self.vocabulary, documents, count, padded=True)

    def batches(self, streams: Sequence[int] | None = None) -> Any:
        settings = self._settings
        return batches.train_batches(
            settings.data, self.vocabulary, self._documents, settings.train.seed, streams
        )

    def prepare(self) -> None:
        """Counts the unigram baseline: about one pass over a small corpus, and no more than it is worth."""
        self._unigram = read_run(self._workdir).get("unigram_cross_entropy")
        if self._unigram is not None:
            return
        count = max(1, min(UNIGRAM_BATCHES, len(self._documents) // self._settings.data.batch_size))
        with told(self._note, "counting the unigram baseline"), contextlib.closing(self.batches()) as fresh:
            self._unigram = batches.unigram_cross_entropy(
                fresh, self.evaluation, self._settings.embedding_rows, count
            )

    def keep(self) -> None:
        """The run's own copy of the vocabulary."""
        start.keep_vocabulary(self._workdir, self.vocabulary.model_bytes)

    def tell(self) -> tuple[dict[str, Any], list[str]]:
        rare = self._rare
        record = {
            "unigram_cross_entropy": self._unigram,
            "unknown_pieces": rare["unknown"],
            "byte_pieces": rare["bytes"],
            "vocabulary_sha256": self.vocabulary.sha256,
            "documents": self._counts,
            "documents_sha256": self._fingerprints,
        }
        repeats = batches.repeated_rows(self._settings.data, self._counts["train"])
        lines = [
            *([repeats] if repeats else []),
            f"unigram baseline: {self._unigram:.3f} nats a target token",
            f"vocabulary: {rare['unknown']:.2%} unknown, {rare['bytes']:.2%} single bytes of the held-out pieces",
        ]
        if rare["unknown"] > UNKNOWN_WARNED:
            lines.append(
                f"warning: the vocabulary does not fit the text: {rare['unknown']:.1%} of its pieces are unknown, and"
                " easy to predict; the loss says little (data.vocab, or '' to train one)"
            )
        return record, lines


def _vocabulary(context: Context, documents: Sequence[str], file: str) -> vocabulary.Vocabulary:
    """The run's own copy, so that a run never changes its vocabulary; else that of the settings or the file."""
    path, data = start.own_vocabulary(context), context.settings.data
    if path:
        return vocabulary.Vocabulary.from_bytes(path.read_bytes(), str(path))
    if data.bos_id >= (rows := context.settings.embedding_rows):
        raise ValueError(f"data.bos_id={data.bos_id}: accepted is a row of the embedding, below {rows}")
    asked = dataclasses.replace(data, vocab=file) if file and not data.vocab else data
    found = vocabulary.load_vocabulary(asked, documents, context.note)
    if file and found.model_bytes != epath.Path(file).read_bytes():
        context.note(
            f"warning: data.vocab={data.vocab} is not the vocabulary that the parameters were trained with ({file}): the"
            " embeddings are other pieces'"
        )
    return found


def _rare_shares(
    settings: Settings, evaluation: list[batches.Batch], found: vocabulary.Vocabulary
) -> dict[str, float]:
    shares = batches.rare_shares(evaluation, found)
    if shares["unknown"] > UNKNOWN_REFUSED:
        raise ValueError(
            f"data.vocab={settings.data.vocab}: {shares['unknown']:.0%} of the pieces of {settings.data.source} are unknown"
            f" to it; accepted is a vocabulary of that language (at most {UNKNOWN_REFUSED:.0%}), or '' to train one"
        )
    return shares
