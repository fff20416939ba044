"""What does a load plan of torch.distributed.checkpoint want, and where does it go? One result for each of its items.

    item: a box of a tensor ──> a move out of that box ──> the memory that the planner names for it

What is wrong with one rank's plan is said when the ranks of its machine ask what it wants: they wait for it until then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType

from ray_streamer.capture.results import NAMES_OF_DTYPES
from ray_streamer.device.caller_memory import memory_of
from ray_streamer.errors import PlanError, SettingsError
from ray_streamer.slices import Move, RankSlices, ResultSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.dtypes import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSlices:
    """A slice source: what one load plan wants.

    Attributes:
        targets: Every item of the plan, and the memory that it goes to.
        items: Those that are read, by name of the result; of items with the same memory, such as tied weights, the last one.
        out: The memory of each result.
        device: Where all of it is.
        planned: The checkpoint as this rank saw it when torch made the plan; None when it was not opened for that.
        refused: What is wrong with the plan; raised when the source is asked.
    """

    targets: Sequence[tuple[ReadItem, torch.Tensor]] = ()
    items: Mapping[str, ReadItem] = field(default_factory=dict)
    out: Mapping[str, torch.Tensor] = field(default_factory=dict)
    device: str = "cpu"
    planned: CheckpointIndex | None = None
    refused: Exception | None = None

    @classmethod
    def of(cls, items: Sequence[ReadItem], planner: LoadPlanner, planned: CheckpointIndex | None) -> Self:
        """What a plan wants, or what is wrong with it; `planner` says which memory each item goes to."""
        try:
            targets = [(item, _target(item, planner)) for item in items]
            device = _device_of(target for _, target in targets)
            # Where torch copies item after item into one memory, the last one stays, unless each is carried on from there.
            is_kept = type(planner).commit_tensor is DefaultLoadPlanner.commit_tensor
            last = {memory_of(to) if is_kept and to.numel() else at: at for at, (_, to) in enumerate(targets)}
        except Exception as error:  # also the planner's own, which may be anybody's
            return cls(refused=error)
        # Boxes of one tensor are several results.
        read = {
            f"{targets[number][0].storage_index.fqn}[{number}]": targets[number] for number in sorted(last.values())
        }
        return cls(
            targets=targets,
            items={name: item for name, (item, _) in read.items()},
            out={name: target for name, (_, target) in read.items()},
            device=device,
            planned=planned,
        )

    def __call__(self, index: CheckpointIndex, rank: int) -> RankSlices:
        """The slices of this process; no other rank is asked for.

        Raises:
            PlanError: The plan does not fit its memory, or the coordinator saw another checkpoint.
            SettingsError: Its memory is on several devices.
        """
        if self.refused is not None:
            raise self.refused
        results: list[ResultSpec] = []
        rows: list[tuple[str, str, tuple[Move, ...]]] = []
        for name, item in self.items.items():
            position = self._position(index, item.storage_index.fqn)
            stored, shape = index.dtype_of(position), index.shape_of(position)
            starts, sizes = _logical_box(item, stored, shape)
            results.append(ResultSpec(name=name, dtype=_dtype_name(item, self.out[name].dtype, stored), shape=sizes))
            move = Move.box(
                sizes,
                source_shape=shape,
                source_starts=starts,
                target_shape=sizes,
                target_starts=(0,) * len(sizes),
            )
            rows.append((item.storage_index.fqn, name, (move,)))
        return RankSlices.from_rows(index, results, rows)

    def _position(self, index: CheckpointIndex, name: str) -> int:
        """Where the tensor of that name is in the coordinator's checkpoint, which must be the one that this rank saw."""
        position = index.find(name)
        if position is None:
            raise PlanError(
                f"the load plan names tensor {name!r}, which the coordinator did not find in {index.uri}; load again"
            )
        if self.planned is not None:
            here, there = self.planned.shape_of(self.planned.position(name)), index.shape_of(position)
            if here != there:
                raise PlanError(
                    f"tensor {name!r} of {index.uri} has shape {here} for this rank, and {there} for the coordinator; load again"
                )
        return position


def _target(item: ReadItem, planner: LoadPlanner) -> torch.Tensor:
    """The memory of the state dict that an item goes to.

    Raises:
        PlanError: The item is no tensor, or its memory has another shape.
    """
    if item.type != LoadItemType.TENSOR:
        raise PlanError(f"{item.storage_index.fqn!r} is no tensor, and safetensors holds tensors only")
    target = planner.resolve_tensor(item).detach()
    if target.size() != item.lengths:
        raise PlanError(
            f"{item.storage_index.fqn!r}: the plan reads a box of {tuple(item.lengths)} into memory of {tuple(target.size())}"
        )
    return target


def _device_of(targets: Iterable[torch.Tensor]) -> str:
    """Where all of them are.

    Raises:
        SettingsError: They are on several devices.
    """
    devices = sorted({str(target.device) for target in targets})
    if len(devices) > 1:
        raise SettingsError(
            f"tensors of one load are on one device, got {', '.join(devices)}; load the parts of the state dict one after the other"
        )
    return devices[0] if devices else "cpu"


def _logical_box(item: ReadItem, stored: DType, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First index and size of an item's box, in elements as the header counts them.

    Raises:
        PlanError: It cuts the last dimension of a dtype that packs several elements into one.
    """
    starts, sizes = tuple(item.storage_offsets), tuple(item.lengths)
    if not stored.is_packed or not shape:
        return starts, sizes
    if starts[-1] or sizes[-1] != stored.torch_shape(shape)[-1]:
        raise PlanError(
            f"{item.storage_index.fqn!r} is {stored.name}, whose last dimension is packed and cannot be cut; shard another dimension"
        )
    return starts, (*sizes[:-1], shape[-1])


def _dtype_name(item: ReadItem, dtype: torch.dtype, stored: DType) -> str:
    """What a header calls the dtype of an item's memory; the stored one where torch has the same for both.

    Raises:
        PlanError: safetensors has no such dtype.
    """
    torch_name = str(dtype).removeprefix("torch.")
    if torch_name == stored.torch_name:
        return stored.name
    if dtype not in NAMES_OF_DTYPES:
        raise PlanError(
            f"{item.storage_index.fqn!r} is {stored.torch_name}, and cannot be loaded as {torch_name}, which safetensors does not "
            "have; give the state dict another dtype"
        )
    return NAMES_OF_DTYPES[dtype]
