"""The server's OpenAPI description, of the table of fields that also checks requests."""

from typing import Any

from experiments.serve import fields
from experiments.serve.fields import NO_DEFAULT, UNSUPPORTED, Field, Limits
from switchmoe import __version__

PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/completions", "/v1/chat/completions")
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
MEANING = {
    400: "a field, or the body, is not accepted", 401: "the token is missing or wrong", 404: "no such model or path",
    405: "another method is accepted", 408: "the body did not come in time", 413: "the body is too large",
    415: "the body is not JSON", 429: "the queue is full", 500: "the server failed", 503: "warming up, shutting down, or too many"
    " connections", 504: "the request took too long",
}  # fmt: skip


def openapi(limits: Limits, has_chat: bool) -> dict[str, Any]:
    posts = {"/v1/completions": fields.completion(limits), "/v1/chat/completions": fields.chat(limits)}
    paths = {path: {"post": _post(path, own, has_chat)} for path, own in posts.items()}
    json, text, html = "application/json", "text/plain", "text/html"
    for path, kind, open_to_all in (
        ("/", html, True), ("/health", json, True), ("/metrics", text, False), ("/openapi.json", json, False), ("/v1/models", json, False),
    ):  # fmt: skip
        paths[path] = {"get": _get(path, kind, open_to_all)}
    one = _get("model", json, False)
    one["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    one["responses"]["404"] = _failed(404)
    paths["/v1/models/{name}"] = {"get": one}
    return {
        "openapi": "3.1.0",
        "info": {"title": "switchmoe", "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _failed(status: int) -> dict[str, Any]:
    return {"description": MEANING[status], "content": {"application/json": {"schema": ERROR}}}


def _get(name: str, kind: str, open_to_all: bool) -> dict[str, Any]:
    responses = {"200": {"description": "as it is", "content": {kind: {}}}}
    responses |= {
        str(status): _failed(status) for status in (401, 500, 503) if not (open_to_all and status == 401)
    }
    return {"operationId": f"get {name}", "responses": responses} | (
        {} if open_to_all else {"security": [{"token": []}, {}]}
    )


def _post(path: str, own: dict[str, Field], has_chat: bool) -> dict[str, Any]:
    required = [name for name, field in own.items() if field.default is NO_DEFAULT]
    properties = {name: _property(field) for name, field in own.items()}
    properties |= {name: {"enum": [None, *harmless]} for name, harmless in UNSUPPORTED.items()}
    schema = {"type": "object", "required": required, "properties": properties}
    answers = {
        "application/json": {"schema": {"type": "object", "required": ["id", "object", "choices"]}},
        "text/event-stream": {},
    }
    responses = {"200": {"description": "the answers", "content": answers}}
    responses |= {str(status): _failed(status) for status in MEANING if status != 405}
    told = (
        ""
        if has_chat or "chat" not in path
        else "This model has no chat template: each request is answered with 400."
    )
    return {
        "operationId": f"post {path}", "description": told, "security": [{"token": []}, {}], "responses": responses,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
    }  # fmt: skip


def _property(field: Field) -> dict[str, Any]:
    described = {"description": "; ".join(filter(None, [field.meaning, f"accepted is {field.accepted}"]))}
    if field.default is NO_DEFAULT:
        return dict(field.schema) | described
    return {"anyOf": [dict(field.schema), {"type": "null"}], "default": field.default} | described
