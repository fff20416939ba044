"""Which slices does a rank of vLLM want? Those that its model's own loader copies, seen in one dry run over the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_streamer.capture import Capture
from ray_streamer.checkpoint import locate
from ray_streamer.rank.whole_tensors import read_whole
from ray_streamer.storage import open_storage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from ray_streamer.capture import CaptureReport
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.settings import Settings
    from ray_streamer.slices import RankSlices


class CapturedSlices:
    """A slice source: called with the checkpoint's index, it runs the loader and says what it copied.

    Args:
        uri: Of the checkpoint, for tensors whose values the loader needs.
        settings: For reading those.
        load: The engine's loader; called with names and lazy tensors.
        targets: Parameters and buffers by name, asked for once the loader has run.
        skips: Names of tensors that are not offered to the loader.

    Attributes:
        out: Memory of each result, filled in when it was called; for `load_rank`.
        loaded: What the loader returned.
        report: What became of the tensors; None before it was called.
        index: The checkpoint; None before.
    """

    def __init__(
        self,
        uri: str,
        settings: Settings,
        *,
        load: Callable[[Iterable[tuple[str, torch.Tensor]]], Any],
        targets: Callable[[], dict[str, torch.Tensor]],
        skips: Callable[[str], bool],
    ) -> None:
        self._uri, self._settings = uri, settings
        self._load, self._targets, self._skips = load, targets, skips
        self.out: dict[str, torch.Tensor] = {}
        self.loaded: Any = None
        self.report: CaptureReport | None = None
        self.index: CheckpointIndex | None = None

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        """The slices of this rank, whatever its number is; the loader knows which rank it is."""
        self.index = index
        recording = Capture(index, lambda names: read_tensors(self._uri, self._settings, index, names))
        with recording:
            self.loaded = self._load(recording.tensors(name for name in index.names if not self._skips(name)))
        slices, out = recording.slices(self._targets())
        self.out.update(out)
        self.report = recording.report
        return slices


def read_tensors(uri: str, settings: Settings, index: CheckpointIndex, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint, whole, read by this rank alone."""
    storage = open_storage(locate(uri).folder_uri, settings)
    try:
        return read_whole(
            index, storage, names, block_bytes=int(settings.block_bytes), concurrency=settings.concurrency
        )
    finally:
        storage.close()
