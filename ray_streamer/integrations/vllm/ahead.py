"""What can be done before a load, while vLLM still builds the model? Modules are imported, and the store's library is warmed up.

Both are done once per process, and take longer than a small load: of CPU seconds, 0.1 for modules, 0.6 for boto3 and its first client.
Nothing is asked of anybody. What fails here fails in the load again, which says it.

A thread that imports beside another one cannot end in a deadlock: two threads wait for each other only where their modules
import each other, and none of these imports vLLM or a model.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from threading import Thread
from typing import TYPE_CHECKING

from ray_streamer.checkpoint import locate
from ray_streamer.storage import open_storage

if TYPE_CHECKING:
    from ray_streamer.settings import Settings

LATE_MODULES = (
    "ray_streamer.device.caller_memory",
    "ray_streamer.device.cpu",
    "ray_streamer.exchange.claims",
    "ray_streamer.rank.given_memory",
    "ray_streamer.rank.request",
    "ray_streamer.rank.shared_tensors",
    "pyarrow.ipc",
)
"""What a load imports when it first needs it, whatever it loads; vLLM's other load formats do without."""


def prepare_load(uri: str, settings: Settings) -> Thread:
    """Begins to import what a load of the checkpoint at `uri` needs; the thread ends by itself, and nobody need wait for it."""
    thread = Thread(target=_prepare, args=(uri, settings), name="ray_streamer-imports", daemon=True)
    thread.start()
    return thread


def _prepare(uri: str, settings: Settings) -> None:
    for name in LATE_MODULES:
        _try_to_import(name)
    with contextlib.suppress(Exception):
        # A client of boto3 reads megabytes of what boto3 knows about S3, which the next one finds read.
        open_storage(locate(uri).folder_uri, settings).close()


def _try_to_import(name: str) -> None:
    with contextlib.suppress(Exception):
        import_module(name)
