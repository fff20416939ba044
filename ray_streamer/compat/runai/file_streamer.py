"""How are raw ranges of files streamed, and which files are there?"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import torch

from ray_streamer.compat.runai.arguments import items_of
from ray_streamer.compat.runai.chunks import FileChunks, index_of_chunks
from ray_streamer.compat.runai.credentials import settings_for
from ray_streamer.compat.runai.errors import translated
from ray_streamer.compat.runai.streamer import Streamer
from ray_streamer.files import Selection
from ray_streamer.files.pull import identities
from ray_streamer.storage import absolute_uri, open_storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.compat.runai.credentials import S3Credentials
    from ray_streamer.compat.runai.places import StorePaths
    from ray_streamer.settings import Settings
    from ray_streamer.storage import Storage


class ChunkStreamer(Streamer):
    """Streams raw ranges; `FileStreamer` and `DistributedStreamer` differ in their arguments only."""

    def __init__(self) -> None:
        super().__init__()
        self._requests: list[FileChunks] = []

    def get_chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Each range once: id of its request, its number in it, and its bytes as uint8 of shape (1, size).

        Files come in the order of the requests, ranges of a file in the order of their bytes.

        Raises:
            FileAccessError: A read failed; ranges that were given before are complete.
        """
        for name, tensor in self._take():
            number, _, at = name.partition(":")
            yield self._requests[int(number)].id, int(at), tensor.reshape(1, -1)

    def _stream_chunks(
        self,
        requests: Sequence[FileChunks],
        *,
        credentials: S3Credentials | None,
        device: str | None,
        is_distributed: bool,
        memory_limit: int | None,
        owned: bool,
    ) -> None:
        wanted: list[FileChunks] = items_of("file_stream_requests", FileChunks, requests)

        def make_index(storage: Storage, store: StorePaths, settings: Settings) -> CheckpointIndex:
            some = wanted[store.first : store.first + len(store.paths)]
            return index_of_chunks(storage, store.paths, some, first=store.first, concurrency=settings.concurrency)

        self._begin(
            [request.path for request in wanted],
            make_index,
            lambda indices: [index.names for index in indices],
            credentials=credentials,
            device=device,
            is_distributed=is_distributed,
            memory_limit=memory_limit,
            is_owned=owned,
        )
        self._requests = wanted


class FileStreamer(ChunkStreamer):
    """Raw ranges of files.

    with FileStreamer() as streamer:
        streamer.stream_files([FileChunks(0, "/models/weights.bin", [0, 4096], [4096, 100])])
        for request_id, number, chunk in streamer.get_chunks():
            ...
    """

    def list_files(
        self,
        prefix: str,
        is_recursive: bool = True,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
    ) -> list[tuple[str, int]]:
        """Uri and size of each file in a folder.

        Args:
            prefix: The folder.
            is_recursive: Whether folders in it count, too.
            allow_patterns: Globs of names; every file when unset.
            ignore_patterns: Globs of names to leave out.

        Raises:
            FileAccessError: The folder does not exist, or may not be listed.
        """
        selection = Selection.from_globs(allow_patterns, ignore_patterns)
        settings, prefix = settings_for(None), absolute_uri(prefix)
        with translated(), closing(open_storage(prefix, settings)) as storage:
            paths = selection.of(storage.list(recursive=is_recursive))
            sizes = identities(storage, paths, concurrency=settings.concurrency)
        folder = prefix.rstrip("/")
        return [(f"{folder}/{path}", info.size_bytes) for path, info in zip(paths, sizes, strict=True)]

    def stream_files(
        self,
        file_stream_requests: list[FileChunks],
        credentials: S3Credentials | None = None,
        device: str | None = "cpu",
        memory_limit: int | None = None,
        owned: bool = True,
    ) -> None:
        """Begins a stream of ranges; `get_chunks` gives them.

        Args:
            file_stream_requests: Which ranges; files may repeat.
            credentials: For object stores; as boto3 finds them when unset.
            device: Where the bytes are given.
            memory_limit: Bytes read and not used up: N = at most N, 0 = one range at a time, -1 = no limit; unset =
                RUNAI_STREAMER_MEMORY_LIMIT, else the default of every load.
            owned: Whether a range stays as it is after the next one was asked for; else its memory is used again.

        Raises:
            SettingsError: The last stream was not taken to its end, or the streamer is not open.
            FileAccessError: A file is not there, or ends before a range does.
            RunaiStreamerMemoryLimitException: The limit cannot hold the largest range.
        """
        self._stream_chunks(
            file_stream_requests,
            credentials=credentials,
            device=device,
            is_distributed=False,
            memory_limit=memory_limit,
            owned=owned,
        )


class DistributedStreamer(ChunkStreamer):
    """Raw ranges of files, which the ranks of a node may read together."""

    def stream_files(
        self,
        file_stream_requests: list[FileChunks],
        credentials: S3Credentials | None,
        device: str,
        is_distributed: bool,
        owned: bool = True,
    ) -> None:
        """As `FileStreamer.stream_files`.

        Args:
            file_stream_requests: Which ranges; equal on all ranks with `is_distributed`.
            credentials: For object stores; as boto3 finds them when unset.
            device: Where the bytes are given.
            is_distributed: Whether the ranks of torch.distributed's default group on this node read each byte once, for all of
                them; all ranks call this then, and take their streams to the end.
            owned: Whether a range stays as it is after the next one was asked for.

        Raises:
            SettingsError: The last stream was not taken to its end, or the streamer is not open.
            FileAccessError: A file is not there, or ends before a range does.
            RankFailedError: Another rank failed.
        """
        self._stream_chunks(
            file_stream_requests,
            credentials=credentials,
            device=device,
            is_distributed=is_distributed,
            memory_limit=None,
            owned=owned,
        )

    def get_group_size(self) -> int:
        """Ranks of this node that read the current stream together; 1 when this process reads for itself."""
        return 1 if self._stream is None or self._stream.ranks is None else len(self._stream.ranks)

    def get_cuda_free_memory(self) -> int:
        """Bytes that torch's current CUDA device has free.

        Raises:
            RuntimeError: There is none.
        """
        return torch.cuda.mem_get_info()[0]

    def ring_info(self) -> tuple[int, int, int] | None:
        """Nothing: there is no ring of buffers here, since each range has memory of its own."""
        return None
