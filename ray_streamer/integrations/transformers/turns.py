"""Which load of this process is inside of transformers? One at a time: transformers patches itself and torch while it makes a model.

Two at once undo each other's patches in the wrong order, and no model of the process has tied weights from then on. A load
that waits for other ranks meanwhile lets the next one in: else each of two ranks could wait for another load of the other.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"
"""With it, transformers loads in the thread that calls it: capture follows one thread."""


class _Turn(NamedTuple):
    """A turn under way.

    Attributes:
        thread: Whose it is.
        switch: What the switch was before.
    """

    thread: int
    switch: str | None


_lock = threading.RLock()
_held: list[_Turn] = []
"""The turn under way, and those inside of it in the same thread, as of a model that loads another one."""


@contextmanager
def own_turn() -> Iterator[None]:
    """Waits until no other thread has a turn, and has one: nobody else is inside of transformers, which starts no threads."""
    _begin()
    try:
        yield
    finally:
        # Whoever was interrupted in `others_turn` has none any more.
        if _is_mine():
            _end()


@contextmanager
def others_turn() -> Iterator[None]:
    """Lets others have their turn while this thread waits for something else; nothing where it has none."""
    depth = len(_held) if _is_mine() else 0
    for _ in range(depth):
        _end()
    try:
        yield
    finally:
        for _ in range(depth):
            _begin()


def _is_mine() -> bool:
    return any(turn.thread == threading.get_ident() for turn in tuple(_held))


def _begin() -> None:
    _lock.acquire()
    _held.append(_Turn(threading.get_ident(), os.environ.get(_SWITCH)))
    os.environ[_SWITCH] = "1"


def _end() -> None:
    before = _held.pop().switch
    if before is None:
        os.environ.pop(_SWITCH, None)
    else:
        os.environ[_SWITCH] = before
    _lock.release()


def _forget_others() -> None:
    """After a fork: a turn of another thread is over, since that thread is not there."""
    global _lock
    if _held and not _is_mine():
        _lock = threading.RLock()
        for _ in range(len(_held)):
            _lock.acquire()
            _end()


os.register_at_fork(after_in_child=_forget_others)
