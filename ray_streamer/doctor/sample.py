"""Which part of a checkpoint stands for all of it? From each file a stretch of whole tensors that lie side by side.

So a rehearsal reads every file, in blocks like those of the load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.slices import RankSlices
from ray_streamer.slices.result import ResultSpecs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.slices import SliceSource


@dataclass(frozen=True, slots=True)
class SampledSlices:
    """What each rank holds of the sample; see `SliceSource`.

    Attributes:
        slices: What each rank holds of the whole.
        max_bytes: Of the checkpoint, about.
        place: Where the middle of each file's stretch is, as a share of the file.
    """

    slices: SliceSource
    max_bytes: int
    place: float = 0.5

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        """The results that come out of sampled tensors alone."""
        said = self.slices(index, rank)
        is_sampled = sample_tensors(index, self.max_bytes, self.place)[said.tensor_ids]
        is_kept = np.zeros(len(said.results), dtype=np.bool_)
        is_kept[said.result_ids] = True
        is_kept[said.result_ids[~is_sampled]] = False
        rows = is_kept[said.result_ids]
        names = tuple(name for name, kept in zip(said.results.names, is_kept.tolist(), strict=True) if kept)
        return RankSlices(
            ResultSpecs(names, said.results.forms, said.results.form_ids[is_kept]),
            said.patterns,
            said.tensor_ids[rows],
            (np.cumsum(is_kept) - 1)[said.result_ids[rows]].astype(np.int32),
            said.pattern_ids[rows],
            said.target_offsets[rows],
        )


def sample_tensors(index: CheckpointIndex, max_bytes: int, place: float = 0.5) -> NDArray[np.bool_]:
    """For each tensor of the index whether it belongs to the sample: about `max_bytes`, at least one of each file that has any."""
    is_sampled = np.zeros(len(index), dtype=np.bool_)
    sizes = index.stops - index.starts
    share = min(1.0, max_bytes / max(1, index.total_bytes))
    for file in range(len(index.files)):
        rows = np.flatnonzero(index.file_ids == file)
        ends = np.cumsum(sizes[rows])
        if not len(rows):
            continue
        wanted, total = share * float(ends[-1]), float(ends[-1])
        first = min(max(0.0, place * total - wanted / 2), total - wanted)
        # The tensor that holds the first wanted byte, and all that begin before the last one.
        is_sampled[rows[(ends > first) & (ends - sizes[rows] < first + max(wanted, 1.0))]] = True
    return is_sampled
