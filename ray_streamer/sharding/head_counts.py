"""Do the numbers of attention heads fit the tensors? A wrong number may divide all the same, and then cuts through heads.

What attention gives has one value head's size for each head, so the inputs of `o_proj` and the outputs of `v_proj` are as many times that
size as there are heads and key-value heads. Keys and queries tell less: some models make queries twice as large, for a gate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ray_streamer.errors import CheckpointError
from ray_streamer.sharding.companion import Companion
from ray_streamer.sharding.name_kinds import kinds_of_tensors
from ray_streamer.sharding.placement import Split
from ray_streamer.units import counted
from ray_streamer.wording import shown

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.groups import TensorGroups

_VALUES = ".v_proj.weight"
_OUTPUTS = (".o_proj.weight", ".dense.weight")


class _Heads(NamedTuple):
    """How a weight is cut by heads.

    Attributes:
        split: Says how many there are.
        shape: Of the weight.
    """

    split: Split
    shape: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return self.split.heads or self.split.kv_heads or 1

    @property
    def num_indices(self) -> int:
        """Indices of all heads."""
        return self.shape[self.split.dim]

    def is_cut_alike(self, num_heads: int, tp: int) -> bool:
        """Whether each rank would hold the same if there were `num_heads`."""
        other = replace(self.split, **{"heads" if self.split.heads else "kv_heads": num_heads})
        return not other.refusal(self.shape, tp) and all(
            other.share_of(self.shape, tp_index=at, tp=tp) == self.split.share_of(self.shape, tp_index=at, tp=tp)
            for at in range(tp)
        )


def refuse_other_heads(index: CheckpointIndex, grouped: TensorGroups, tp: int) -> None:
    """Refuses a checkpoint whose values would be cut elsewhere than between heads of the size that attention's outputs have.

    Args:
        index: The checkpoint's tensors.
        grouped: How they lie; all of them can be cut.
        tp: Ranks over which they are cut.

    Raises:
        CheckpointError: They would; names the tensors and both numbers of heads.
    """
    names = kinds_of_tensors(index)
    is_values = names.of_kinds([text.endswith(_VALUES) for text in names.texts], dtype=bool)
    for tensor in np.flatnonzero(is_values).tolist():
        name = index.names[tensor]
        module = name.removesuffix(_VALUES)
        output = next((found for suffix in _OUTPUTS if (found := index.find(module + suffix)) is not None), None)
        values, outputs = _heads_of(grouped, tensor), None if output is None else _heads_of(grouped, output)
        if output is None or values is None or outputs is None or not outputs.num_indices:
            continue
        num_heads, rest = divmod(values.num_indices * outputs.num_heads, outputs.num_indices)
        if num_heads == values.num_heads and not rest:
            continue
        if rest or not num_heads or not values.is_cut_alike(num_heads, tp):
            raise CheckpointError(
                f"{index.uri}: {counted(outputs.num_heads, 'head')} and {counted(values.num_heads, 'key-value head')} do not fit "
                f"{shown(index.names[output])} of {outputs.num_indices} inputs and {shown(name)} of {values.num_indices} outputs: "
                "correct num_attention_heads and num_key_value_heads of config.json, or the heads in your rules"
            )


def _heads_of(grouped: TensorGroups, tensor: int) -> _Heads | None:
    """None where the weight is not cut by heads."""
    group = grouped.groups[grouped.ids[tensor]]
    placement, shape = group.placement, group.shape
    if isinstance(placement, Companion):
        placement, shape = placement.weight, placement.weight_shape
    return (
        _Heads(placement, shape) if isinstance(placement, Split) and (placement.heads or placement.kv_heads) else None
    )
