"""Settings of the text, and of tasks: text in, text out."""

import dataclasses
import math

from switchmoe.settings.checks import at_least, bad, one_of, positive

OBJECTIVES = ("span_corruption", "prefix_lm", "causal_lm")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Text, its vocabulary, and what is asked of it."""

    # `wiki_vital_en` (embedded), a tfds name such as `c4/en`, or a glob of files: .txt, a JSON record a line in .jsonl, .json
    # or .ndjson (all of these also .gz, .xz, .bz2, .zst), .parquet
    source: str = "wiki_vital_en"
    data_dir: str = ""  # prepared tfds data and trained vocabularies; "": ~/.cache/switchmoe
    text_field: str = "text"  # the field of a record that holds the text
    documents: str = "line"  # in .txt files: `line`, or `block` (blank line between documents)
    validation_share: float = (
        0.05  # held out by a hash of the document: of files, and of tfds sets with train alone
    )
    split_field: str = (
        ""  # a JSON record's field by whose hash it is held out, as pages of one id; "": by the text's
    )
    # "" or file: each file of the source is a part of a mixture, such as a language, measured by itself as well
    parts: str = ""
    parts_exponent: float = (
        1.0  # a part's share of what is read goes with its documents to this power; 0: all alike
    )
    train_split: str = ""  # of a tfds set, such as train[:90%]; "": train
    validation_split: str = ""  # likewise; "": validation, or test, or else a share of train
    batch_size: int = 128  # sequences a step, over all devices
    input_length: int = 512  # encoder tokens, all of them used
    # decoder tokens; 0: what the objective writes (prefix=full and causal_lm: input_length)
    target_length: int = 0
    vocab: str = ""  # a SentencePiece model file such as T5's spiece.model; "": train one
    vocab_size: int = 32000  # SentencePiece pieces; 100 sentinels join them at the top
    # nmt_nfkc (T5's): blanks and line breaks are joined, letters unified. identity: every character comes back
    normalization: str = "nmt_nfkc"
    bos_id: int = 0  # what a decoder reads first, and before each document
    eos_id: int = 1  # ends a document, an encoder's input and what is generated
    # span_corruption (T5, 3.1.4); prefix_lm: a text's beginning in, its continuation out; causal_lm: documents side by
    # side, a loss at every token
    objective: str = "span_corruption"
    prefix: str = "random"  # of prefix_lm: random (T5's: where a piece is cut is drawn), or full (no padding)
    noise_density: float = 0.15  # share of the tokens that span corruption takes out
    mean_span_length: float = 3.0  # tokens of a span, on average
    streams: int = 0  # documents go round so many streams, each of which fills rows of its own; 0: one a row
    prefetch: int = 8  # batches made ahead

    def __post_init__(self) -> None:
        for field, least in (
            ("batch_size", 1),
            ("input_length", 4),
            ("target_length", 0),
            ("streams", 0),
            ("bos_id", 0),
            ("eos_id", 0),
        ):
            at_least("data", self, field, least)
        if self.streams and self.batch_size % self.streams:
            raise bad("data.streams", self.streams, f"0, or a divisor of data.batch_size={self.batch_size}")
        at_least("data", self, "vocab_size", 300)
        at_least("data", self, "prefetch", 1)
        one_of("data", self, "documents", ("line", "block"))
        one_of("data", self, "normalization", ("nmt_nfkc", "identity"))
        one_of("data", self, "objective", OBJECTIVES)
        one_of("data", self, "parts", ("", "file"))
        if not 0 <= self.parts_exponent <= 1:
            raise bad("data.parts_exponent", self.parts_exponent, "a number from 0 to 1")
        one_of("data", self, "prefix", ("random", "full"))
        if not self.source:
            raise bad("data.source", "''", "wiki_vital_en, a tfds name, or a glob of text files")
        for field in ("noise_density", "validation_share"):
            if not 0 < getattr(self, field) < 1:
                raise bad(f"data.{field}", getattr(self, field), "a number between 0 and 1, both excluded")
        if self.mean_span_length < 1:
            raise bad("data.mean_span_length", self.mean_span_length, "a number >= 1")

    def most_predicted(self, length: int) -> int:
        """How many tokens of a row of pairs, of this length in a decoder alone, may be targets."""
        pairs = -(-length // (self.input_length + self.target_length))
        return min(length, pairs * (self.target_length or length))


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What is fine-tuned on (`experiments.finetune`). Pre-training reads none of it."""

    names: str = (
        ""  # of tasks, with commas between them; one may be a glob of .jsonl, .json, .csv or .tsv files
    )
    held_out: str = ""  # of tasks that are measured and not trained on
    shots: int = 0  # solved examples before each question that is measured, but of tasks named NAME@COUNT
    inputs: str = (
        "{inputs}"  # of files: a template of a record's fields, which the model reads (SQuAD's has its own)
    )
    targets: str = "{targets}"  # and what it is to write
    options: str = ""  # of files: the classes, with commas between them; "": any text
    metrics: str = ""  # of files: names in data.tasks.metrics; "": accuracy of classes, else exact_match,f1
    # A task's share of the batches: proportional (to its examples, at most `ceiling` of them, to the power 1 / `temperature`),
    # equal, or rates
    mixture: str = "proportional"
    ceiling: int = 0  # 0: none
    temperature: float = 1.0  # above 1 small tasks get more
    rates: str = ""  # with mixture=rates: a number for each task, with commas between them
    eval_examples: int = 256  # of each task at most, for the metrics; 0: all
    packed: int = 1  # in training a row is so many times data.input_length and data.target_length, filled with examples; 1: it is one
    filled: bool = False  # with packed=1 too a row of training is filled with examples

    @property
    def fill(self) -> int:
        """0: a row of training is one example; else it is so many times as long, and filled."""
        return self.packed if self.filled or self.packed > 1 else 0

    def __post_init__(self) -> None:
        one_of("task", self, "mixture", ("proportional", "equal", "rates"))
        for field in ("ceiling", "eval_examples", "shots"):
            at_least("task", self, field, 0)
        at_least("task", self, "packed", 1)
        positive("task", self, "temperature")
        if (self.mixture == "rates") != bool(self.rates):
            raise bad("task.rates", self.rates or "''", "numbers with task.mixture=rates, else ''")
        try:
            found = [float(rate) for rate in self.rates.split(",")] if self.rates else []
        except ValueError:
            found = [0.0]
        if any(not 0 < rate < math.inf for rate in found) or (
            found and len(found) != self.names.count(",") + 1
        ):
            raise bad("task.rates", self.rates, f"a number above 0 for each of task.names={self.names}")
