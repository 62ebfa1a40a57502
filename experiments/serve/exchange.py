"""One request and its answers: jobs for the engine, and what they tell, from its thread to the event loop."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import JSONResponse, Response

from experiments.serve import answers
from experiments.serve.answers import Answer, Prompt, Wanted
from experiments.serve.chat import Template
from experiments.serve.fields import Limits
from experiments.serve.metrics import Metrics
from switchmoe.data.vocabulary import Vocabulary
from switchmoe.inference.serving.engine import BROKEN, CLOSED, LATE, Ended, Engine, Failed, Job, Token

FAILED = {
    LATE: (504, "the request took longer than the server allows", "timeout"),
    BROKEN: (500, "the model could not be run", "internal_error"),
    CLOSED: (503, "the server is shutting down; accepted is another server", "shutting_down"),
}


@dataclasses.dataclass
class Service:
    """What is served."""

    name: str
    engine: Engine
    vocabulary: Vocabulary
    limits: Limits
    metrics: Metrics
    template: Template | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def encodes(self) -> bool:
        return self.engine.programs.encodes


def failure(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error(status, message, code, param), status, headers)


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Exchange:
    """One request: its jobs, and what they tell, from the engine's thread to the event loop."""

    def __init__(
        self, service: Service, asked: dict[str, Any], read: list[Prompt], stops: list[str], wanted: Wanted
    ):
        self._read, self._engine = read, service.engine
        self._envelope = answers.Envelope(wanted.chat, service.name)
        self._events: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        seed = secrets.randbits(31) if asked["seed"] is None else asked["seed"]
        eos = () if asked["ignore_eos"] else (service.vocabulary.eos_id,)
        count, self._answers, self.jobs = asked["n"], [], []
        for number, prompt in enumerate(read):
            own = [
                Answer(number * count + n, prompt, service.vocabulary, stops, wanted) for n in range(count)
            ]
            self._answers += own
            self.jobs.append(
                Job(
                    prompt.ids, asked["max_tokens"], self._teller(number, own), count, seed, number * count, asked["temperature"],
                    max(asked["top_k"], 0), asked["top_p"], frozenset((*eos, *asked["stop_token_ids"])),
                    [one.stream.feed for one in own], wanted.logprobs or 0,
                    wanted.echo and wanted.logprobs is not None, wanted.experts,
                    time.monotonic() + service.limits.timeout,
                )
            )  # fmt: skip
        self._open = len(self._answers)
        self._first: list[tuple[int, Any]] = []

    def _teller(self, number: int, own: list[Answer]) -> Callable[[Any], None]:
        """Called in the engine's thread."""

        def put(index: int, found: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, found))

        def tell(event: Any) -> None:
            if isinstance(event, Failed):
                put(-1, event)
            elif isinstance(event, (Token, Ended)):
                part = own[event.answer].take(event)
                if part:
                    put(number * len(own) + event.answer, part)
            else:
                for n, one in enumerate(own):
                    part = one.take(event)
                    if part:
                        put(number * len(own) + n, part)

        return tell

    def cancel(self) -> None:
        for job in self.jobs:
            if job.open:
                self._engine.cancel(job)

    async def _next(self) -> tuple[int, Any]:
        index, part = self._first.pop() if self._first else await self._events.get()
        if index >= 0 and part["finish_reason"]:
            self._open -= 1
        return index, part

    async def whole(self) -> Any:
        """The answer's object, or the response of a failure."""
        parts: list[list[dict[str, Any]]] = [[] for _ in self._answers]
        while self._open:
            index, part = await self._next()
            if index < 0:
                self.cancel()
                return failure(*FAILED[part.why])
            parts[index].append(part)
        choices = [
            one.choice(answers.joined(own), False) for one, own in zip(self._answers, parts, strict=True)
        ]
        return self._envelope(choices, self._usage())

    def _usage(self) -> dict[str, int]:
        return answers.usage(
            sum(len(prompt.ids) for prompt in self._read), sum(job.tokens for job in self.jobs)
        )

    async def peek(self) -> Response | None:
        """Waits for the first event; the response, if it is a failure."""
        index, part = await self._events.get()
        if index < 0:
            self.cancel()
            return failure(*FAILED[part.why])
        self._first.append((index, part))
        return None

    async def chunks(self, include_usage: bool) -> AsyncIterator[str]:
        """The data of a stream's events."""
        begun: set[int] = set()
        try:
            while self._open:
                index, part = await self._next()
                if index < 0:
                    yield json.dumps(error(*FAILED[part.why]), ensure_ascii=False)
                    break
                choice = self._answers[index].choice(part, True, index not in begun)
                begun.add(index)
                yield json.dumps(self._envelope([choice], streamed=True), ensure_ascii=False)
            else:
                if include_usage:
                    yield json.dumps(self._envelope([], self._usage(), True), ensure_ascii=False)
            yield "[DONE]"
        finally:
            self.cancel()
