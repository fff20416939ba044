"""May the cyclic garbage collector wait a moment? While many objects are made that all stay, its passes find nothing.

A process that has imported torch, or runs an engine, has a heap that each full pass walks for a tenth of a second: a third of the time in
which a large checkpoint's headers are parsed and planned. It waits only while something is computed, never while anything is waited for.
"""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_lock = threading.Lock()
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
            _num_pausing -= 1
            if not _num_pausing and _was_enabled:
                gc.enable()
