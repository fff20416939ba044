"""What does code that runs beside a rank's tensors see?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ray_streamer.sharding.mesh import Mesh


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankContext:
    """One rank after its load; what `ShardedModel.run` gives to a function.

    Attributes:
        rank: Global rank.
        mesh: The grid of ranks; `mesh.coordinate(rank)` says where this one is.
        device: Where the tensors are.
        node: The node, as messages name it.
        tensors: This rank's results by name; what the function changes stays changed.
        model: What `bootstrap` made of them, such as a model of transformers; None without it.
    """

    rank: int
    mesh: Mesh
    device: str
    node: str
    tensors: dict[str, torch.Tensor] = field(repr=False)
    model: Any = field(default=None, repr=False)
