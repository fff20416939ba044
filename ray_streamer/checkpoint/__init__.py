"""Which tensors exist, and where are their bytes?

`locate` splits a URI into folder and selection, `open_checkpoint` reads every header through storage, and the answer is
one columnar `CheckpointIndex`. No tensor byte is read here.
"""

from __future__ import annotations

from ray_streamer.checkpoint.header_reads import read_headers
from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.checkpoint.location import CheckpointLocation, locate
from ray_streamer.checkpoint.open import open_checkpoint, shard_paths

__all__ = [
    "CheckpointIndex",
    "CheckpointLocation",
    "ShardFile",
    "locate",
    "open_checkpoint",
    "read_headers",
    "shard_paths",
]
