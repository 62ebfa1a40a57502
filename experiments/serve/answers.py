"""From what an engine tells to OpenAI's objects. Nothing here waits, or knows HTTP."""

import functools
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from switchmoe.data.vocabulary import BLANK, Vocabulary
from switchmoe.inference.serving.engine import Ended, Opened, Token
from switchmoe.inference.serving.programs import Scores
from switchmoe.inference.serving.text import Piece, TextStream


class Wanted(NamedTuple):
    """How answers are told."""

    chat: bool
    logprobs: int | None  # alternatives; None: without
    echo: bool
    ids: bool
    experts: bool


class Record(NamedTuple):
    """A token that came."""

    token: int
    offset: int  # of its text in the answer's
    log_prob: float | None
    best: Sequence[tuple[int, float]]
    experts: list | None  # [layer][choice]
    asked: bool = False  # of the prompt


class Prompt(NamedTuple):
    ids: list[int]
    text: str
    continued: bool  # by its answers: `generation.continues`


class Answer:
    """One choice: fed with events in the engine's thread, which gives what can be shown; told as objects elsewhere."""

    def __init__(
        self, index: int, prompt: Prompt, vocabulary: Vocabulary, stops: Sequence[str], wanted: Wanted
    ):
        self._index, self._prompt, self._vocabulary, self._wanted = index, prompt, vocabulary, wanted
        self.stream = TextStream(vocabulary, stops, prompt.continued)
        self._records: list[Record] = []
        self._told = 0
        self._before: dict[str, Any] = {}  # what the prompt's own tokens have told
        self._shift = len(prompt.text) if wanted.echo else 0

    def take(self, event: Any) -> dict[str, Any] | None:
        """What an event adds to this choice, as `choice` takes it; None: nothing that can be told yet."""
        if isinstance(event, Opened):
            return self._opened(event)
        if isinstance(event, Token):
            offset = self.stream.offsets[-1] + self._shift
            experts = None if event.expert_LK is None else event.expert_LK.tolist()
            self._records.append(Record(event.token, offset, event.log_prob, event.best, experts))
            return self._part(self.stream.take(), None)
        return self._part(self.stream.finish(), event.why if isinstance(event, Ended) else None)

    def _opened(self, event: Opened) -> dict[str, Any] | None:
        found: dict[str, Any] = {
            "text": self._prompt.text if self._wanted.echo else "",
            "records": [],
            "finish_reason": None,
        }
        if self._wanted.echo and event.scores is not None:
            found["records"] = prompt_records(
                self._prompt, event.scores, self._wanted.logprobs or 0, self._vocabulary
            )
        if self._wanted.ids:
            found["prompt_token_ids"] = list(self._prompt.ids)
        if event.expert_LPK is not None:
            found["prompt_routed_experts"] = np.swapaxes(event.expert_LPK, 0, 1).tolist()
        return found if found["text"] or found["records"] or len(found) > 3 else None

    def _part(self, piece: Piece, why: str | None) -> dict[str, Any] | None:
        records = self._records[self._told : piece.tokens]
        self._told = max(self._told, piece.tokens)
        tells = records and (self._wanted.logprobs is not None or self._wanted.ids or self._wanted.experts)
        if not (piece.text or tells or why):
            return None
        return {"text": piece.text, "records": records, "finish_reason": why}

    def choice(self, part: dict[str, Any], streamed: bool, first: bool = False) -> dict[str, Any]:
        """A part, or `joined` parts, as OpenAI shows a choice."""
        wanted, records = self._wanted, part["records"]
        found: dict[str, Any] = {"index": self._index, "finish_reason": part["finish_reason"]}
        if wanted.chat:
            content = {"role": "assistant", "content": part["text"]}
            found["delta" if streamed else "message"] = (
                content if first or not streamed else {"content": part["text"]}
            )
        else:
            found["text"] = part["text"]
        found["logprobs"] = None
        if wanted.logprobs is not None and (records or not streamed):
            form = chat_logprobs if wanted.chat else completion_logprobs
            found["logprobs"] = form(records, wanted.logprobs, self._vocabulary)
        own = [record for record in records if not record.asked]
        if wanted.ids:
            found["token_ids"] = [record.token for record in own]
        if wanted.experts:
            found["routed_experts"] = [record.experts for record in own]
        return found | {
            name: part[name] for name in ("prompt_token_ids", "prompt_routed_experts") if name in part
        }


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a choice as one."""
    found: dict[str, Any] = {}
    for part in parts:
        found |= part
    text = "".join(part["text"] for part in parts)
    return found | {"text": text, "records": [record for part in parts for record in part["records"]]}


def prompt_records(prompt: Prompt, scores: Scores, most: int, vocabulary: Vocabulary) -> list[Record]:
    """A prompt's tokens; its first has no log-probability."""
    offset, *offsets = (min(offset, len(prompt.text)) for offset in _offsets(tuple(prompt.ids), vocabulary))
    found = [Record(prompt.ids[0], offset, None, [], None, True)]
    for n, (token, offset) in enumerate(zip(prompt.ids[1:], offsets, strict=True)):
        best = [(int(scores.best_PT[n, k]), float(scores.best_log_prob_PT[n, k])) for k in range(most)]
        found.append(Record(token, offset, float(scores.log_prob_P[n]), best, None, True))
    return found


@functools.lru_cache(maxsize=8)
def _offsets(ids: tuple[int, ...], vocabulary: Vocabulary) -> list[int]:
    """Where each token's text begins: taken once for all answers of a prompt, as the engine waits meanwhile."""
    stream = TextStream(vocabulary)
    for token in ids:
        stream.feed(token)
    return stream.offsets


def shown(token: int, vocabulary: Vocabulary) -> str:
    """A token by itself: a byte as <0xE4>, a sentinel as <extra_id_0>."""
    if token < vocabulary.pieces:
        return vocabulary.piece(token).replace(BLANK, " ")
    return vocabulary.decode([token])


def completion_logprobs(records: Sequence[Record], most: int, vocabulary: Vocabulary) -> dict[str, Any]:
    best = []
    for record in records:
        named: dict[str, float] = {}
        for token, value in record.best[:most]:
            named.setdefault(shown(token, vocabulary), value)
        best.append(named if record.log_prob is not None else None)
    return {
        "tokens": [shown(record.token, vocabulary) for record in records],
        "token_logprobs": [record.log_prob for record in records],
        "top_logprobs": best if most else None,
        "text_offset": [record.offset for record in records],
    }


def chat_logprobs(records: Sequence[Record], most: int, vocabulary: Vocabulary) -> dict[str, Any]:
    def one(token: int, value: float | None) -> dict[str, Any]:
        byte = vocabulary.byte_values.get(token)
        own = list(vocabulary.continuation([token]).encode()) if byte is None else [byte]
        return {"token": shown(token, vocabulary), "logprob": value, "bytes": own}

    return {
        "content": [
            one(record.token, record.log_prob)
            | {"top_logprobs": [one(token, value) for token, value in record.best[:most]]}
            for record in records
        ]
    }


class Envelope:
    """What is around the choices of one request."""

    def __init__(self, chat: bool, model: str):
        self._chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created, self._model = int(time.time()), model

    def __call__(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None, streamed: bool = False
    ) -> dict:
        kind = "text_completion" if not self._chat else f"chat.completion{'.chunk' if streamed else ''}"
        found = {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        return found | ({"usage": usage} if usage is not None else {})


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
