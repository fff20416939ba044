"""Which kinds of tensors are the bytes of a load, and how many were to be read beyond need? From its plan, by kind of name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.planning.tensor_reads import explain_tensors
from ray_streamer.sharding.name_kinds import take_apart

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.planning.tensor_reads import TensorReads

BETWEEN_TENSORS = "(between tensors)"
"""Name of what is read and belongs to no tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindReads:
    """Tensors whose names differ in numbers only; bytes are summed over nodes.

    Attributes:
        name: With `*` for numbers, such as `model.layers.*.mlp.up_proj.weight`.
        num_tensors: How many there are.
        checkpoint_bytes: Their bytes in the checkpoint.
        needed_bytes: Bytes that at least one rank of each node wants.
        read_bytes: Bytes that the plan reads, on each node; those of files in the page cache are copied instead.
        result_bytes: Bytes of them in all ranks' tensors.
    """

    name: str
    num_tensors: int
    checkpoint_bytes: int
    needed_bytes: int
    read_bytes: int
    result_bytes: int

    @property
    def beyond_need_bytes(self) -> int:
        """Bytes that are read and that no rank wants."""
        return max(0, self.read_bytes - self.needed_bytes)


def tensor_kinds(plan: ReadPlan) -> tuple[KindReads, ...]:
    """The kinds of a plan's tensors, those first of which most bytes are read."""
    by_name: dict[str, list[TensorReads]] = {}
    tensors = explain_tensors(plan)
    for tensor in tensors:
        by_name.setdefault(kind_of(tensor.name), []).append(tensor)
    kinds = [_sum(name, alike) for name, alike in by_name.items()]
    all_read = sum(plan.node_plans[number].read_bytes for number in plan.node_plan_ids)
    between = all_read - sum(kind.read_bytes for kind in kinds)
    if between > 0:
        nothing = {"num_tensors": 0, "checkpoint_bytes": 0, "needed_bytes": 0, "result_bytes": 0}
        kinds.append(KindReads(name=BETWEEN_TENSORS, read_bytes=between, **nothing))
    return tuple(sorted(kinds, key=lambda kind: (-kind.read_bytes, kind.name)))


def kind_of(name: str) -> str:
    """A tensor's name without its numbers.

    >>> kind_of("model.layers.17.mlp.experts.3.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return ".".join("*" if component is None else component for component in take_apart(name)[0])


def _sum(name: str, tensors: Iterable[TensorReads]) -> KindReads:
    alike = list(tensors)
    return KindReads(
        name=name,
        num_tensors=len(alike),
        checkpoint_bytes=sum(tensor.num_bytes for tensor in alike),
        needed_bytes=sum(tensor.needed_bytes for tensor in alike),
        read_bytes=sum(tensor.read_bytes for tensor in alike),
        result_bytes=sum(tensor.result_bytes for tensor in alike),
    )
