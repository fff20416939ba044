"""Which tensors are alike? Those of one rule, shape, dtype and holders; what is wrong with the rules is found on the way.

A rule places a tensor by its name, or, where no rule has that name, as a part of a quantized weight that one has. Rules that
decide nothing and tensors that have none are listed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ray_streamer.arguments import check_choice
from ray_streamer.dtypes import DTYPES, DType
from ray_streamer.errors import ShardingError
from ray_streamer.rows import distinct, distinct_rows
from ray_streamer.sharding.globs import starred
from ray_streamer.sharding.placement import Placement, Replicate, Skip
from ray_streamer.sharding.quantization import MODULE_HOLDERS, find_quantized
from ray_streamer.units import counted, verb
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.holders import Holders
    from ray_streamer.sharding.mesh import Mesh, MeshPosition
    from ray_streamer.sharding.name_kinds import NameKinds
    from ray_streamer.sharding.quantization import QuantizedWeights
    from ray_streamer.sharding.rules import ShardRules
    from ray_streamer.sharding.tensor_slice import TensorSlice

Unmatched = Literal["error", "replicate"]

DEFAULT_UNMATCHED: Unmatched = "error"

_NUM_SHOWN = 8
_NO_RULE, _LEFT_OUT = -1, -2
_UNPLACED: dict[int, Placement] = {_NO_RULE: Replicate(), _LEFT_OUT: Skip()}


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors alike in rule, shape, dtype and holders, hence in slices.

    Attributes:
        placement: How they lie.
        shape: Logical elements.
        dtype: As their headers say.
        holders: Which ranks may hold them.
        example: Position in the index of the first of them.
        num_tensors: How many there are.
    """

    placement: Placement
    shape: tuple[int, ...]
    dtype: DType
    holders: Holders
    example: int = 0
    num_tensors: int = 1

    def refusal(self, mesh: Mesh) -> str | None:
        """Why these tensors cannot be placed on `mesh`, or None when they can."""
        tp = self.holders.tp(mesh)
        refused = self.placement.refusal(self.shape, tp) or self._torn_byte(tp)
        return refused or self.holders.refusal(self.placement, self.shape, mesh)

    def slice_of(self, mesh: Mesh, at: MeshPosition) -> TensorSlice | None:
        """What ranks at this position of `mesh` hold; None when nothing."""
        if not self.holders.holds(at):
            return None
        tp = self.holders.tp(mesh)
        share = self.placement.share_of(self.shape, tp_index=at.tp % tp, tp=tp)
        return None if share is None else self.holders.slice_of(share, at)

    def _torn_byte(self, tp: int) -> str | None:
        """Storage moves whole bytes, so a row of a dtype narrower than a byte may be cut at whole bytes only."""
        if self.dtype.num_bits % 8 == 0 or not self.shape:
            return None
        shares = (self.placement.share_of(self.shape, tp_index=index, tp=tp) for index in range(tp))
        for held in (held for share in shares if share for held in share.indices[-1]):
            for edge in (held.start, held.stop):
                if edge * self.dtype.num_bits % 8:
                    return f"element {edge} of the last dimension begins inside a byte of packed {self.dtype.name}"
        return None


@dataclass(frozen=True, slots=True, eq=False)
class TensorGroups:
    """All tensors of a checkpoint by group.

    Attributes:
        groups: In order of their first tensors.
        ids: For each tensor the position of its group; int64.
        quantized: The weights that are stored in several tensors.
    """

    groups: tuple[TensorGroup, ...]
    ids: NDArray[np.int64]
    quantized: QuantizedWeights


def group_tensors(
    index: CheckpointIndex,
    names: NameKinds,
    rules: ShardRules,
    holders: Sequence[Holders],
    holder_ids: NDArray[np.int64],
    unmatched: Unmatched,
) -> TensorGroups:
    """The groups of all tensors.

    Args:
        index: The checkpoint's tensors.
        names: Their names.
        rules: Which placement each name has.
        holders: Which ranks may hold tensors.
        holder_ids: For each tensor the position of its holders.
        unmatched: What becomes of tensors that need a rule and have none.

    Raises:
        ShardingError: A rule that is not optional places no tensor, or a tensor has no rule and needs one.
        SettingsError: `unmatched` is neither of its two values.
    """
    quantized = find_quantized(index, names)
    rule_ids, form_ids = quantized.lend_rules(rules, names, rules.first_matches(names))
    if unmatched == "error":
        rule_ids = np.where(_left_over(index, rule_ids), _LEFT_OUT, rule_ids)
    _check_rules(index, rules, rule_ids, unmatched)
    columns = [rule_ids, form_ids, holder_ids, index.dtype_codes, index.num_dims, *index.shapes.T]
    alike = distinct_rows(columns)
    counts = np.bincount(alike.ids, minlength=len(alike.firsts)).tolist()
    groups: list[TensorGroup] = []
    for row, example, count in zip(alike.values(), alike.firsts.tolist(), counts, strict=True):
        rule_id, form_id, holder_id, dtype_code, num_dims, *sizes = row
        placement = rules.rules[rule_id].placement if rule_id >= 0 else _UNPLACED[rule_id]
        placement = quantized.forms[form_id].placed_with(placement) if form_id >= 0 else placement
        shape = tuple(sizes[:num_dims])
        groups.append(TensorGroup(placement, shape, DTYPES[dtype_code], holders[holder_id], example, count))
    return TensorGroups(tuple(groups), alike.ids, quantized)


def _left_over(index: CheckpointIndex, rule_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tensors are matrices that neither a rule nor the index json knows: left over from something, so nobody holds them."""
    is_unlisted = np.zeros(len(index), dtype=np.bool_)
    is_unlisted[[index.position(name) for name in index.unlisted]] = True
    return is_unlisted & (rule_ids == _NO_RULE) & (index.num_dims >= 2)


def _check_rules(index: CheckpointIndex, rules: ShardRules, rule_ids: NDArray[np.int64], unmatched: Unmatched) -> None:
    check_choice("unmatched", unmatched, Unmatched)
    faults: list[str] = []
    used = set(distinct(rule_ids).tolist())
    unused = [repr(rule.glob) for position, rule in enumerate(rules) if not rule.optional and position not in used]
    if unused:
        faults.append(
            f"{counted(len(unused), 'rule')} {verb(len(unused), 'places', 'place')} no tensor of {index.uri}: "
            f"{_shown(unused, len(unused))}. No name matches, or an earlier rule takes them all. Correct or remove them; in Python, "
            "Rule(..., optional=True) may place none."
        )
    without = np.flatnonzero((rule_ids == _NO_RULE) & (index.num_dims >= 2)).tolist()
    if without and unmatched == "error":
        faults.append(
            f"{counted(len(without), 'tensor')} of {index.uri} {verb(len(without), 'has', 'have')} two or more dimensions "
            "and no rule: "
            f"{_shown([named(index, tensor) for tensor in without[:_NUM_SHOWN]], len(without))}. "
            f'Say how they lie, for example rules={{"{starred(index.names[without[0]])}": Split(0)}} if that is a column-parallel weight '
            'and Split(1) if it is row-parallel, or let every rank hold them whole with unmatched="replicate".'
        )
    if strays := _beside_cut_weights(index, rules, rule_ids) if unmatched == "error" else []:
        faults.append(
            f"{counted(len(strays), 'tensor')} of {index.uri} {verb(len(strays), 'lies', 'lie')} beside a weight that is cut "
            f"and {verb(len(strays), 'has', 'have')} no rule: "
            f"{_shown([named(index, tensor) for tensor in strays], len(strays))}. Say how they lie, for example "
            f'rules={{"{starred(index.names[strays[0]])}": Replicate()}}, or let every rank hold them whole with '
            'unmatched="replicate".'
        )
    if faults:
        raise ShardingError(" ".join(faults))


def _beside_cut_weights(index: CheckpointIndex, rules: ShardRules, rule_ids: NDArray[np.int64]) -> list[int]:
    """Tensors of one dimension without a rule that may have to be cut as their module's weight is."""
    strays: list[int] = []
    for tensor in np.flatnonzero((rule_ids < 0) & (index.num_dims == 1)).tolist():
        module = index.names[tensor].rpartition(".")[0]
        held = (index.find(f"{module}.{holder}") for holder in MODULE_HOLDERS)
        weight = next((found for found in held if found is not None), None)
        if weight is None or rule_ids[weight] < 0 or index.shape_of(tensor) == (1,):
            continue
        if not isinstance(rules.rules[rule_ids[weight]].placement, Replicate | Skip):
            strays.append(tensor)
    return strays


def named(index: CheckpointIndex, tensor: int) -> str:
    """A tensor as messages show it: name and shape."""
    return f"{printable(index.names[tensor], one_line=True)} {list(index.shape_of(tensor))}"


def _shown(items: Sequence[str], num_all: int) -> str:
    """The first items, and how many there are beyond them."""
    shown = items[:_NUM_SHOWN]
    return ", ".join(shown) + (f" and {num_all - len(shown)} more" if num_all > len(shown) else "")
