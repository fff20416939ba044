"""Which part of each tensor does each rank hold?

`Mesh` numbers the ranks, `ShardRules` give every tensor name a placement, and `resolve_slices` turns both into a
`SliceTable`, which is all that planning and streaming ever see. Everything here is pure: no I/O, no device, no cluster.
"""

from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.part import Part
from ray_streamer.sharding.placement import Placement, Replicate, Skip, Split, SplitGroups, SplitVocabulary
from ray_streamer.sharding.resolve import legal_tp, resolve_slices
from ray_streamer.sharding.rules import Rule, ShardRules
from ray_streamer.sharding.slices import Box, SlicePattern, SliceTable, TensorSlice

__all__ = [
    "Box",
    "Mesh",
    "Part",
    "Placement",
    "Replicate",
    "Rule",
    "ShardRules",
    "Skip",
    "SlicePattern",
    "SliceTable",
    "Split",
    "SplitGroups",
    "SplitVocabulary",
    "TensorSlice",
    "legal_tp",
    "resolve_slices",
]
