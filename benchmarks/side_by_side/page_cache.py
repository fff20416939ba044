"""Are the checkpoint's files in the page cache? They are put into that state, and then it is checked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ray_streamer.demo.checkpoint import drop_page_cache
from ray_streamer.extent import PAGE_BYTES, Extent
from ray_streamer.storage.residency import count_cached_pages, seems_page_cached

if TYPE_CHECKING:
    from pathlib import Path

TOLERATED = 0.01
"""Share of the pages that may be in the other state: what a stray read brings, or memory pressure takes."""


class PageCacheError(RuntimeError):
    """The files could not be brought into the state that is to be measured."""


def warm_page_cache(folder: Path) -> None:
    """Reads a folder's files, unless they are in memory already, so that the next run finds them there.

    Raises:
        PageCacheError: The kernel does not keep them.
    """
    if cached_share(folder) == 1:
        return
    for path in _files(folder):
        with path.open("rb", buffering=0) as stream:
            while stream.read(8 << 20):
                pass
    share = cached_share(folder)
    if share < 1 - TOLERATED:
        raise PageCacheError(f"only {share:.0%} of {folder} stays in the page cache; free memory, or load fewer layers")


def cool_page_cache(folder: Path) -> None:
    """Makes the kernel forget a folder's files, so that the next run reads the disk.

    Raises:
        PageCacheError: The kernel keeps them, as on tmpfs, or while another process maps them.
    """
    drop_page_cache(folder)
    share = cached_share(folder)
    if share > TOLERATED:
        raise PageCacheError(f"{share:.0%} of {folder} stays in the page cache; use a folder on a disk (--folder)")


def cached_share(folder: Path) -> float:
    """Which part of a folder's files is in the page cache; a guess by samples where the kernel does not count."""
    cached = pages = 0
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            size_bytes = os.fstat(descriptor).st_size
            counted = count_cached_pages(descriptor, Extent(0, size_bytes))
            total = -(-size_bytes // PAGE_BYTES)
            if counted is None:
                counted = total if seems_page_cached(descriptor, size_bytes) else 0
        finally:
            os.close(descriptor)
        cached, pages = cached + counted, pages + total
    return cached / pages if pages else 1.0


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())
