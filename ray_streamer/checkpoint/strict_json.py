"""How is JSON from outside read, when a lenient reader would guess?

Python's reader keeps the last of repeated keys, and accepts NaN, integers written as -0 and halves of surrogate pairs.
Headers and index json must not mean two things to two readers, so all of these are refused. A config.json may hold them:
transformers writes Infinity into some. What no reader should have to bear is refused in all: nesting without end, numbers
of thousands of digits.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

from ray_streamer.wording import shown

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_DEPTH = 100
"""How deep values of a config.json may lie in each other; models have a tenth of it."""


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
    return _checked_object(value)


def parse_lenient(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, with whatever Python's reader accepts, nested at most `MAX_DEPTH` deep.

    Raises:
        MalformedJsonError: Not UTF-8, not JSON, not an object, or nested deeper.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedJsonError(f"is not valid JSON: {error}") from None
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inner_values(outer)]
        if not level:
            return _checked_object(value)
    raise MalformedJsonError(f"is nested deeper than {MAX_DEPTH} levels")


def _inner_values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _checked_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedJsonError(f"must be a JSON object, got {type(value).__name__}")
    return value


def _parse(text: str) -> Any:
    # A hook for every integer would cost a third more time, and nearly no header has these two characters. One is found faster than two.
    parse_int = _parse_int if "-" in text and "-0" in text else None
    value = json.loads(text, parse_constant=_refuse_constant, parse_int=parse_int)
    if text.count(":") != _num_pairs(value):
        # A repeated key, which the hook finds; or colons in strings, or objects that lie deeper.
        json.loads(text, object_pairs_hook=_unique_keys)
    if "\\" in text and "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair in a string") from None
    return value


def _num_pairs(value: Any) -> int:
    """Pairs of a key and a value in an object and in the objects that are its values."""
    if type(value) is not dict:
        return 0
    return len(value) + sum(map(len, [inner for inner in value.values() if type(inner) is dict]))


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
