"""How does a file come from storage to disk? Complete or not at all: written under another name, renamed when it has every byte."""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from ray_streamer.errors import BudgetError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.files.selection import check_path
from ray_streamer.machine import memory_rooms
from ray_streamer.process_limits import limit_met
from ray_streamer.storage.mounts import mount_of, read_mount_table
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ray_streamer.storage import ObjectInfo, Storage

_BLOCK_BYTES = 4 << 20

_SPARE_BYTES = 64 << 20
"""Memory that is left for the process itself, and for blocks that other threads write meanwhile."""

_Outcome = TypeVar("_Outcome")


def pull_files(
    storage: Storage,
    paths: Sequence[str],
    folder: Path,
    *,
    versions: Sequence[ObjectInfo] | None = None,
    concurrency: int,
) -> list[Path]:
    """Copies files into `folder`, which is made if need be, over what is there already.

    Each thread needs one buffer of at most 4 MiB. When one file fails, those that are complete stay.

    Args:
        storage: Where the files are.
        paths: Of the files, relative to the storage.
        folder: Where they go, under the same relative paths.
        versions: Which version each of them must be; the one that is there when unset.
        concurrency: Files at a time.

    Returns:
        Where each file is now, in the order of `paths`.

    Raises:
        CheckpointError: A path could lead out of `folder`; nothing was read then.
        ObjectChangedError: A file is of another version, or was replaced meanwhile.
        StorageError: A file could not be read or written.
        BudgetError: The folder lies in memory, which is full.
    """
    for path in paths:
        check_path(path, uri=storage.uri)
    wanted = {} if versions is None else dict(zip(paths, versions, strict=True))
    return of_each(
        paths, lambda path: _pull_file(storage, path, folder, version=wanted.get(path)), concurrency=concurrency
    )


def identities(storage: Storage, paths: Sequence[str], *, concurrency: int) -> list[ObjectInfo]:
    """Size and identity of every file, in the order of `paths`."""
    return of_each(paths, storage.size_and_etag, concurrency=concurrency)


def of_each(paths: Sequence[str], work: Callable[[str], _Outcome], *, concurrency: int) -> list[_Outcome]:
    """What `work` gives for each path, in their order; the first error by path ends it, and what has not begun."""
    if not paths:
        return []
    pool = ThreadPoolExecutor(min(concurrency, len(paths)), thread_name_prefix="file")
    try:
        return list(pool.map(work, paths))
    finally:
        pool.shutdown(cancel_futures=True)


def _pull_file(storage: Storage, path: str, folder: Path, *, version: ObjectInfo | None) -> Path:
    target = folder / path
    # Not made of the file's own name, which may be as long as names can be.
    temporary = target.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.part")
    with disk_errors_translated(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        is_in_memory = mount_of(os.path.realpath(target.parent), read_mount_table()).is_memory
        try:
            with temporary.open("xb") as file:
                for part in _parts(storage, path, version):
                    if is_in_memory:
                        _refuse_to_fill_memory(target)
                    file.write(part)
            temporary.replace(target)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    return target


def _refuse_to_fill_memory(target: Path) -> None:
    """Refuses to write on where the kernel would soon end this process: the file would stay, and its memory be lost.

    Raises:
        BudgetError: The limit that is met.
    """
    room = min(memory_rooms(), key=lambda room: room.most_bytes)
    if room.most_bytes < _SPARE_BYTES:
        raise BudgetError(
            f"cannot write {target}, which lies in memory (tmpfs): {human_bytes(room.most_bytes)} of {room.name} are left; give a "
            "folder on disk, or raise the limit"
        )


def _parts(storage: Storage, path: str, version: ObjectInfo | None) -> Iterator[bytes | memoryview]:
    """The bytes of one version of a file, in order; each part is valid until the next one is asked for."""
    if version is None:
        head, version = storage.read_head(path, _BLOCK_BYTES)
        yield head
    else:
        head = b""
    if len(head) >= version.size_bytes:
        return
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, version.size_bytes - len(head))))
    for start in range(len(head), version.size_bytes, _BLOCK_BYTES):
        extent = Extent(start, min(start + _BLOCK_BYTES, version.size_bytes))
        part = buffer[: extent.num_bytes]
        storage.read_into(path, extent, part, etag=version.etag)
        yield part


@contextmanager
def disk_errors_translated(target: Path) -> Iterator[None]:
    """What the operating system says about writing below `target`, as a typed error; errors of the storage pass."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        said = f"{error.strerror or error}; give another folder (for the cache: setting cache_dir), or make room"
        reason = limit_met(error) or said
        raise StorageError(f"cannot write {target}: {reason}") from error
