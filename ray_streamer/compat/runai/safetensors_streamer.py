"""How are the tensors of safetensors files streamed whole? Headers first, then each tensor in the order of its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray_streamer.checkpoint import CheckpointIndex, read_headers
from ray_streamer.compat.runai.arguments import names_of
from ray_streamer.compat.runai.streamer import Streamer
from ray_streamer.errors import SettingsError
from ray_streamer.wording import listed, shown

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    import torch

    from ray_streamer.compat.runai.credentials import S3Credentials
    from ray_streamer.compat.runai.places import StorePaths
    from ray_streamer.settings import Settings
    from ray_streamer.storage import Storage


@dataclass(frozen=True)
class Offsets:
    """Bytes of a tensor, half-open, from the first byte after the header."""

    start: int
    end: int


@dataclass(frozen=True)
class SafetensorMetadata:
    """What a header says of one tensor; `dtype` as written there."""

    name: str
    shape: list[int]
    dtype: str
    offsets: Offsets


class SafetensorsStreamer(Streamer):
    """The tensors of safetensors files, one at a time, ahead of whoever takes them.

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(["/models/llama/model.safetensors"])
        for name, tensor in streamer.get_tensors():
            ...

    Attributes:
        files_to_tensors_metadata: What is streamed of each file, by its position among the paths.
        total_size: Bytes of that.
        device_str: Where tensors are given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files_to_tensors_metadata: dict[int, list[SafetensorMetadata]] = {}
        self.total_size = 0
        self.device_str: str | None = None

    def stream_file(
        self,
        path: str,
        s3_credentials: S3Credentials | None = None,
        device: str | None = "cpu",
        is_distributed: bool = False,
        tensor_names: Collection[str] | None = None,
        owned: bool = True,
    ) -> None:
        """As `stream_files`, of one file."""
        self.stream_files([path], s3_credentials, device, is_distributed, tensor_names, owned)

    def stream_files(
        self,
        paths: list[str],
        s3_credentials: S3Credentials | None = None,
        device: str | None = "cpu",
        is_distributed: bool = False,
        tensor_names: Collection[str] | None = None,
        owned: bool = True,
    ) -> None:
        """Reads the headers of the files and begins a stream of their tensors; `get_tensors` gives them.

        RUNAI_STREAMER_MEMORY_LIMIT bounds what is read and not used up: N = at most N bytes, over all ranks of the node with
        `is_distributed`; 0 = one tensor at a time; -1 = no limit; unset = the default of every load.

        Args:
            paths: Of safetensors files, in one kind of store.
            s3_credentials: For object stores; as boto3 finds them when unset.
            device: Where tensors are given.
            is_distributed: Whether the ranks of torch.distributed's default group on this node read each byte once, for all of
                them; all ranks call this then, and take their streams to the end.
            tensor_names: Only these; ranks may name different ones.
            owned: Whether a tensor stays as it is after the next one was asked for; else its memory is used again.

        Raises:
            SettingsError: `tensor_names` is empty, unknown or in several files; or the last stream was not taken to its end.
            FileAccessError: A file is not there, or may not be read.
            CorruptedFileError: A header is malformed, or its file has another length than it says.
            RunaiStreamerMemoryLimitException: The limit cannot hold the largest tensor.
            RankFailedError: Another rank failed.
        """
        if isinstance(paths, str):
            raise SettingsError(f"paths is a list, not one text: give [{paths!r}], or call stream_file")
        if not isinstance(paths, Iterable):
            raise SettingsError(f"paths is a list of paths, got {type(paths).__name__}")
        paths, wanted = list(paths), names_of(tensor_names)
        stream = self._begin(
            paths,
            _index_of_files,
            lambda indices: _chosen(indices, wanted),
            credentials=s3_credentials,
            device=device,
            is_distributed=is_distributed,
            memory_limit=None,
            is_owned=owned,
        )
        self.files_to_tensors_metadata = {number: [] for number in range(len(paths))}
        for part in stream.parts:
            for name in part.names:
                number, _, tensor_name = name.partition(":")
                self.files_to_tensors_metadata[int(number)].append(_metadata(part.index, name, tensor_name))
        self.total_size = sum(sum(part.sizes()) for part in stream.parts)
        self.device_str = str(stream.device)

    def get_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, each once: files in the order of the paths, tensors of a file in the order of their bytes.

        Raises:
            FileAccessError: A read failed; tensors that were given before are complete.
            RankFailedError: With `is_distributed`, another rank failed or stopped taking tensors.
        """
        for name, tensor in self._take():
            yield name.partition(":")[2], tensor


def _index_of_files(storage: Storage, store: StorePaths, settings: Settings) -> CheckpointIndex:
    """An index of all tensors of the files, called "<number of the file>:<name>": names may repeat in other files."""
    found = read_headers(storage, store.paths, concurrency=settings.concurrency)
    return CheckpointIndex.from_headers(
        storage.uri,
        [file for file, _ in found],
        [
            replace(header, names=tuple(f"{number}:{name}" for name in header.names))
            for number, (_, header) in enumerate(found, store.first)
        ],
    )


def _chosen(indices: Sequence[CheckpointIndex], wanted: frozenset[str] | None) -> list[tuple[str, ...]]:
    """The rows of each index that are wanted.

    Raises:
        SettingsError: A wanted name is in no file, or in several.
    """
    if wanted is None:
        return [index.names for index in indices]
    chosen = [tuple(name for name in index.names if name.partition(":")[2] in wanted) for index in indices]
    found = Counter(name.partition(":")[2] for names in chosen for name in names)
    unknown = sorted(wanted - found.keys())
    if unknown:
        raise SettingsError(f"tensor_names not found in the files: {listed([shown(name) for name in unknown])}")
    repeated = sorted(name for name, count in found.items() if count > 1)
    if repeated:
        raise SettingsError(
            f"tensor_names that are in more than one file: {listed([shown(name) for name in repeated])}; stream one of the "
            "files alone"
        )
    return chosen


def _metadata(index: CheckpointIndex, name: str, tensor_name: str) -> SafetensorMetadata:
    position = index.position(name)
    extent = index.extent_of(position)
    data_start = int(index.starts[index.file_ids == index.file_ids[position]].min())
    return SafetensorMetadata(
        tensor_name,
        list(index.shape_of(position)),
        index.dtype_of(position).name,
        Offsets(extent.start - data_start, extent.stop - data_start),
    )
