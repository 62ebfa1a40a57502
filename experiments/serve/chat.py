"""A chat as one prompt, by a template that is data: nothing of it is executed.

A run that answers chats has a file `chat.json` in its directory: ``{"system": "{content}\\n", "user": "Q: {content}\\n",
"assistant": "A: {content}\\n", "prompt": "A:", "stop": ["Q:"]}``. A message is its role's text with the message in place of
``{content}``; ``prompt`` comes last; ``stop`` (at most 4) ends each answer. A role that is not there is not accepted.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from experiments.serve.fields import MOST_STOPS, BadRequest

FILE, MARK, ROLES = "chat.json", "{content}", ("system", "user", "assistant")
ACCEPTED = (
    f'{{"user": "...{MARK}...", "assistant": "...{MARK}...", "system": "...{MARK}...", "prompt": "...", "stop": ["..."]}}, of which'
    " user is needed"
)


@dataclasses.dataclass(frozen=True)
class Template:
    roles: dict[str, str]
    prompt: str
    stop: tuple[str, ...]

    @classmethod
    def read(cls, raw: bytes, name: str) -> "Template":
        """Raises ValueError, one line."""
        try:
            text = raw.decode("utf-8-sig")
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: not JSON of UTF-8 ({error}); accepted is {ACCEPTED}") from error
        roles = {role: found[role] for role in ROLES if isinstance(found, dict) and role in found}
        stop, prompt = (found.get("stop", []), found.get("prompt", "")) if roles else ([], "")
        texts = isinstance(stop, list) and all(isinstance(part, str) and part for part in stop)
        marked = all(isinstance(part, str) and part.count(MARK) == 1 for part in roles.values())
        known = roles and not found.keys() - {*ROLES, "prompt", "stop"}
        if not (
            known
            and "user" in roles
            and marked
            and isinstance(prompt, str)
            and texts
            and len(stop) <= MOST_STOPS
        ):
            raise ValueError(f"{name}: {text[:80]!r}: accepted is {ACCEPTED}")
        return cls(roles, prompt, tuple(stop))

    def text(self, messages: Sequence[dict[str, Any]]) -> str:
        """Raises `BadRequest`."""
        parts = []
        for message in messages:
            form = self.roles.get(message["role"])
            if form is None:
                raise BadRequest(
                    f"messages: the role {message['role']}: accepted are those of the model's template, {', '.join(self.roles)}",
                    "messages",
                )
            before, _, after = form.partition(MARK)
            parts += [before, message["content"], after]
        return "".join([*parts, self.prompt])
