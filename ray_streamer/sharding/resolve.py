"""What do these rules mean for this checkpoint on this mesh? A `SliceTable`, or one error that says it all.

Rules come first: those that decide nothing and tensors that have none are listed together. Then tensors are grouped by
(rule, shape, dtype): a model of 92,000 tensors has a few dozen groups, and everything that costs is done once per
group. All tensors that cannot be split so are found before anything is raised.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from ray_streamer.dtypes import DTYPES, DType
from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding.placement import Placement, Replicate
from ray_streamer.sharding.slices import SlicePattern, SliceTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.sharding.mesh import Mesh
    from ray_streamer.sharding.rules import ShardRules

Unmatched = Literal["error", "replicate"]

LARGEST_TP = 128
"""How far `legal_tp` tries."""

_NUM_SHOWN = 8


def resolve_slices(
    index: CheckpointIndex, rules: ShardRules, mesh: Mesh, *, unmatched: Unmatched = "error"
) -> SliceTable:
    """Every rank's slice of every tensor.

    Ranks that differ in other axes than tp hold the same. Tensors of fewer than two dimensions without a rule are
    replicated.

    Args:
        index: The checkpoint's tensors.
        rules: Which placement each name has.
        mesh: How many ranks, and where each one is.
        unmatched: What becomes of tensors of two or more dimensions without a rule.

    Raises:
        ShardingError: A rule that is not optional places no tensor; a tensor has no rule; or tensors cannot be split
            over `mesh.tp` ranks, and the message lists the sizes over which the whole checkpoint can.
        SettingsError: `unmatched` is neither of its two values.
    """
    groups, group_ids = _grouped(index, rules, unmatched)
    refusals = [(group, refusal) for group in groups if (refusal := group.refusal(mesh.tp))]
    if refusals:
        raise ShardingError(_cannot_split(index, mesh.tp, refusals, _legal_among(groups)))
    tp_indices = [mesh.coordinate(rank)["tp"] for rank in range(mesh.num_ranks)]
    ids: dict[SlicePattern, int] = {}
    pattern_ids = np.empty(len(groups), dtype=np.int32)
    for position, group in enumerate(groups):
        by_tp = group.slices(mesh.tp)
        pattern_ids[position] = ids.setdefault(tuple(by_tp[at] for at in tp_indices), len(ids))
    return SliceTable(mesh.num_ranks, tuple(ids), pattern_ids[group_ids])


def legal_tp(index: CheckpointIndex, rules: ShardRules, *, unmatched: Unmatched = "error") -> tuple[int, ...]:
    """The tp sizes, up to `LARGEST_TP`, over which every tensor can be split.

    Raises:
        ShardingError: The rules do not fit the checkpoint at any size: as `resolve_slices` says.
    """
    groups, _ = _grouped(index, rules, unmatched)
    return _legal_among(groups)


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors alike in rule, shape and dtype, hence in slices; `tensors` are their positions in the index."""

    placement: Placement
    shape: tuple[int, ...]
    dtype: DType
    tensors: list[int] = field(default_factory=list[int])

    def refusal(self, tp: int) -> str | None:
        """Why these tensors cannot be placed on `tp` ranks, or None when they can."""
        return self.placement.refusal(self.shape, tp) or self._torn_byte(tp)

    def slices(self, tp: int) -> SlicePattern:
        """One slice for each tp index."""
        return tuple(self.placement.slice_of(self.shape, tp_index=index, tp=tp) for index in range(tp))

    def _torn_byte(self, tp: int) -> str | None:
        """Storage moves whole bytes, so a row of a dtype narrower than a byte may be cut at whole bytes only."""
        if self.dtype.num_bits % 8 == 0 or not self.shape:
            return None
        for box in (box for part in self.slices(tp) if part for box in part.boxes):
            for edge in (box.starts[-1], box.stops[-1]):
                if edge * self.dtype.num_bits % 8:
                    return f"element {edge} of the last dimension begins inside a byte of packed {self.dtype.name}"
        return None


def _grouped(index: CheckpointIndex, rules: ShardRules, unmatched: Unmatched) -> tuple[list[_Group], NDArray[np.int64]]:
    """The groups, and for each tensor the position of its group."""
    rule_ids = rules.first_matches(index.names)
    _check_rules(index, rules, rule_ids, unmatched)
    ids: dict[tuple[int, ...], int] = {}
    keys = zip(rule_ids, index.num_dims.tolist(), index.dtype_codes.tolist(), *index.shapes.T.tolist(), strict=True)
    group_ids = [ids.setdefault(key, len(ids)) for key in keys]
    groups: list[_Group] = []
    for rule_id, num_dims, dtype_code, *sizes in ids:
        placement = rules.rules[rule_id].placement if rule_id >= 0 else Replicate()
        groups.append(_Group(placement, tuple(sizes[:num_dims]), DTYPES[dtype_code]))
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
        glob = re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", index.names[without[0]])
        faults.append(
            f"{len(without)} tensors of {index.uri} have two or more dimensions and no rule: "
            f"{_shown([_named(index, tensor) for tensor in without[:_NUM_SHOWN]], len(without))}. "
            f'Say how they lie, for example rules={{"{glob}": Split(0)}}, or let every rank hold them whole with '
            'unmatched="replicate".'
        )
    if faults:
        raise ShardingError(" ".join(faults))


def _cannot_split(
    index: CheckpointIndex, tp: int, refusals: Sequence[tuple[_Group, str]], legal: tuple[int, ...]
) -> str:
    num_tensors = sum(len(group.tensors) for group, _ in refusals)
    lines = [f"{num_tensors} tensors of {index.uri} cannot be split over tp={tp}:"]
    for group, refusal in refusals[:_NUM_SHOWN]:
        alike = f" and {len(group.tensors) - 1} alike" if len(group.tensors) > 1 else ""
        lines.append(f"  {_named(index, group.tensors[0])}{alike}: {refusal}")
    if len(refusals) > _NUM_SHOWN:
        lines.append(f"  and {len(refusals) - _NUM_SHOWN} more kinds of tensors")
    works = f"tp that works for every tensor: {', '.join(map(str, legal))}" if legal else "no tp works with these rules"
    return "\n".join([*lines, works])


def _legal_among(groups: Sequence[_Group]) -> tuple[int, ...]:
    return tuple(tp for tp in range(1, LARGEST_TP + 1) if not any(group.refusal(tp) for group in groups))


def _named(index: CheckpointIndex, tensor: int) -> str:
    return f"{index.names[tensor]} {list(index.shape_of(tensor))}"


def _shown(items: Sequence[str], num_all: int) -> str:
    """The first items, and how many there are beyond them."""
    shown = items[:_NUM_SHOWN]
    return ", ".join(shown) + (f" and {num_all - len(shown)} more" if num_all > len(shown) else "")
