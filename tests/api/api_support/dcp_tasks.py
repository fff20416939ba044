"""What rank processes load through torch.distributed.checkpoint, on order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ray_streamer.integrations.dcp import StorageReader
from ray_streamer.rank.statistics import RankStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

WHOLE = {"rows": (37, 24), "columns": (24, 37), "whole": (33,), "cast": (16, 8), "grid": (12, 20), "scalar": ()}
"""Shapes of the tensors that `write` of the test writes; 37 divides by no number of ranks."""


class Loaded(NamedTuple):
    """What a rank saw.

    Attributes:
        wrong: Names of tensors, by case, that are not as torch's own reader gives them, or not as they were written.
        bytes_read: By this rank, by case.
    """

    wrong: dict[str, list[str]]
    bytes_read: dict[str, int]


def load_everyhow(folder: str, uri: str, *, store: str, rank: int, world_size: int) -> Loaded:
    """Loads one state dict in several ways as a member of a gloo group."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        return _load_everyhow(folder, uri, rank)
    finally:
        dist.destroy_process_group()


def _load_everyhow(folder: str, uri: str, rank: int) -> Loaded:
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    expected = _state_dict(line, grid)
    # torch's own reader has rules of its own for scalars and casts; those are compared with what was written.
    dcp.load(expected, storage_reader=HuggingFaceStorageReader(folder))
    wrong, bytes_read = dict[str, list[str]](), dict[str, int]()

    def check(case: str, load: Callable[[dict[str, Any], StorageReader], None], at: str | None) -> None:
        found, statistics = _state_dict(line, grid), list[RankStatistics]()
        load(found, StorageReader(at, on_statistics=statistics.append))
        wrong[case] = [name for name in found if not _are_same(found[name], expected[name])]
        bytes_read[case] = sum(each.bytes_read for each in statistics)

    check("disk", lambda state, reader: dcp.load(state, storage_reader=reader), folder)
    check("s3", lambda state, reader: dcp.load(state, storage_reader=reader), uri)
    check("id", lambda state, reader: dcp.load(state, checkpoint_id=folder, storage_reader=reader), None)
    own = [dist.new_group([number]) for number in range(4)][rank]
    alone = {"whole": torch.zeros(33), "scalar": torch.zeros(())}
    for case, arguments in (("group", {"process_group": own}), ("no_dist", {"no_dist": True})):
        dcp.load(alone, storage_reader=StorageReader(folder), **arguments)
        wrong[case] = [name for name in alone if not _are_same(alone[name], expected[name])]
        alone = {name: torch.zeros_like(tensor) for name, tensor in alone.items()}
    return Loaded(wrong, bytes_read)


def _state_dict(line: Any, grid: Any) -> dict[str, Any]:
    """Empty memory of every kind."""

    def sharded(name: str, mesh: Any, *placements: Any) -> DTensor:
        return distribute_tensor(torch.zeros(WHOLE[name]), mesh, placements)

    return {
        "rows": sharded("rows", line, Shard(0)),
        "columns": sharded("columns", line, Shard(1)),
        "grid": sharded("grid", grid, Shard(1), Shard(0)),
        "half": distribute_tensor(torch.zeros(12, 20), grid, (Replicate(), Shard(1))),
        "whole": torch.zeros(WHOLE["whole"]),
        "cast": torch.zeros(WHOLE["cast"], dtype=torch.bfloat16),
        "scalar": torch.zeros(()),
    }


def _are_same(found: Any, expected: Any) -> bool:
    pair = [each.to_local() if isinstance(each, DTensor) else each for each in (found, expected)]
    return pair[0].dtype == pair[1].dtype and torch.equal(*pair) and bool(pair[0].numel() == 0 or pair[0].any())


class ShortMemory(DefaultLoadPlanner):
    """A planner of somebody's own, which gives the memory of fewer rows than the plan reads."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        """All rows but the last."""
        return super().resolve_tensor(read_item)[:-1]


def load_wrongly(folder: str, shards: str, *, store: str, rank: int, world_size: int) -> list[str]:
    """What is said where a load cannot be."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    told: list[str] = []
    try:
        for state_dict, reader, planner in (
            ({"not there": torch.zeros(2)}, StorageReader(folder), None),
            ({"whole": torch.zeros(33)}, StorageReader(f"{folder}/nothing.safetensors"), None),
            ({"whole": torch.zeros(33)}, StorageReader(), None),
            ({"whole": torch.zeros(33)}, StorageReader(shards), None),
            ({"whole": torch.zeros(33)}, StorageReader(folder), ShortMemory() if rank == 1 else None),
        ):
            try:
                dcp.load(state_dict, storage_reader=reader, planner=planner)
            except BaseException as error:
                told.append(f"{type(error).__name__}: {error}")
    finally:
        dist.destroy_process_group()
    return told
