"""What does one rank want of a checkpoint, and where does it go? The values that every slice source gives and planning takes.

    move          one copy between two strided views: the checkpoint's tensor and a result
    result        one tensor that a rank ends with
    rank_slices   all results of one rank, and the moves that fill them
    rank_sources  what its neighbours need to know of that: which parts of which tensors it reads

Rules (`sharding/`) are one source of these values, an engine's own loader (`capture/`) is another. Everything here is pure:
no I/O, no torch.
"""

from ray_streamer.slices.move import Move, Side
from ray_streamer.slices.rank_slices import RankSlices
from ray_streamer.slices.rank_sources import RankSources, SourceView
from ray_streamer.slices.result import ResultForm, ResultSpec, ResultSpecs
from ray_streamer.slices.source import ReadingSource, SliceSource, Values, checked_slices

__all__ = [
    "Move",
    "RankSlices",
    "RankSources",
    "ReadingSource",
    "ResultForm",
    "ResultSpec",
    "ResultSpecs",
    "Side",
    "SliceSource",
    "SourceView",
    "Values",
    "checked_slices",
]
