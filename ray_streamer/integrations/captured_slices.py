"""Which slices does a rank of an engine want? Those that its model's own loader copies, seen in one dry run over the checkpoint."""

from __future__ import annotations

import hashlib
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

from ray_streamer.capture import Capture
from ray_streamer.checkpoint import locate
from ray_streamer.rank.tensor_stream import read_whole
from ray_streamer.storage import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch

    from ray_streamer.capture import CaptureReport, Reader
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.settings import Settings
    from ray_streamer.slices import RankSlices, Values


class CapturedSlices:
    """A slice source: given the checkpoint's index, it runs the loader and says what it copied.

    Args:
        uri: Of the checkpoint.
        settings: For reading it.
        load: The engine's loader; called with names and lazy tensors.
        targets: Parameters and buffers by name, asked for once the loader has run.
        skips: Names of tensors that are not offered to the loader.
        around_reads: Entered in the loader's thread while values that it needs are read, which may wait for other ranks.

    Attributes:
        out: Memory of each result, filled in when it was called; for `load_rank`.
        loaded: What the loader returned.
        report: What became of the tensors; None before it was called.
        index: The checkpoint; None before.
        early_bytes: What this rank read while the loader ran.
    """

    def __init__(
        self,
        uri: str,
        settings: Settings,
        *,
        load: Callable[[Iterable[tuple[str, torch.Tensor]]], Any],
        targets: Callable[[], dict[str, torch.Tensor]],
        skips: Callable[[str], bool],
        around_reads: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._uri, self._settings = uri, settings
        self._load, self._targets, self._skips = load, targets, skips
        self._around_reads = around_reads
        self.out: dict[str, torch.Tensor] = {}
        self.loaded: Any = None
        self.report: CaptureReport | None = None
        self.index: CheckpointIndex | None = None
        self.early_bytes = 0

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        """The slices of this rank, whatever its number is; the loader knows which rank it is."""
        return self._say(index, self._read_alone(index), lambda: None)

    def with_values(self, index: CheckpointIndex, rank: int, values: Values) -> RankSlices:
        """The same; values that the loader needs are read with the other ranks of the node."""
        alone, is_running = self._read_alone(index), True

        def read(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
            # Tensors that the loader kept may be used later, when the others no longer read with this rank.
            return values.read(names) if is_running else alone(names)

        slices = self._say(index, read, values.step)
        is_running = False
        self.early_bytes = values.bytes_read
        return slices

    def _read_alone(self, index: CheckpointIndex) -> Reader:
        return lambda names: read_tensors(self._uri, self._settings, index, names)

    @property
    def taken(self) -> tuple[str, ...]:
        """Names of the tensors that the loader took anything of."""
        report = self.report
        assert report is not None
        groups = (report.planned, report.cast, report.early, report.whole)
        return tuple(dict.fromkeys(name for group in groups for name in group.names))

    def _say(self, index: CheckpointIndex, read: Reader, step: Callable[[], None]) -> RankSlices:
        self.index = index

        def read_apart(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
            with self._around_reads():
                return read(names)

        recording = Capture(index, read_apart)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name in index.names:
                step()
                if not self._skips(name):
                    yield name, recording.tensor(name)

        with recording:
            self.loaded = self._load(tensors())
        slices, out = recording.slices(self._targets())
        self.out.update(out)
        self.report = recording.report
        return slices


def contents_of(index: CheckpointIndex) -> str:
    """A hash of names, dtypes and shapes of all tensors: checkpoints for which it is equal load alike."""
    digest = hashlib.blake2b("\0".join(index.names).encode(), digest_size=16)
    for column in (index.dtype_codes, index.num_dims, index.shapes):
        digest.update(column.tobytes())
    return digest.hexdigest()


def read_tensors(uri: str, settings: Settings, index: CheckpointIndex, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint, whole, read by this rank alone."""
    with closing(open_storage(locate(uri).folder_uri, settings)) as storage:
        return read_whole(
            index, storage, names, block_bytes=int(settings.block_bytes), concurrency=settings.concurrency
        )
