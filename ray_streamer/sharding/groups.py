"""Which tensors are alike? Those of one rule, shape, dtype and residence; what is wrong with the rules is found on the way.

A rule places a tensor by its name, or, where no rule has that name, as a part of a quantized weight that one has. Rules that
decide nothing and tensors that have none are listed together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ray_streamer.dtypes import DTYPES, DType
from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding.placement import Placement, Replicate, Skip
from ray_streamer.sharding.quantization import parts_of_weights
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.mesh import Mesh
    from ray_streamer.sharding.residence import Residence
    from ray_streamer.sharding.rules import ShardRules
    from ray_streamer.sharding.slices import SlicePattern
    from ray_streamer.sharding.stored_form import StoredForm

Unmatched = Literal["error", "replicate"]

_NUM_SHOWN = 8


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors alike in rule, shape, dtype and residence, hence in slices.

    Attributes:
        placement: How they lie.
        shape: Logical elements.
        dtype: As their headers say.
        residence: Which ranks may hold them.
        tensors: Their positions in the index.
    """

    placement: Placement
    shape: tuple[int, ...]
    dtype: DType
    residence: Residence
    tensors: list[int] = field(default_factory=list[int])

    def refusal(self, mesh: Mesh) -> str | None:
        """Why these tensors cannot be placed on `mesh`, or None when they can."""
        tp = self.residence.tp(mesh)
        refused = self.placement.refusal(self.shape, tp) or self._torn_byte(tp)
        return refused or self.residence.refusal(self.placement, self.shape, mesh)

    def pattern(self, mesh: Mesh) -> SlicePattern:
        """One slice for each rank of `mesh`."""
        return self.residence.pattern(self._shares(self.residence.tp(mesh)), mesh)

    def _shares(self, tp: int) -> SlicePattern:
        return tuple(self.placement.slice_of(self.shape, tp_index=index, tp=tp) for index in range(tp))

    def _torn_byte(self, tp: int) -> str | None:
        """Storage moves whole bytes, so a row of a dtype narrower than a byte may be cut at whole bytes only."""
        if self.dtype.num_bits % 8 == 0 or not self.shape:
            return None
        for box in (box for part in self._shares(tp) if part for box in part.boxes):
            for edge in (box.starts[-1], box.stops[-1]):
                if edge * self.dtype.num_bits % 8:
                    return f"element {edge} of the last dimension begins inside a byte of packed {self.dtype.name}"
        return None


def group_tensors(
    index: CheckpointIndex, rules: ShardRules, residences: Sequence[Residence], unmatched: Unmatched
) -> tuple[list[TensorGroup], NDArray[np.int64]]:
    """The groups, and for each tensor the position of its group.

    Args:
        index: The checkpoint's tensors.
        rules: Which placement each name has.
        residences: Of each tensor; equal ones are one object.
        unmatched: What becomes of tensors that need a rule and have none.

    Raises:
        ShardingError: A rule that is not optional places no tensor, or a tensor has no rule and needs one.
        SettingsError: `unmatched` is neither of its two values.
    """
    rule_ids = rules.first_matches(index.names)
    parts = parts_of_weights(index, rules, rule_ids)
    forms: dict[int, StoredForm] = {}
    form_ids = [0] * len(index)
    for tensor, part in parts.items():
        rule_ids[tensor], form_ids[tensor] = part.rule_id, id(part.form)
        forms[id(part.form)] = part.form
    _check_rules(index, rules, rule_ids, unmatched)
    ids: dict[tuple[int, ...], int] = {}
    homes = {id(residence): residence for residence in residences}
    home_ids = map(id, residences)
    columns = (
        rule_ids,
        form_ids,
        home_ids,
        index.num_dims.tolist(),
        index.dtype_codes.tolist(),
        *index.shapes.T.tolist(),
    )
    group_ids = [ids.setdefault(key, len(ids)) for key in zip(*columns, strict=True)]
    groups: list[TensorGroup] = []
    for rule_id, form_id, home_id, num_dims, dtype_code, *sizes in ids:
        placement = rules.rules[rule_id].placement if rule_id >= 0 else Replicate()
        placement = forms[form_id].placed_with(placement) if form_id else placement
        groups.append(TensorGroup(placement, tuple(sizes[:num_dims]), DTYPES[dtype_code], homes[home_id]))
    for tensor, group_id in enumerate(group_ids):
        groups[group_id].tensors.append(tensor)
    return groups, np.array(group_ids, dtype=np.int64)


def _check_rules(index: CheckpointIndex, rules: ShardRules, rule_ids: list[int], unmatched: Unmatched) -> None:
    if unmatched not in get_args(Unmatched):
        raise SettingsError(f"unmatched is one of {', '.join(get_args(Unmatched))}, not {unmatched!r}")
    faults: list[str] = []
    used = set(rule_ids)
    unused = [repr(rule.glob) for position, rule in enumerate(rules) if not rule.optional and position not in used]
    if unused:
        faults.append(
            f"{len(unused)} rules place no tensor of {index.uri}: {_shown(unused, len(unused))}. No name matches, or "
            "an earlier rule takes them all. Correct or remove them, or make each one Rule(..., optional=True)."
        )
    without = np.flatnonzero((np.array(rule_ids, dtype=np.int64) < 0) & (index.num_dims >= 2)).tolist()
    if without and unmatched == "error":
        faults.append(
            f"{len(without)} tensors of {index.uri} have two or more dimensions and no rule: "
            f"{_shown([named(index, tensor) for tensor in without[:_NUM_SHOWN]], len(without))}. "
            f'Say how they lie, for example rules={{"{_glob_of(index.names[without[0]])}": Split(0)}}, or let every rank hold them whole with '
            'unmatched="replicate".'
        )
    if strays := _beside_cut_weights(index, rules, rule_ids) if unmatched == "error" else []:
        faults.append(
            f"{len(strays)} tensors of {index.uri} lie beside a weight that is cut and have no rule: "
            f"{_shown([named(index, tensor) for tensor in strays], len(strays))}. Say how they lie, for example "
            f'rules={{"{_glob_of(index.names[strays[0]])}": Replicate()}}, or let every rank hold them whole with '
            'unmatched="replicate".'
        )
    if faults:
        raise ShardingError(" ".join(faults))


def _beside_cut_weights(index: CheckpointIndex, rules: ShardRules, rule_ids: list[int]) -> list[int]:
    """Tensors of one dimension without a rule that may have to be cut as their module's weight is."""
    strays: list[int] = []
    for tensor in np.flatnonzero((np.array(rule_ids, dtype=np.int64) < 0) & (index.num_dims == 1)).tolist():
        weight = index.find(f"{index.names[tensor].rpartition('.')[0]}.weight")
        if weight is None or rule_ids[weight] < 0 or index.shape_of(tensor) == (1,):
            continue
        if not isinstance(rules.rules[rule_ids[weight]].placement, Replicate | Skip):
            strays.append(tensor)
    return strays


def _glob_of(name: str) -> str:
    """The name's kind, as a glob."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", name)


def named(index: CheckpointIndex, tensor: int) -> str:
    """A tensor as messages show it: name and shape."""
    return f"{printable(index.names[tensor], one_line=True)} {list(index.shape_of(tensor))}"


def _shown(items: Sequence[str], num_all: int) -> str:
    """The first items, and how many there are beyond them."""
    shown = items[:_NUM_SHOWN]
    return ", ".join(shown) + (f" and {num_all - len(shown)} more" if num_all > len(shown) else "")
