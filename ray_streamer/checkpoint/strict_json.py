"""How is JSON from outside read, when a lenient reader would guess?

Python's reader keeps the last of repeated keys, and accepts NaN, integers written as -0 and halves of surrogate pairs.
Headers and index json must not mean two things to two readers, so all of these are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn


class MalformedJsonError(ValueError):
    """The JSON cannot be used; the message completes a sentence about it, such as "is not UTF-8: ..."."""


def parse_strict(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        MalformedJsonError: Not UTF-8, not JSON, not an object, or ambiguous.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedJsonError(f"is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        value = _parse(text)
    except (ValueError, RecursionError) as error:
        raise MalformedJsonError(f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedJsonError(f"must be a JSON object, got {type(value).__name__}")
    return value


def shown(name: str) -> str:
    """A name from outside, quoted and short enough for a message."""
    return ascii(name) if len(name) <= 120 else f"{name[:80]!a}... ({len(name)} characters)"


def _parse(text: str) -> Any:
    # A hook for every integer would cost a third more time, and nearly no header has these two characters.
    parse_int = _parse_int if "-0" in text else None
    value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_int=parse_int)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair in a string") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        repeated, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shown(repeated)} appears {times} times in one object")
    return unique


def _parse_int(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
