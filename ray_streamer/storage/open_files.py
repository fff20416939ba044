"""How many files are open at once? A bounded number, however many a checkpoint has.

A file that nobody reads stays open until its place is needed. When all places are taken by files that are being read, whoever
wants another one waits for a read to end.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

_SHARE_OF_LIMIT = 16
"""A storage opens at most this part of the files that a process may have; each may take two descriptors."""


@dataclass(slots=True, eq=False)
class OpenFile:
    """Descriptors of one file.

    Attributes:
        buffered: Reads through the page cache.
        direct: Reads around it, where somebody wanted that.
        num_users: Who reads now.
    """

    buffered: int
    direct: int | None = None
    num_users: int = 0

    def close(self) -> None:
        """Gives the descriptors back."""
        for descriptor in (self.buffered, self.direct):
            if descriptor is not None:
                os.close(descriptor)


def num_places(concurrency: int) -> int:
    """Files that a storage keeps open for so many readers, within this process's limit on descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = concurrency if soft == resource.RLIM_INFINITY else soft // _SHARE_OF_LIMIT
    return max(1, min(concurrency, allowed))


class OpenFiles:
    """Open files by key; safe to use from many threads.

    Args:
        num_places: Files that may be open at once.
    """

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._num_opening = 0
        self._files: OrderedDict[Hashable, OpenFile] = OrderedDict()
        self._changed = threading.Condition()
        self._is_closed = False

    @contextmanager
    def use(self, key: Hashable, open_it: Callable[[], int]) -> Iterator[OpenFile]:
        """The open file of `key`, which stays open for the length of the block, whatever `close` is called meanwhile.

        A thread uses one key at a time.

        Args:
            key: Stands for the file, and names it in messages.
            open_it: Opens it, when it is not open.

        Raises:
            StorageError: The storage was closed before.
            OSError: As `open_it` raises.
        """
        file = self._find(key) or self._open(key, open_it)
        try:
            yield file
        finally:
            with self._changed:
                file.num_users -= 1
                if self._is_closed and not file.num_users:
                    self._files.pop(key)
                    file.close()
                self._changed.notify_all()

    def discard(self, key: Hashable) -> None:
        """Closes a file that nobody reads."""
        with self._changed:
            file = self._files.get(key)
            if file is not None and not file.num_users:
                self._files.pop(key).close()
                self._changed.notify_all()

    def close(self) -> None:
        """Refuses new users, closes what nobody reads, and the rest when its last read ends."""
        with self._changed:
            self._is_closed = True
            self._close_idle(0)
            self._changed.notify_all()

    def _find(self, key: Hashable) -> OpenFile | None:
        """The file, if it is open, with one user more; else a place is kept for it, when there is one."""
        with self._changed:
            while True:
                if self._is_closed:
                    raise StorageError(f"{key} is read after its storage was closed")
                file = self._files.get(key)
                if file is not None:
                    file.num_users += 1
                    self._files.move_to_end(key)
                    return file
                self._close_idle(self._num_places - self._num_opening - 1)
                if len(self._files) + self._num_opening < self._num_places:
                    self._num_opening += 1
                    return None
                self._changed.wait()

    def _open(self, key: Hashable, open_it: Callable[[], int]) -> OpenFile:
        """Opens the file in the place that `_find` kept."""
        descriptor = None
        try:
            descriptor = self._open_or_make_room(open_it)
        finally:
            with self._changed:
                self._num_opening -= 1
                found = None if descriptor is None else self._keep_open(key, descriptor)
                self._changed.notify_all()
        if found is None:
            raise StorageError(f"{key} is read after its storage was closed")
        return found

    def _open_or_make_room(self, open_it: Callable[[], int]) -> int:
        try:
            return open_it()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self._changed:
            self._close_idle(0)
        return open_it()

    def _keep_open(self, key: Hashable, descriptor: int) -> OpenFile | None:
        """The file with a new descriptor, or with the one that another thread opened meanwhile; None after `close`."""
        known = self._files.get(key)
        if self._is_closed or known is not None:
            os.close(descriptor)
        if self._is_closed:
            return None
        if known is None:
            known = self._files[key] = OpenFile(descriptor)
        known.num_users += 1
        return known

    def _close_idle(self, num_left: int) -> None:
        """Closes files that nobody reads, those unused for longest first, until `num_left` are open."""
        idle = [key for key, file in self._files.items() if not file.num_users]
        for key in idle[: max(0, len(self._files) - max(0, num_left))]:
            self._files.pop(key).close()
