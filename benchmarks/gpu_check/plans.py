"""What is loaded? A Llama layout written once, and plans of it for so many ranks, together on a node or each alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ground import MIB, LocalSettings

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Mesh
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.storage import open_storage
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.planning.read_plan import ReadPlan

LIMITS = ReadLimits(block_bytes=8 * MIB, min_run_bytes=64 << 10, max_gap_bytes=64 << 10)


def write_llama(folder: Path, megabytes: int) -> Path:
    """A checkpoint of about so many megabytes: grouped queries, runs of 2 and 7 KiB at tp=4 where it is not tiny."""
    hidden, vocab = (4096, 32000) if megabytes >= 500 else (128, 1000)

    def layout(layers: int):  # noqa: ANN202 - a layout
        return llama_layout(hidden, layers, heads=32, kv_heads=8, intermediate=7 * hidden // 2, vocab=vocab)

    one, two = layout(1).total_bytes, layout(2).total_bytes
    chosen = layout(max(1, 1 + (megabytes * 1_000_000 - one) // (two - one)))
    write_checkpoint(folder, chosen.tensors, num_files=4, config=chosen.config)
    return folder


def open_index(folder: Path) -> CheckpointIndex:
    """The headers of a checkpoint."""
    storage = open_storage(str(folder), LocalSettings())  # type: ignore[arg-type]
    try:
        return open_checkpoint(str(folder), storage)
    finally:
        storage.close()


def llama_plan(folder: Path, tp: int, *, is_shared: bool = True) -> ReadPlan:
    """The plan of `tp` ranks, on one node or each on a node of its own."""
    index = open_index(folder)
    source = RuleSlices(mesh=Mesh(tp=tp))
    return plan_reads(
        index, [source(index, rank) for rank in range(tp)], Topology.even(tp, 1 if is_shared else tp), LIMITS
    )
