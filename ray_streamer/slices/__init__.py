"""What does one rank want of a checkpoint, and where does it go? The values that every slice source gives and planning takes.

    move          one copy between two strided views: the checkpoint's tensor and a result
    result        one tensor that a rank ends with
    rank_slices   all results of one rank, and the moves that fill them

Rules (`sharding/`) are one source of these values, an engine's own loader (`capture/`) is another. Everything here is pure:
no I/O, no torch.
"""

from ray_streamer.slices.move import Move, Side
from ray_streamer.slices.rank_slices import RankSlices, SliceSource
from ray_streamer.slices.result import ResultSpec

__all__ = ["Move", "RankSlices", "ResultSpec", "Side", "SliceSource"]
