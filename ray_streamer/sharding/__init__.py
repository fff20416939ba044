"""Which part of each tensor does each rank hold?

`Mesh` numbers the ranks, `ShardRules` give every tensor name a placement, and `RuleSlices` makes both the slices of one rank,
which are all that planning and loading ever see. Everything here is pure: no I/O, no device, no cluster.
"""

from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.part import Part
from ray_streamer.sharding.placement import Placement, Replicate, Skip, Split, SplitGroups, SplitVocabulary
from ray_streamer.sharding.resolve import legal_tp
from ray_streamer.sharding.rules import Rule, ShardRules
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.sharding.tensor_slice import TensorSlice

__all__ = [
    "Mesh",
    "Part",
    "Placement",
    "Replicate",
    "Rule",
    "RuleSlices",
    "ShardRules",
    "Skip",
    "Split",
    "SplitGroups",
    "SplitVocabulary",
    "TensorSlice",
    "legal_tp",
]
