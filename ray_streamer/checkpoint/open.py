"""How does a URI become an index? Its files are found and their headers read; where these disagree with the index json, that decides.

    locate ─> index json, or what the folder has ─> headers ─> reconcile with the index json ─> index

`header_reads` says how headers are read.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ray_streamer.checkpoint.disagreements import Reconciled, reconcile
from ray_streamer.checkpoint.folder_hints import INDEX_NAME, missing_folder, missing_selection, nothing_to_open
from ray_streamer.checkpoint.header_reads import HEAD_BYTES, headers_of
from ray_streamer.checkpoint.index import CheckpointIndex
from ray_streamer.checkpoint.json_files import (
    NO_LISTING,
    full_name,
    may_list,
    names_if_listed,
    read_config,
    read_json_config,
    read_json_file,
)
from ray_streamer.checkpoint.location import locate
from ray_streamer.checkpoint.pipeline import PIPELINE_NAME, component_files
from ray_streamer.checkpoint.shard_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    DIFFUSERS_NAME,
    SINGLE_NAME,
    adapter_files_of,
    is_of_adapter,
    refuse_states_of_ranks,
    shard_files_of,
    tell_unnamed,
)
from ray_streamer.checkpoint.weight_map import parse_weight_map
from ray_streamer.errors import (
    AccessError,
    CheckpointError,
    CredentialsError,
    IndexMismatchError,
    ObjectMissingError,
    StorageError,
)
from ray_streamer.units import counted, verb
from ray_streamer.wording import listed, printable, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.checkpoint.header import FileHeader
    from ray_streamer.checkpoint.index import FoundBy, ShardFile
    from ray_streamer.checkpoint.weight_map import WeightMap
    from ray_streamer.storage.base import Storage

ADAPTER_KEY = "adapter_config"
"""Where the config of an adapter's index has what its adapter_config.json says, beside the base model's config."""

# Metadata of files in which torch's own writer keeps a part of each tensor; see its `HuggingFaceStorageWriter`.
_PARTS_OF_DCP = "DCP_SHARDING_INFO"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Files:
    """The shard files to read.

    Attributes:
        paths: Sorted.
        found_by: What named them.
        weight_map: The index json, when there is one.
        index_name: Its name.
        components: Of a pipeline: the component that each file belongs to.
    """

    paths: list[str]
    found_by: FoundBy
    weight_map: WeightMap | None = None
    index_name: str = ""
    components: Mapping[str, str] = field(default_factory=dict)


def open_checkpoint(
    uri: str, storage: Storage, *, concurrency: int = 16, head_bytes: int = HEAD_BYTES, strict_index: bool = False
) -> CheckpointIndex:
    """Read and check every header of a checkpoint.

    Args:
        uri: A folder or prefix, one `.safetensors` file, or one index json.
        storage: Open on `locate(uri).folder_uri`; the caller closes it.
        concurrency: Headers read at the same time.
        head_bytes: Length of the first read of each shard file.
        strict_index: Whether an index json that disagrees with the headers is refused; else it decides, with a warning.

    Raises:
        ObjectMissingError: Nothing is at `uri`, or a file that the index json or the files' own names tell of is missing.
        HeaderError: A header is malformed, or its file truncated.
        IndexMismatchError: Index json and headers disagree, and `strict_index` is set.
        CheckpointError: Something else of the checkpoint is malformed, it is not in safetensors format, or files hold parts of
            tensors.
        StorageError: Storage failed; see `Storage`.
    """
    location = locate(uri)
    files = _files_of(storage, location.selection)
    if files.found_by == "index":
        tell_unnamed(storage, files.paths, index_name=files.index_name)
    config = read_config(storage)
    if all(map(is_of_adapter, files.paths)) and (adapter := read_json_config(storage, ADAPTER_CONFIG_NAME)) is not None:
        config = {**(config or {}), ADAPTER_KEY: adapter}
    found = _headers_of_all(storage, files, concurrency=concurrency, head_bytes=head_bytes)
    headers = tuple(_named_in_pipeline(header, files.components.get(file.path)) for file, header in found)
    reconciled = Reconciled(headers=headers)
    if files.weight_map is not None:
        reconciled = reconcile(files.weight_map.files, files.paths, headers)
        _tell_disagreements(
            reconciled, files.weight_map, file=full_name(storage, files.index_name), strict=strict_index
        )
    index = CheckpointIndex.from_headers(
        location.folder_uri,
        [file for file, _ in found],
        reconciled.headers,
        config=config,
        found_by=files.found_by,
        absent=reconciled.absent,
        unlisted=reconciled.unlisted,
    )
    _logger.info(
        "opened %s: %d tensors, %d bytes in %d files", printable(uri), len(index), index.total_bytes, len(index.files)
    )
    return index


def _files_of(storage: Storage, selection: str | None) -> _Files:
    """What to read: the selection, the files of the index json, or else what the folder has."""
    if selection is not None and not selection.endswith(".json"):
        return _Files([selection], "name")
    name = selection or INDEX_NAME
    try:
        data = read_json_file(storage, name)
    except CredentialsError:
        # A listing would look for them again, for as long.
        raise
    except AccessError:
        if selection is not None or may_list(storage):
            raise
        _logger.warning("%s %s; going on with %s", printable(full_name(storage, name)), NO_LISTING, SINGLE_NAME)
        return _Files([SINGLE_NAME], "folder")
    except StorageError as error:
        if selection is not None:
            raise missing_selection(storage, selection, error) or error from error
        if not isinstance(error, ObjectMissingError):
            raise
        return _files_without_index(storage)
    weight_map = parse_weight_map(data, file=full_name(storage, name))
    return _Files(weight_map.paths, "index" if selection is None else "name", weight_map, name)


def shard_paths(storage: Storage) -> list[str]:
    """The files that a load of the folder would read, without a look into them.

    Raises:
        RayStreamerError: As `open_checkpoint`, for a folder that holds no checkpoint.
    """
    return _files_of(storage, None).paths


def _files_without_index(storage: Storage) -> _Files:
    """The shard files of a folder without an index json: of a model, else of a pipeline's components, else of an adapter.

    Pipelines are often published with the same weights once more beside the components, in one file for other programs.
    Only a file that is called as a model's comes before the components.
    """
    try:
        names = storage.list()
    except ObjectMissingError as error:
        raise missing_folder(storage, error) from error
    except CredentialsError:
        raise
    except AccessError as error:
        return _Files([_single_file(storage, error)], "folder")
    if (index_name := f"{DIFFUSERS_NAME}.index.json") in names:
        return _files_of(storage, index_name)
    is_pipeline = PIPELINE_NAME in names and not {SINGLE_NAME, DIFFUSERS_NAME} & set(names)
    if is_pipeline and (components := component_files(storage)):
        return _Files(sorted(components), "folder", components=components)
    if found := shard_files_of(names, uri=storage.uri):
        return _Files(found, "folder")
    if ADAPTER_CONFIG_NAME in names and (index_name := f"{ADAPTER_NAME}.index.json") in names:
        return _files_of(storage, index_name)
    if found := adapter_files_of(names, uri=storage.uri):
        # It has what it was made for, and need not have a part of every layer.
        return _Files(found, "name")
    raise nothing_to_open(storage, names)


def _named_in_pipeline(header: FileHeader, component: str | None) -> FileHeader:
    if component is None:
        return header
    return replace(header, names=tuple(f"{component}.{name}" for name in header.names))


def _single_file(storage: Storage, refused: AccessError) -> str:
    """The one file of a model in a folder without an index json that cannot be listed."""
    try:
        storage.size_and_etag(SINGLE_NAME)
    except ObjectMissingError:
        raise ObjectMissingError(
            f"{storage.uri}: neither {INDEX_NAME} nor {SINGLE_NAME} is there, and the folder cannot be listed; check the path, "
            "or give the uri of one file"
        ) from refused
    return SINGLE_NAME


def _headers_of_all(
    storage: Storage, files: _Files, *, concurrency: int, head_bytes: int
) -> list[tuple[ShardFile, FileHeader]]:
    """Every file with its header; none of them is missing, or holds parts of tensors."""
    reads = headers_of(storage, files.paths, concurrency=concurrency, head_bytes=head_bytes)
    _refuse_missing(storage, files, reads)
    found = [read for read in reads if read is not None]
    _refuse_parts(storage, found)
    return found


def _refuse_missing(storage: Storage, files: _Files, reads: Sequence[object | None]) -> None:
    missing = [path for path, read in zip(files.paths, reads, strict=True) if read is None]
    if not missing:
        return
    if files.weight_map is None and files.found_by == "name":
        error = ObjectMissingError(f"{full_name(storage, missing[0])}: no such file")
        raise missing_selection(storage, missing[0], error) or error
    do = verb(len(missing), "does", "do")
    listing = listed([shown(path) for path in missing])
    if files.weight_map is not None:
        # Where vLLM writes its sharded_state, the index json of the checkpoint is often copied to it.
        refuse_states_of_ranks(names_if_listed(storage), uri=storage.uri)
        raise ObjectMissingError(
            f"{full_name(storage, files.index_name)} names {counted(len(files.paths), 'file')}, of which {len(missing)} "
            f"{do} not exist: {listing}; fetch them from the same revision, or wait until they are uploaded"
        )
    raise ObjectMissingError(
        f"{storage.uri} is incomplete: {listing} {do} not lead to a file, as links of a cache that was copied without its "
        "blobs, or was deleted since; fetch the folder again"
    )


def _refuse_parts(storage: Storage, found: Sequence[tuple[ShardFile, FileHeader]]) -> None:
    """Parts have the names of whole tensors, and no shape that tells them apart."""
    path = next((file.path for file, header in found if _PARTS_OF_DCP in header.metadata), None)
    if path is not None:
        raise CheckpointError(
            f"{full_name(storage, path)} holds parts of tensors, as torch's HuggingFaceStorageWriter writes them with "
            "save_distributed=True; write with enable_consolidation=True, and load that folder"
        )


def _tell_disagreements(reconciled: Reconciled, weight_map: WeightMap, *, file: str, strict: bool) -> None:
    """One warning, or with `strict` one error, about everything in which the index json is wrong."""
    differences = [*reconciled.differences]
    if weight_map.dotted:
        names = listed([shown(name) for name in weight_map.dotted])
        differences.append(f"{counted(len(weight_map.dotted), 'file name')} with '.' components: {names}")
    if not differences:
        return
    told = f"{file} and the headers of its files disagree: {'; '.join(differences)}"
    if strict:
        raise IndexMismatchError(
            f"{told}. Fetch the index and all files again from one revision, or let the index decide: strict_index is set"
        )
    _logger.warning("%s. The index decides; the setting strict_index refuses such a checkpoint.", printable(told))
