"""The server's paths: requests into jobs, what becomes of these into answers. Thin over `switchmoe.inference.serving`."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from experiments.serve import description, fields
from experiments.serve.answers import Prompt, Wanted
from experiments.serve.exchange import Exchange, Service, failure
from experiments.serve.fields import BadRequest, Limits
from experiments.serve.page import page
from switchmoe.inference import generation
from switchmoe.inference.serving.engine import Refused

PING = 15  # seconds between signs of life of a stream
REFUSED = {
    "full": (429, "the queue is full; accepted is another try later", "queue_full", 1),
    "warming": (503, "the model is warming up; accepted is another try later", "warming_up", 5),
    "closed": (503, "the server is shutting down; accepted is another server", "shutting_down", 10),
}


def application(service: Service) -> Starlette:
    def bad_request(request: Request, found: BadRequest) -> Response:
        headers = {"connection": "close"} if found.status in (408, 413) else None
        return failure(found.status, str(found), found.code, found.param, headers)

    def refused(request: Request, found: Refused) -> Response:
        status, message, code, seconds = REFUSED[found.why]
        return failure(status, message, code, headers={"retry-after": str(seconds)})

    def of_http(request: Request, found: HTTPException) -> Response:
        paths = "; accepted are " + ", ".join(sorted(description.PATHS)) if found.status_code == 404 else ""
        message = f"{request.method} {request.url.path[:200]}: {found.detail}{paths}"
        return failure(found.status_code, message, headers=dict(found.headers or {}))

    def unexpected(request: Request, found: Exception) -> Response:
        return failure(500, "the server failed", "internal_error")

    def gone(request: Request, found: ClientDisconnect) -> Response:
        return Response(status_code=400)

    def get(path: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, answer, methods=["GET"])

    async def health(request: Request) -> Response:
        engine = service.engine
        if engine.failed:
            return failure(500, f"the model could not be prepared: {engine.failed}", "internal_error")
        if not engine.ready or engine.closed:
            return refused(request, Refused("closed" if engine.closed else "warming"))
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_card(service)]})

    async def model(request: Request) -> Response:
        _check_name(service, request.path_params["name"])
        return JSONResponse(model_card(service))

    async def metrics(request: Request) -> Response:
        return Response(
            service.metrics.text(service.engine), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def openapi(request: Request) -> Response:
        return JSONResponse(description.openapi(service.limits, service.template is not None))

    async def completions(request: Request) -> Response:
        return await _complete(service, request, chat=False)

    async def chats(request: Request) -> Response:
        return await _complete(service, request, chat=True)

    async def explorer(request: Request) -> Response:
        return page()

    routes = [
        get("/", explorer), get("/health", health), get("/metrics", metrics), get("/openapi.json", openapi),
        get("/v1/models", models), get("/v1/models/{name:path}", model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chats, methods=["POST"]),
    ]  # fmt: skip
    handlers = {
        BadRequest: bad_request, Refused: refused, HTTPException: of_http, ClientDisconnect: gone, Exception: unexpected,
    }  # fmt: skip
    return Starlette(routes=routes, exception_handlers=handlers)


def model_card(service: Service) -> dict[str, Any]:
    programs, moe = service.engine.programs, service.engine.programs.settings.moe
    own = {
        "kind": "encoder-decoder" if service.encodes else "decoder",
        "max_prompt": service.limits.max_prompt,
        "max_tokens": service.limits.max_tokens,
        "chat": service.template is not None,
        "experts": moe.total_experts,
        "choices": moe.total_choices,
        "prompt_layers": programs.prompt_layers,
        "layers": programs.layers,
    }
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "switchmoe",
        "switchmoe": own,
    }


def _check_name(service: Service, name: str | None) -> None:
    if name is not None and name != service.name:
        raise BadRequest(f"model={name[:100]}: accepted is {service.name}", "model", "model_not_found", 404)


async def body(request: Request, limits: Limits) -> bytes:
    """The request's, within its limits of size and time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BadRequest(f"content-type={kind[:60]}: accepted is application/json", status=415)
    found = bytearray()
    try:
        async with asyncio.timeout(limits.timeout):
            async for part in request.stream():
                found += part
                if len(found) > limits.max_body:
                    raise BadRequest(
                        f"the body has more than {limits.max_body} bytes; accepted are as many",
                        code="body_too_large",
                        status=413,
                    )
    except TimeoutError:
        raise BadRequest(
            f"the body did not come within {limits.timeout:g} s", code="timeout", status=408
        ) from None
    return bytes(found)


def prompts(service: Service, given: Any) -> list[Prompt]:
    """Each prompt as the model reads it. Raises `BadRequest`."""
    several = isinstance(given, list) and not isinstance(given[0], int)
    settings, most = service.engine.programs.settings, service.limits.max_prompt
    found = []
    for one in given if several else [given]:
        if isinstance(one, str):
            try:
                ids, text = generation.prompt_ids(one, settings, service.vocabulary), one
            except ValueError as wrong:
                raise BadRequest(f"prompt: {wrong}", "prompt") from wrong
        else:
            ids, text = list(one), service.vocabulary.decode(one)
            bad = [token for token in one if token >= settings.embedding_rows]
            if bad:
                raise BadRequest(
                    f"prompt: the id {bad[0]}: accepted is an integer from 0 to {settings.embedding_rows - 1}",
                    "prompt",
                )
        if len(ids) > most:
            raise BadRequest(
                f"prompt: it has {len(ids)} tokens; accepted are at most {most}",
                "prompt",
                "context_length_exceeded",
            )
        found.append(Prompt(ids, text, generation.continues(text, settings)))
    return found


async def _complete(service: Service, request: Request, chat: bool) -> Response:
    limits = service.limits
    given = fields.parsed(await body(request, limits))
    asked = fields.checked(given, fields.chat(limits) if chat else fields.completion(limits))
    _check_name(service, asked["model"])
    if chat and service.template is None:
        raise BadRequest(
            "the model has no chat template; accepted is /v1/completions", code="no_chat_template"
        )
    wanted = _wanted(service, asked, chat)
    stops = [asked["stop"]] if isinstance(asked["stop"], str) else list(asked["stop"])
    if chat:
        asked["prompt"] = service.template.text(asked["messages"])
        asked["max_tokens"] = asked["max_completion_tokens"] or asked["max_tokens"]
        stops += service.template.stop
    read = await asyncio.to_thread(prompts, service, asked["prompt"])
    if len(read) * asked["n"] > limits.queue:
        raise BadRequest(
            f"n={asked['n']}: of {len(read)} prompts; accepted are at most {limits.queue} answers in all", "n"
        )
    exchange = Exchange(service, asked, read, stops, wanted)
    service.engine.submit(*exchange.jobs)
    try:
        if not asked["stream"]:
            parts = await _unless_gone(request, exchange.whole())
            return parts if isinstance(parts, Response) else JSONResponse(parts)
        first = await _unless_gone(request, exchange.peek())
    except BaseException:
        exchange.cancel()
        raise
    if first is not None:
        return first
    include_usage = bool(asked["stream_options"].get("include_usage"))
    return EventSourceResponse(
        exchange.chunks(include_usage), ping=PING, send_timeout=limits.timeout, sep="\n"
    )


def _wanted(service: Service, asked: dict[str, Any], chat: bool) -> Wanted:
    best, echo = asked["logprobs"], asked.get("echo", False)
    if chat:
        if asked["top_logprobs"] and not best:
            raise BadRequest(
                f"top_logprobs={asked['top_logprobs']}: accepted with logprobs=true", "top_logprobs"
            )
        best = (asked["top_logprobs"] or 0) if best else None
    if echo and service.encodes:
        raise BadRequest(
            "echo=true: accepted with an encoder-decoder, whose prompt is another text, is false", "echo"
        )
    if asked["max_tokens"] == 0 and not echo:
        raise BadRequest("max_tokens=0: accepted without echo is an integer >= 1", "max_tokens")
    if asked["stream_options"].get("include_usage") and not asked["stream"]:
        raise BadRequest("stream_options: accepted with stream=true", "stream_options")
    return Wanted(chat, best, echo, asked["return_token_ids"], asked["routed_experts"])


async def _unless_gone(request: Request, work: Any) -> Any:
    """What the work returns; raises `ClientDisconnect` where nobody waits for it any more."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
