"""What a request may hold: one table of fields, read by the check of requests and by the OpenAPI description.

A message names the field, its value and what is accepted. JSON's null is a field's default, as OpenAI has it. Fields that are
unknown are left aside, but for those that would change the answer (`UNSUPPORTED`).
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from switchmoe.inference.serving.programs import MOST_TOLD

MOST_STOPS, MOST_ANSWERS, LONGEST_STOP, MOST_STOP_IDS = 4, 128, 256, 64
DEEPEST = 20  # of nested lists and objects: no request has more than 4
NO_DEFAULT = object()


class BadRequest(ValueError):
    """An answer with OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclasses.dataclass(frozen=True)
class Field:
    """A field, with what JSON Schema says of it; ``accepted`` says it to a person."""

    schema: Mapping[str, Any]
    accepted: str
    default: Any = None
    meaning: str = ""


def _integer(least: int, most: int, default: int | None = None, meaning: str = "") -> Field:
    return Field(
        {"type": "integer", "minimum": least, "maximum": most},
        f"an integer from {least} to {most}", default, meaning,
    )  # fmt: skip


def _boolean(default: bool = False, meaning: str = "") -> Field:
    return Field({"type": "boolean"}, "true or false", default, meaning)


def _text(most: int) -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": most}


ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
IDS = {"type": "array", "minItems": 1, "items": ID}
TEXTS = {"type": "array", "minItems": 1, "items": {"type": "string"}}
MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"type": "string", "enum": ["system", "user", "assistant"]},
        "content": {"type": "string"},
    },
}
PROMPT = Field(
    {"anyOf": [{"type": "string"}, TEXTS, IDS, {"type": "array", "minItems": 1, "items": IDS}]},
    "a string, a list of strings, a list of token ids, or a list of such lists",
    NO_DEFAULT,
    "an encoder-decoder's is the encoder's input; ids are as the model reads them",
)
MESSAGES = Field(
    {"type": "array", "minItems": 1, "maxItems": 256, "items": MESSAGE},
    'a list of {"role": "system" | "user" | "assistant", "content": "TEXT"}',
    NO_DEFAULT,
)


class Limits(NamedTuple):
    """What a server was started with."""

    max_prompt: int = 256
    max_tokens: int = 128
    queue: int = 64  # answers that may wait
    max_body: int = 1_000_000  # bytes
    timeout: float = 120.0  # seconds
    connections: int = 100


def common(limits: Limits, default_tokens: int) -> dict[str, Field]:
    """The fields of both kinds of requests."""
    return {
        "model": Field({"type": "string"}, "the served model's name", None, "the served model's name"),
        "max_tokens": _integer(0, limits.max_tokens, default_tokens, "new tokens, at most"),
        "n": _integer(1, min(MOST_ANSWERS, limits.queue), 1, "answers to each prompt"),
        "temperature": Field(
            {"type": "number", "minimum": 0, "maximum": 2}, "a number from 0 to 2", 1.0,
            "logits are divided by it; 0: always the likeliest token",
        ),
        "top_p": Field(
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "a number above 0, at most 1", 1.0,
            "drawn among the fewest tokens whose probabilities sum to this",
        ),
        "top_k": _integer(-1, 2**31 - 1, 0, "drawn among the likeliest so many; 0 and -1: all"),
        "seed": _integer(0, 2**31 - 1, None, "of what is drawn; the same seed, the same answer"),
        "stop": Field(
            {"anyOf": [_text(LONGEST_STOP), {"type": "array", "maxItems": MOST_STOPS, "items": _text(LONGEST_STOP)}]},
            f"a string of 1 to {LONGEST_STOP} characters, or a list of at most {MOST_STOPS}", [],
            "texts at which an answer ends; they are not part of it",
        ),
        "stop_token_ids": Field(
            {"type": "array", "maxItems": MOST_STOP_IDS, "items": ID}, f"a list of at most {MOST_STOP_IDS} token ids", [],
            "tokens after which nothing comes, beside EOS",
        ),
        "ignore_eos": _boolean(meaning="goes on after EOS"),
        "stream": _boolean(meaning="the answer as it comes, as server-sent events"),
        "stream_options": Field(
            {"type": "object", "properties": {"include_usage": {"type": "boolean"}}}, 'with stream, {"include_usage": true or false}',
            {}, "include_usage: a last chunk with the tokens' numbers",
        ),
        "return_token_ids": _boolean(meaning="with the tokens' ids"),
        "routed_experts": _boolean(
            meaning="with the experts of each token in each sparse layer: [token][layer][choice], -1 where a choice was dropped"
        ),
        "user": Field({"type": "string"}, "a string", None, "not read"),
    }  # fmt: skip


@functools.cache
def completion(limits: Limits) -> dict[str, Field]:
    """Of /v1/completions."""
    return {"prompt": PROMPT} | common(limits, min(16, limits.max_tokens)) | {
        "logprobs": _integer(0, MOST_TOLD, None, "log-probabilities of the tokens and of so many alternatives"),
        "echo": _boolean(meaning="the prompt in front of the answer, with its log-probabilities; of a decoder alone"),
    }  # fmt: skip


@functools.cache
def chat(limits: Limits) -> dict[str, Field]:
    """Of /v1/chat/completions."""
    return {"messages": MESSAGES} | common(limits, limits.max_tokens) | {
        "max_completion_tokens": _integer(1, limits.max_tokens, None, "as max_tokens, before which it goes"),
        "logprobs": _boolean(meaning="log-probabilities of the tokens"),
        "top_logprobs": _integer(0, MOST_TOLD, None, "and of so many alternatives; with logprobs"),
    }  # fmt: skip


# Fields of OpenAI's and vLLM's that would change the answer: what they are where they change nothing.
UNSUPPORTED: dict[str, tuple] = {
    "best_of": (1,), "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,),
    "repetition_penalty": (1,), "length_penalty": (1,), "min_p": (0,), "min_tokens": (0,), "use_beam_search": (False,),
    "prompt_logprobs": (), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "response_format": ({"type": "text"},),
    "structured_outputs": (), "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "audio": (),
    "include_stop_str_in_output": (False,), "chat_template": (), "modalities": (["text"],), "reasoning_effort": (), "prediction": (),
    "truncate_prompt_tokens": (),
}  # fmt: skip


def shown(value: Any) -> str:
    """A value in a message: one line, not long."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> None:
    raise BadRequest(f"the body has {name}, which is no JSON; accepted are numbers")


def parsed(body: bytes) -> dict[str, Any]:
    """The object of a request's body. Raises `BadRequest`."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"the body is not UTF-8 ({error.reason} at byte {error.start}); accepted is JSON"
        ) from error
    except RecursionError:
        raise BadRequest("the body is nested too deeply; accepted is an object of a request") from None
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(
            f"the body is not JSON ({str(error).splitlines()[0][:200]}); accepted is an object"
        ) from error
    if not isinstance(found, dict):
        raise BadRequest(f"the body is a {type(found).__name__}; accepted is an object")
    if _depth(found) > DEEPEST:
        raise BadRequest(f"the body is nested more than {DEEPEST} deep; accepted is an object of a request")
    return found


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            part
            for one in level
            if isinstance(one, (dict, list))
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, (dict, list))
        ]
    return depth


def checked(given: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """A value for each field. Raises `BadRequest`."""
    for name, harmless in UNSUPPORTED.items():
        value = given.get(name)
        # In Python False is 0, in JSON it is not.
        same = any(
            value == other and isinstance(value, bool) == isinstance(other, bool) for other in harmless
        )
        if value is not None and not same:
            accepted = " or ".join(shown(value) for value in (None, *harmless))
            raise BadRequest(f"{name}={shown(value)}: it is not supported; accepted is {accepted}", name)
    found = {}
    for name, field in fields.items():
        value = given.get(name)
        if value is None:
            if field.default is NO_DEFAULT:
                raise BadRequest(f"no {name}; accepted is {field.accepted}", name)
            found[name] = field.default
        elif fits(value, field.schema):
            found[name] = value
        else:
            raise BadRequest(f"{name}={shown(value)}: accepted is {field.accepted}", name)
    return found


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is as a schema says: of JSON Schema what the table uses. Texts are Unicode, without halves of pairs."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    kind = schema["type"]
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or (isinstance(value, float) and not math.isfinite(value))
        ):
            return False
        least, above, most = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
        ranged = (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
        )
        return ranged and (kind == "number" or isinstance(value, int))
    if kind == "string":
        good = isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get(
            "maxLength", math.inf
        )
        return (
            good
            and value in schema.get("enum", (value,))
            and not any("\ud800" <= c <= "\udfff" for c in value)
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
            and all(fits(one, schema["items"]) for one in value)
        )
    return (
        isinstance(value, dict)
        and all(name in value for name in schema.get("required", ()))
        and all(
            (value.get(name) is None and name not in schema.get("required", ())) or fits(value[name], one)
            for name, one in schema["properties"].items()
        )
    )
