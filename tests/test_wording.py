"""Names from outside: what a terminal obeys never gets there, in messages of any error class and of any length."""

from __future__ import annotations

import pickle

import pytest

from ray_streamer import errors
from ray_streamer.wording import brief, listed, printable, shown

OBEYED = [
    "\x1b[2J",
    "\x9b31m",
    "a\rb",
    "\x07",
    "\x08",
    "\x7f",
    "\x85",
    "\u202e",
    "\u2028",
    "\u2066",
    "\ufeff",
    "\udc80",
]


@pytest.mark.parametrize("text", OBEYED, ids=ascii)
def test_what_a_terminal_obeys_is_escaped(text: str) -> None:
    for said in (printable(text), shown(text), brief(text), brief({text: [text]}), str(errors.HeaderError(text))):
        assert said.isprintable()
        said.encode("utf-8")


def test_what_people_write_stays_as_it_is() -> None:
    for text in ("model.layers.0.weight", "模型/файл é ✓", "two\nlines\tand a tab"):
        assert printable(text) == text
    assert printable("two\nlines\tand a tab", one_line=True) == r"two\nlines\tand a tab"


def test_errors_are_printable_and_keep_their_text_over_processes() -> None:
    error = errors.ObjectMissingError("no such file: \x1b[31mmodel\n  next line")
    copy = pickle.loads(pickle.dumps(error))
    assert str(error) == str(copy) == "no such file: \\x1b[31mmodel\n  next line"
    failed = errors.RankFailedError(3, "node\x1b[0m", error)
    assert "\x1b" not in str(failed)


@pytest.mark.parametrize(
    "value",
    [2**70, 10**5000, -(10**5000), "x" * 10**7, [0] * 10**6, {str(n): n for n in range(10**5)}, float("nan"), None],
    ids=lambda value: type(value).__name__,
)
def test_values_of_any_size_are_short(value: object) -> None:
    assert len(brief(value)) <= 130
    nested: object = value
    for _ in range(2000):
        nested = [nested, {"key": nested}]
    assert len(brief(nested)) <= 130


def test_lists_are_cut() -> None:
    assert listed([]) == ""
    assert listed([str(n) for n in range(6)]) == "0, 1, 2, 3, 4 and 1 more"
