"""How does a URI become an index? By one speculative read per shard file, in parallel, and no tensor byte.

    locate ─> index json, or what the folder has ─> heads, in parallel ─> parse ─> index ─> cross-check

The read that fetches a header pins the file's size and ETag, so that a file replaced later is noticed. Which error is
reported does not depend on timing: of several broken files, it is the first by path.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint.header import MAX_HEADER_BYTES, header_extent, parse_header
from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.checkpoint.location import locate
from ray_streamer.checkpoint.strict_json import MalformedJsonError, parse_lenient
from ray_streamer.checkpoint.weight_map import cross_check, listed, parse_weight_map
from ray_streamer.errors import CheckpointError, ObjectMissingError
from ray_streamer.extent import Extent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.checkpoint.header import FileHeader
    from ray_streamer.storage.base import ObjectInfo, Storage

HEAD_BYTES = 256 << 10
"""First read of each shard file: holds a header of about 2,000 tensors; a longer one costs a second read."""

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

_JSON_HEAD_BYTES = 16 << 20
_CHECK_PLACE = "check the path, or the bucket and prefix"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")

_logger = logging.getLogger(__name__)


def open_checkpoint(
    uri: str, storage: Storage, *, concurrency: int = 16, head_bytes: int = HEAD_BYTES
) -> CheckpointIndex:
    """Read and check every header of a checkpoint.

    Args:
        uri: A folder or prefix, one `.safetensors` file, or one index json.
        storage: Open on `locate(uri).folder_uri`; the caller closes it.
        concurrency: Headers read at the same time.
        head_bytes: Length of the first read of each shard file.

    Raises:
        ObjectMissingError: Nothing is at `uri`, or a file that the index json names is missing.
        HeaderError: A header is malformed, or its file truncated.
        IndexMismatchError: Index json and headers disagree.
        CheckpointError: Something else of the checkpoint is malformed, or it is not in safetensors format.
        StorageError: Storage failed; see `Storage`.
    """
    location = locate(uri)
    selection = location.selection
    weight_map, index_name = None, selection or INDEX_NAME
    if index_name.endswith(".json"):
        weight_map = _read_weight_map(storage, index_name)
    if weight_map is not None:
        paths = sorted(set(weight_map.values()))
    else:
        paths = _find_shard_files(storage) if selection is None else [selection]
    config = _read_config(storage)
    reads = _read_headers(storage, paths, concurrency=concurrency, head_bytes=head_bytes)
    _refuse_missing(storage, paths, reads, named_by=index_name if weight_map else None)
    found = [read for read in reads if read is not None]
    index = CheckpointIndex.from_headers(
        location.folder_uri, [file for file, _ in found], [header for _, header in found], config=config
    )
    if weight_map is not None:
        cross_check(weight_map, index, file=_full_name(storage, index_name))
    _logger.info("opened %s: %d tensors, %d bytes in %d files", uri, len(index), index.total_bytes, len(index.files))
    return index


def _read_weight_map(storage: Storage, name: str) -> dict[str, str] | None:
    """The file of each tensor by the index json; None when there is none."""
    try:
        data = _read_json_file(storage, name)
    except ObjectMissingError:
        return None
    return parse_weight_map(data, file=_full_name(storage, name))


def _find_shard_files(storage: Storage) -> list[str]:
    """The shard files of a folder without an index json, sorted."""
    try:
        names = storage.list()
    except ObjectMissingError as error:
        raise ObjectMissingError(f"{error}; {_CHECK_PLACE}") from error
    shard_files = [name for name in names if name.endswith(".safetensors")]
    if SINGLE_NAME in shard_files:
        return [SINGLE_NAME]
    own_files = [name for name in shard_files if not name.startswith("consolidated")]
    if not own_files:
        raise _nothing_to_open(storage.uri, names, shard_files)
    return own_files


def _nothing_to_open(uri: str, names: list[str], consolidated: list[str]) -> CheckpointError | ObjectMissingError:
    wanted = f"looked for {INDEX_NAME}, {SINGLE_NAME} and *.safetensors"
    others = [name for name in names if name.endswith(_OTHER_FORMATS)]
    if not names:
        return ObjectMissingError(f"{uri}: nothing is there; {wanted}; {_CHECK_PLACE}")
    if consolidated:
        found = f"{listed(consolidated)}, whose tensors have other names; give the uri of one file to open it anyway"
    elif others:
        found = f"{listed(others)}; convert the checkpoint to safetensors first"
    else:
        found = f"{listed(names)}; is the checkpoint in another folder?"
    return CheckpointError(f"{uri}: no safetensors checkpoint; {wanted}, found only {found}")


def _read_config(storage: Storage) -> dict[str, Any] | None:
    try:
        data = _read_json_file(storage, CONFIG_NAME)
    except ObjectMissingError:
        return None
    try:
        return parse_lenient(data)
    except MalformedJsonError as error:
        raise CheckpointError(f"{_full_name(storage, CONFIG_NAME)} {error}; fetch it again") from None


def _read_headers(
    storage: Storage, paths: Sequence[str], *, concurrency: int, head_bytes: int
) -> list[tuple[ShardFile, FileHeader] | None]:
    pool = ThreadPoolExecutor(min(concurrency, len(paths)), thread_name_prefix="read-header")
    try:
        futures = [pool.submit(_read_header, storage, path, head_bytes) for path in paths]
        # In order of path, so that the error raised is the first by path, whichever came first.
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _read_header(storage: Storage, path: str, head_bytes: int) -> tuple[ShardFile, FileHeader] | None:
    """One file's identity and header; None when it does not exist."""
    try:
        head, info = storage.read_head(path, head_bytes)
    except ObjectMissingError:
        return None
    file = _full_name(storage, path)
    extent = header_extent(head, file=file, size_bytes=info.size_bytes)
    head = _read_up_to(storage, path, extent.stop, head, info)
    return ShardFile(path, info.size_bytes, info.etag), parse_header(head, file=file, size_bytes=info.size_bytes)


def _refuse_missing(
    storage: Storage, paths: Sequence[str], reads: Sequence[object | None], *, named_by: str | None
) -> None:
    missing = [path for path, read in zip(paths, reads, strict=True) if read is None]
    if not missing:
        return
    if named_by is None:
        raise ObjectMissingError(f"{_full_name(storage, missing[0])}: no such file; check the path")
    raise ObjectMissingError(
        f"{_full_name(storage, named_by)} names {len(paths)} files, of which {len(missing)} do not exist: "
        f"{listed(missing)}; fetch them from the same revision"
    )


def _read_json_file(storage: Storage, name: str) -> bytes:
    head, info = storage.read_head(name, _JSON_HEAD_BYTES)
    if info.size_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{_full_name(storage, name)} has {info.size_bytes} bytes, above the cap of {MAX_HEADER_BYTES} for json"
        )
    return _read_up_to(storage, name, info.size_bytes, head, info)


def _read_up_to(storage: Storage, path: str, stop: int, head: bytes, info: ObjectInfo) -> bytes:
    """`head`, continued to byte `stop` of the file when it ends before."""
    if len(head) >= stop:
        return head
    rest = bytearray(stop - len(head))
    storage.read_into(path, Extent(len(head), stop), memoryview(rest), etag=info.etag)
    return head + rest


def _full_name(storage: Storage, path: str) -> str:
    return f"{storage.uri.rstrip('/')}/{path}"
