"""SentencePiece vocabulary with T5's ids: pad 0, eos 1, unk 2, 100 sentinels at the top."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import re
import uuid
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from switchmoe.data import local_files, prepared, progress, sources
from switchmoe.data.errors import DataError
from switchmoe.data.progress import Note
from switchmoe.settings import NUM_SENTINELS, DataSettings

TRAINING_BYTES = 50_000_000  # of text; more changes little and takes minutes
LONGEST = 8_000_000  # characters of a document that the trainer gets in one
LONGEST_WORD = 8_000  # without a blank: beyond 16,000 the trainer's sums overflow
RESERVED = "\u2585"  # the trainer's own sign, of which it skips every line
TRAINER = {
    "model_type": "unigram",
    "byte_fallback": True,
    "pad_id": 0,
    "eos_id": 1,
    "unk_id": 2,
    "bos_id": -1,
    "num_threads": 8,  # the model depends on it, so it does not follow the machine
    "max_sentence_length": 2**30,  # the default drops documents above 4,192 bytes
    "minloglevel": 2,
}
IDENTITY = {  # data.normalization=identity: every character comes back
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,  # an indentation is one piece
}
BLANK = "\u2581"  # SentencePiece's sign for a blank
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model and the sentinels above its pieces.

    Made by ``from_bytes``. Text that holds the letters of a sentinel is encoded as ordinary pieces.
    """

    model_bytes: bytes = dataclasses.field(repr=False)

    pad_id = 0
    eos_id = 1
    unk_id = 2

    @classmethod
    def from_bytes(cls, model_bytes: bytes, name: str = "model") -> "Vocabulary":
        """Reads a serialised SentencePiece model; ``name`` is what an error calls it.

        Raises:
          DataError: not a SentencePiece model, or its pad, eos and unk are not T5's 0, 1 and 2.
        """
        vocabulary = cls(model_bytes)
        try:
            processor = vocabulary._processor
        except RuntimeError as error:
            raise DataError(
                f"data.vocab={name}: truncated, or not a SentencePiece model; accepted is a file such as "
                "T5's spiece.model"
            ) from error
        ids = processor.pad_id(), processor.eos_id(), processor.unk_id()
        if ids != (cls.pad_id, cls.eos_id, cls.unk_id):
            raise DataError(
                f"data.vocab={name}: pad, eos and unk are {ids[0]}, {ids[1]} and {ids[2]}; accepted is "
                "a model with T5's 0, 1 and 2"
            )
        return vocabulary

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.model_bytes)
        return processor

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.model_bytes).hexdigest()

    @functools.cached_property
    def pieces(self) -> int:
        """How many pieces the SentencePiece model has: `data.vocab_size`. Without sentinels that are pieces, as mT5's are."""
        everything = self._processor.vocab_size()
        below = everything - NUM_SENTINELS
        own = (
            self._processor.id_to_piece(below + i).strip(BLANK)
            for i in range(NUM_SENTINELS if below > 0 else 0)
        )
        names = [f"<extra_id_{NUM_SENTINELS - 1 - i}>" for i in range(NUM_SENTINELS)]
        return below if list(own) == names else everything

    @property
    def size(self) -> int:
        """Pieces and sentinels: every id is below it."""
        return self.pieces + NUM_SENTINELS

    def sentinel(self, index: int) -> int:
        """The id of `<extra_id_{index}>`: ``size - 1 - index``, as in T5.

        Raises:
          ValueError: the index is not in 0..99.
        """
        if not 0 <= index < NUM_SENTINELS:
            raise ValueError(f"sentinel {index}: accepted is 0 to {NUM_SENTINELS - 1}")
        return self.size - 1 - index

    @functools.cached_property
    def exact(self) -> bool:
        """Whether the model leaves text as it is (`IDENTITY`): then what is decoded is what was encoded."""
        spec = sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes).normalizer_spec
        return spec.name == "identity" and not (spec.add_dummy_prefix or spec.remove_extra_whitespaces)

    @functools.cached_property
    def byte_ids(self) -> np.ndarray:
        """The ids of the 256 bytes that unknown characters fall back to; empty where the model has none."""
        found = [i for i in range(self.pieces) if self._processor.is_byte(i)]
        return np.array(found, np.int32)

    @functools.cached_property
    def byte_values(self) -> dict[int, int]:
        """The byte of each of `byte_ids`."""
        return {int(token): value for value, token in enumerate(self.byte_ids)}

    @functools.cached_property
    def bytes_of_ids(self) -> np.ndarray:
        """Bytes of UTF-8 that each id stands for, [size]: of text as the model sees it, normalised; 0 of what is no text."""
        pieces = (self._processor.id_to_piece(i).replace(BLANK, " ") for i in range(self.pieces))
        found = np.array([len(piece.encode()) for piece in pieces] + [0] * NUM_SENTINELS, np.int64)
        found[self.byte_ids] = 1
        found[[self.pad_id, self.eos_id]] = 0
        return found

    @functools.cached_property
    def blank_ids(self) -> list[int]:
        """The ids of pieces that are nothing but blanks."""
        return [i for i in range(self.pieces) if not self._processor.id_to_piece(i).strip(BLANK)]

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [L], without EOS."""
        if not self.exact or BLANK not in text or not self.byte_ids.size:
            return np.array(self._processor.encode(text), np.int32)
        sign = self.byte_ids[list(BLANK.encode())]  # as bytes, for it would come back as a blank
        first, *others = (np.array(self._processor.encode(part), np.int32) for part in text.split(BLANK))
        return np.concatenate([first, *(part for other in others for part in (sign, other))])

    def piece(self, token: int) -> str:
        """What an id below ``pieces`` stands for, blanks as the model writes them."""
        return self._processor.id_to_piece(token)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text up to the first EOS, without pads; sentinels are shown as `<extra_id_0>`.

        Ids from ``size`` up, which a padded embedding table has, are shown as unknown.
        """
        shown = []
        for token in (int(token) for token in ids):
            if token == self.eos_id:
                break
            if self.pieces <= token < self.size:
                shown.append(f"<extra_id_{self.size - 1 - token}>")
            elif token != self.pad_id:
                shown.append(self._processor.id_to_piece(token if token < self.pieces else self.unk_id))
        return _joined(shown) if self.exact else self._processor.decode_pieces(shown)

    def continuation(self, ids: Sequence[int] | np.ndarray) -> str:
        """`decode` of what follows other text: a blank that it begins with stays."""
        before = self.sentinel(0)  # an id that is always text, and no byte
        return self.decode([before, *ids])[len(self.decode([before])) :]


def _joined(pieces: Sequence[str]) -> str:
    """The text of an exact model's pieces."""
    parts = []
    for piece in pieces:
        byte = _BYTE.fullmatch(piece)
        parts.append(bytes.fromhex(byte[1]) if byte else piece.replace(BLANK, " ").encode())
    return b"".join(parts).decode("utf-8", "replace")


def check_end(settings: DataSettings) -> None:
    """Raises DataError: `data.eos_id` is another's."""
    if settings.eos_id != Vocabulary.eos_id:
        raise DataError(
            f"data.eos_id={settings.eos_id}: accepted is {Vocabulary.eos_id}, which ends a text in every vocabulary that is trained"
            " with"
        )


def load_vocabulary(
    settings: DataSettings, documents: Sequence[str], note: Note = lambda _: None
) -> Vocabulary:
    """The model file that `data.vocab` names, or one trained on ``documents``, once per corpus.

    A trained model is kept beside the corpus: in `vocabularies/` of `data.data_dir` (or of the default
    cache), or in the directory of local files where no `data_dir` is set. Its name has the vocabulary
    size and a fingerprint of the train documents, so that a changed corpus never meets a stale model.

    Args:
      settings: vocab, vocab_size, normalization, source and data_dir are read.
      documents: the train split, as ``sources.load`` gives it.

    Raises:
      DataError: the model file is missing, foreign, or has not `data.vocab_size` pieces; the corpus
        has too little text for a vocabulary of that size; `data.eos_id` is another's.
    """
    check_end(settings)
    if settings.vocab:
        return _checked(epath.Path(settings.vocab).expanduser(), settings)
    trainer = TRAINER | (IDENTITY if settings.normalization == "identity" else {})
    name = f"vocabulary-{settings.vocab_size}-{_fingerprint(documents, trainer)}.model"
    folders = [epath.Path(sources.cache_directory(settings)).expanduser() / "vocabularies"]
    if local_files.is_local(settings.source) and not settings.data_dir:
        folders.insert(0, epath.Path(getattr(documents, "directory", "") or folders[0]))
    try:
        cached = [folder / name for folder in folders if (folder / name).exists()]
    except ImportError as error:  # of what reads a bucket
        raise DataError(
            f"data.data_dir={settings.data_dir}: cannot be read ({error}); accepted is a directory, or a bucket whose "
            "package is installed"
        ) from error
    if cached:
        return _checked(cached[0], settings)
    vocabulary = Vocabulary.from_bytes(train(documents, settings.vocab_size, trainer, note), name)
    _keep(vocabulary.model_bytes, [folder / name for folder in folders])
    return vocabulary


def train(
    documents: Sequence[str],
    vocab_size: int,
    trainer: dict[str, Any] = TRAINER,
    note: Note = lambda _: None,
) -> bytes:
    """Trains a unigram SentencePiece model of ``vocab_size`` pieces, the same bytes each time.

    A corpus above ``TRAINING_BYTES`` of UTF-8 is represented by documents spread evenly over it. What the trainer
    would skip or fail at in silence is cut for it: `_digestible`.

    Raises:
      DataError: ``vocab_size`` is larger or smaller than what the text allows, or there is no text.
    """
    model, seen = io.BytesIO(), _Seen()
    try:
        with progress.told(note, f"training a vocabulary of {vocab_size:,} pieces", seen.state):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sample(documents, seen),
                model_writer=model,
                vocab_size=vocab_size,
                **trainer,
            )
    except RuntimeError as error:
        too_large = re.search(r"value <= (\d+)", str(error))
        too_small = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if too_large:
            accepted = f"at most {too_large[1]} for this corpus, or more text"
        elif too_small:
            accepted = f"at least {too_small[1]}, what the characters of this corpus take"
        elif not seen.characters:
            raise DataError(
                f"data.vocab_size={vocab_size}: the {len(documents)} documents have no character to train on; accepted"
                " is more text, or data.vocab"
            ) from error
        else:
            accepted = f"what SentencePiece can train ({error})"
        raise DataError(f"data.vocab_size={vocab_size}: accepted is {accepted}") from error
    return model.getvalue()


@dataclasses.dataclass
class _Seen:
    """What the trainer was given so far."""

    size: int = 0  # bytes
    characters: int = 0  # that are no blanks

    def state(self) -> str:
        return f"{self.size / 1e6:.0f} MB of text"


def _sample(documents: Sequence[str], seen: _Seen) -> Iterator[str]:
    """Each document once, in even strides over the corpus, until there is text enough."""
    count = len(documents)
    stride = max(1, int(count * 0.618))
    while math.gcd(stride, count) > 1:
        stride -= 1
    for position in range(count):
        for text in _digestible(documents[position * stride % count]):
            if seen.size > TRAINING_BYTES:
                return
            seen.size += len(text.encode())
            seen.characters += bool(text.strip())
            yield text


def _digestible(text: str) -> Iterator[str]:
    """The text in parts that the trainer takes: without its reserved sign, no word or part too long."""
    text = text.replace(RESERVED, " ")
    if len(text) > LONGEST_WORD and re.search(rf"\S{{{LONGEST_WORD + 1}}}", text):
        text = re.sub(rf"(\S{{{LONGEST_WORD}}})(?=\S)", r"\1 ", text)
    while len(text) > LONGEST:
        cut = text.rfind(" ", 1, LONGEST) + 1 or LONGEST
        yield text[:cut]
        text = text[cut:]
    yield text


def _fingerprint(documents: Sequence[str], trainer: dict[str, Any]) -> str:
    known = getattr(documents, "fingerprint", None) or prepared.fingerprint(documents)
    return hashlib.sha256(
        f"{known} {trainer} {TRAINING_BYTES} {sentencepiece.__version__}".encode()
    ).hexdigest()[:16]


def _checked(path: epath.Path, settings: DataSettings) -> Vocabulary:
    try:
        model_bytes = path.read_bytes()
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"data.vocab={path}: cannot be read ({reason}); accepted is a SentencePiece "
            "model file, or '' to train one"
        ) from error
    vocabulary = Vocabulary.from_bytes(model_bytes, str(path))
    if vocabulary.pieces != settings.vocab_size:
        raise DataError(
            f"data.vocab_size={settings.vocab_size}: {path} has {vocabulary.pieces} pieces; accepted is "
            f"data.vocab_size={vocabulary.pieces}"
        )
    if settings.normalization == "identity" and not vocabulary.exact:
        raise DataError(
            f"data.normalization=identity: {path} changes the text (it was trained with another normalization);"
            " accepted is nmt_nfkc, or data.vocab='' to train one"
        )
    return vocabulary


def _keep(model_bytes: bytes, paths: Sequence[epath.Path]) -> None:
    """Writes to the first path that can be written, whole or not at all."""
    reasons = []
    for path in paths:
        temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(model_bytes)
            temporary.rename(path)
            return
        except OSError as error:
            reasons.append(str(error))
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    warnings.warn(
        f"the vocabulary is not cached and will be trained again: {'; '.join(reasons)}", stacklevel=3
    )
