"""What is around the application: uvicorn with limits on connections, a token, and signals that drain."""

import hmac
import logging
from collections.abc import Callable
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus
from uvicorn.protocols.http.h11_impl import H11Protocol

from experiments.serve.exchange import Service, failure

OPEN = ("/", "/health")  # paths that need no token: the page asks for one itself
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
LONGEST_HEAD = 32_768  # bytes of a request's line and headers


class Guard:
    """An ASGI application in front of another: refuses what should not reach it, and lets no exception through."""

    def __init__(self, inner: Any, service: Service, token: str, note: Callable[[str], None]):
        self._inner, self._service, self._note = inner, service, note
        self._token = token.encode()
        self.connections: Callable[[], int] = lambda: 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        begun = False

        async def told(message: dict[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._service.metrics.answered(message["status"])
                given = list(message.get("headers", ()))
                there = {name.lower() for name, _ in given}
                message = message | {
                    "headers": given + [header for header in HEADERS if header[0] not in there]
                }
            await send(message)

        answer = self._refusal(scope) or self._inner
        try:
            await answer(scope, receive, told)
        except Exception as error:
            if not _is_send_timeout(error):
                self._note(
                    f"{scope['method']} {scope['path'][:100]}: {type(error).__name__}: {error}".splitlines()[
                        0
                    ]
                )
            if not begun:
                await failure(500, "the server failed", "internal_error")(scope, receive, told)

    def _refusal(self, scope: dict[str, Any]) -> Any:
        limits, headers = self._service.limits, dict(scope["headers"])
        close = {"connection": "close"}
        if self.connections() > limits.connections:
            message = f"there are more than {limits.connections} connections; accepted is another try later"
            return failure(503, message, "too_many_connections", headers=close | {"retry-after": "1"})
        if self._token and scope["path"] not in OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                message = "the token is missing or wrong; accepted is a header Authorization: Bearer TOKEN"
                return failure(
                    401, message, "invalid_api_key", headers=close | {"www-authenticate": "Bearer"}
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > limits.max_body:
            message = f"the body has {int(length[:20])} bytes; accepted are at most {limits.max_body}"
            return failure(413, message, "body_too_large", headers=close)
        return None


def _is_send_timeout(error: BaseException) -> bool:
    """Of a reader too slow, whom nothing more can be told."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_send_timeout, error.exceptions))
    return type(error).__name__ == "SendTimeoutError"


def protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's, which ends a connection on which no request is whole, or nothing is read, for so long.

    uvicorn itself waits for both for ever.
    """

    class Impatient(H11Protocol):
        _timer = None

        def _wait(self) -> None:
            self._stop_waiting()
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def _stop_waiting(self) -> None:
            if self._timer:
                self._timer.cancel()
            self._timer = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            # The next request of a reader who reads.
            if self.cycle is not before and not self.flow.write_paused:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            self._wait()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait()

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.cycle and not self.cycle.response_complete:
                self._stop_waiting()
            else:
                self._wait()

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(error)

        def send_400_response(self, msg: str) -> None:
            self.transport.write(bad_http(msg))
            self.transport.close()

    return Impatient


def bad_http(message: str) -> bytes:
    """The whole response to what is no HTTP."""
    answer = failure(400, f"{message} Accepted is HTTP/1.1.", headers={"connection": "close"})
    lines = [b"HTTP/1.1 400 Bad Request", *(b": ".join(header) for header in answer.raw_headers)]
    return b"\r\n".join([*lines, b"", answer.body])


class Server(uvicorn.Server):
    """Drains at SIGTERM and Ctrl-C; a second signal stops at once. Neither is raised again: the command ends by its own code."""

    closing: Callable[[], None]

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self.closing()


def made(service: Service, inner: Any, token: str, note: Callable[[str], None]) -> Server:
    """The server, whose ``run`` takes the sockets it is to listen on."""
    AppStatus.disable_automatic_graceful_drain()  # it would end streams at once
    for name in (
        "uvicorn",
        "sse_starlette",
    ):  # of what is no HTTP, of readers that leave: anybody could fill a log with them
        logging.getLogger(name).setLevel(logging.CRITICAL)
    limits, guard = service.limits, Guard(inner, service, token, note)
    config = uvicorn.Config(
        guard, http=protocol(limits.timeout), ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
        server_header=False, backlog=limits.connections, h11_max_incomplete_event_size=LONGEST_HEAD,
        timeout_graceful_shutdown=max(1, round(limits.timeout)), timeout_keep_alive=5,
    )  # fmt: skip
    server = Server(config)
    server.closing = service.engine.close
    guard.connections = lambda: len(server.server_state.connections)
    return server


def serve(service: Service, inner: Any, token: str, listener: Any, note: Callable[[str], None]) -> bool:
    """Until a signal comes. Returns whether all requests were answered.

    Raises:
      OSError: the model could not be warmed up, as a file of its can't be read.
    """
    server, unread = made(service, inner, token, note), []

    def failing(error: Exception) -> None:
        if isinstance(error, OSError):
            unread.append(error)
            server.should_exit = True

    service.engine.failing = failing
    service.engine.start()
    server.run(sockets=[listener])
    if unread:
        raise unread[0]
    return service.engine.stop(0.0 if server.force_exit else 1.0) and not server.force_exit
