"""How are the headers of several files read? By one speculative read for each file, in parallel, and no tensor byte.

The read that fetches a header pins the file's size and ETag, so that a file replaced later is noticed. Which error is
reported does not depend on timing: of several broken files, it is the first by path.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ray_streamer.checkpoint.folder_hints import missing_selection
from ray_streamer.checkpoint.header import header_extent, parse_header
from ray_streamer.checkpoint.index import ShardFile
from ray_streamer.checkpoint.json_files import full_name, read_up_to
from ray_streamer.collector import collector_paused
from ray_streamer.errors import ObjectMissingError, StorageError
from ray_streamer.process_limits import check_room_for_threads, limits_explained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.checkpoint.header import FileHeader
    from ray_streamer.storage import Storage

HEAD_BYTES = 256 << 10
"""First read of each shard file: holds a header of about 2,000 tensors; a longer one costs a second read."""


def read_headers(
    storage: Storage, paths: Sequence[str], *, concurrency: int = 16, head_bytes: int = HEAD_BYTES
) -> list[tuple[ShardFile, FileHeader]]:
    """Identity and header of single files, whatever folder and checkpoint they belong to, in the order of `paths`.

    Args:
        storage: Has the files.
        paths: Of them.
        concurrency: Headers read at the same time.
        head_bytes: Length of the first read of each file.

    Raises:
        ObjectMissingError: There is no such file; names the first one by position.
        HeaderError: A header is malformed, or its file truncated.
        StorageError: Storage failed; see `Storage`.
    """
    found: list[tuple[ShardFile, FileHeader]] = []
    if not paths:
        return found
    reads = headers_of(storage, paths, concurrency=concurrency, head_bytes=head_bytes)
    for path, read in zip(paths, reads, strict=True):
        if read is None:
            raise ObjectMissingError(f"{full_name(storage, path)}: no such file")
        found.append(read)
    return found


def headers_of(
    storage: Storage, paths: Sequence[str], *, concurrency: int, head_bytes: int
) -> list[tuple[ShardFile, FileHeader] | None]:
    """As `read_headers`, of at least one path; None for a file that does not exist."""
    num_threads = min(concurrency, len(paths))
    check_room_for_threads(num_threads)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-header")
    try:
        with limits_explained("start the threads that read headers"):
            futures = [pool.submit(_read_header, storage, path, head_bytes) for path in paths]
        # In order of path, so that the error raised is the first by path, whichever came first. Parsed here: threads would only
        # take the interpreter's lock from each other.
        reads = [future.result() for future in futures]
        with collector_paused():
            return [_parsed(storage, read) for read in reads]
    finally:
        pool.shutdown(cancel_futures=True)


def _read_header(storage: Storage, path: str, head_bytes: int) -> tuple[ShardFile, bytes] | None:
    """One file's identity, and its first bytes up to the end of the header; None when it does not exist."""
    try:
        head, info = storage.read_head(path, head_bytes)
    except ObjectMissingError:
        return None
    except StorageError as error:
        raise missing_selection(storage, path, error) or error from error
    stop = header_extent(head, file=full_name(storage, path), size_bytes=info.size_bytes).stop
    head = read_up_to(storage, path, stop, head, info)
    return ShardFile(path, info.size_bytes, info.etag), head[:stop]


def _parsed(storage: Storage, read: tuple[ShardFile, bytes] | None) -> tuple[ShardFile, FileHeader] | None:
    if read is None:
        return None
    file, head = read
    return file, parse_header(head, file=full_name(storage, file.path), size_bytes=file.size_bytes)
