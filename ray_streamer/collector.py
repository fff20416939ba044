"""May the cyclic garbage collector wait a moment? While many objects are made that all stay, its passes find nothing.

A process that has imported torch, or runs an engine, has a heap that each full pass walks for a tenth of a second: a third of the time in
which a large checkpoint's headers are parsed and planned, and of what it takes to import this package. It waits only while something is
computed, never while anything is waited for.
"""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# A thread that forks in a signal handler may hold it already.
_lock = threading.RLock()
_num_pausing = 0
_was_enabled = False


@contextmanager
def collector_paused() -> Iterator[None]:
    """The collector is off for the length of the block, in all threads; blocks of several threads may overlap."""
    global _num_pausing, _was_enabled
    with _lock:
        if not _num_pausing:
            _was_enabled = gc.isenabled()
            gc.disable()
        _num_pausing += 1
    try:
        yield
    finally:
        with _lock:
            # None are left in a forked process, but for a block that itself forked.
            _num_pausing = max(0, _num_pausing - 1)
            if not _num_pausing and _was_enabled:
                gc.enable()


@contextmanager
def imports_kept() -> Iterator[None]:
    """For imports that stay, in a process of this package's own: no passes meanwhile, and later ones leave out all that is there by now."""
    with collector_paused():
        yield
        gc.freeze()


def _go_on_in_child() -> None:
    """After a fork: the threads whose blocks switched the collector off are not there to switch it on."""
    global _num_pausing
    if _num_pausing and _was_enabled:
        gc.enable()
    _num_pausing = 0
    _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_go_on_in_child)
