"""Checks of one field: a ``ValueError`` of one line names it, its value and what would be accepted."""

import re
from typing import Any


def bad(field: str, value: Any, accepted: str) -> ValueError:
    return ValueError(f"{field}={value}: accepted is {accepted}")


def at_least(group: str, settings: Any, field: str, least: int) -> None:
    if getattr(settings, field) < least:
        raise bad(f"{group}.{field}", getattr(settings, field), f"an integer >= {least}")


def positive(group: str, settings: Any, field: str) -> None:
    if not getattr(settings, field) > 0:
        raise bad(f"{group}.{field}", getattr(settings, field), "a number > 0")


def not_negative(group: str, settings: Any, field: str) -> None:
    if not getattr(settings, field) >= 0:
        raise bad(f"{group}.{field}", getattr(settings, field), "a number >= 0")


def rate(group: str, settings: Any, field: str) -> None:
    if not 0 <= getattr(settings, field) < 1:
        raise bad(f"{group}.{field}", getattr(settings, field), "a number >= 0 and < 1")


def one_of(group: str, settings: Any, field: str, accepted: tuple[str, ...]) -> None:
    if getattr(settings, field) not in accepted:
        raise bad(f"{group}.{field}", getattr(settings, field), f"one of {', '.join(accepted)}")


def expression(group: str, settings: Any, field: str) -> None:
    try:
        re.compile(getattr(settings, field))
    except re.error as error:
        raise bad(f"{group}.{field}", getattr(settings, field), f"a regular expression ({error})") from error
