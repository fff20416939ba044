"""Which blocks does no rank read for the others? Those of files that the page cache holds: every rank copies its own part of them.

Which files these are is decided once per node, by its first rank, so that all ranks agree who reads what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.rank.block_source import Loan, Way, keep

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ray_streamer.planning.rank_plan import Block, RankPlan
    from ray_streamer.storage.base import Storage


class Mappings:
    """Files that this rank copies from a mapping; see `BlockSource`.

    Args:
        mine: What this rank does.
        storage: Lends its files as memory.
    """

    def __init__(self, mine: RankPlan, storage: Storage) -> None:
        self._mine, self._storage = mine, storage
        self._views: dict[int, NDArray[np.uint8]] = {}

    def open(self, agree: Callable[[Callable[[], list[int]]], list[int]], *, is_wanted: bool) -> None:
        """Maps the files that the node agrees on.

        Args:
            agree: The numbers that its argument gives on the node's first rank, on every rank.
            is_wanted: Whether this rank's device copies well from a mapping.

        Raises:
            ObjectChangedError: A file is not the one that the index saw.
        """
        files = self._mine.files
        candidates = self._mine.wanted_files() if is_wanted else []
        agreed = agree(lambda: [file for file in candidates if self._storage.is_resident(files[file].path)])
        for file in agreed:
            view = self._storage.view(files[file].path, etag=files[file].etag)
            self._views[file] = np.frombuffer(view, dtype=np.uint8)

    def have(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which blocks of `numbers` lie in mapped files."""
        return np.isin(self._mine.files_of(numbers), np.array([*self._views], dtype=np.int64))

    def __contains__(self, file: int) -> bool:
        """Whether file number `file` is mapped."""
        return file in self._views

    def borrow(self, block: Block) -> Loan | None:
        """See `BlockSource.borrow`."""
        view = self._views.get(block.file)
        if view is None:
            return None
        # A file that was cut short by now would end the process instead.
        self._check_unchanged(block.file)
        return Loan(Way.MAPPED, view[block.extent.start : block.extent.stop], keep)

    def verify(self) -> None:
        """See `BlockSource.verify`; a mapping shows what is written to its file meanwhile."""
        for file in list(self._views):
            self._check_unchanged(file)

    def close(self) -> None:
        """Lets go of the mappings, which are the storage's."""
        self._views.clear()

    def _check_unchanged(self, number: int) -> None:
        file = self._mine.files[number]
        self._storage.check_unchanged(file.path, etag=file.etag)
