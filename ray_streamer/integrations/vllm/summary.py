"""What did a load into vLLM take? One line for the log, over all ranks of the engine."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.integrations.vllm.collective import gather, is_first
from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    import torch.distributed as dist
    from numpy.typing import NDArray

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.integrations.captured_slices import CapturedSlices
    from ray_streamer.rank.statistics import RankStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One rank's part, as it goes to the others.

    Attributes:
        seconds: From the beginning of `load_weights` to its end.
        num_bytes: Read or copied by this rank by plan.
        early_bytes: Read by this rank during the dry run, for all ranks of its node.
        whole: Tensors that were read whole for their values: name and operation.
        num_tensors: Tensors of the checkpoint.
        checkpoint_bytes: Bytes of all of them.
        num_planned: Of these, those that this rank copies parts of as they are.
        num_cast: Those that this rank casts parts of.
        num_early: Those whose parts the loader touched again, so that they were read during the dry run.
        node: Where the rank runs.
        taken: For each tensor a bit that says whether this rank took anything of it.
    """

    seconds: float
    num_bytes: int
    early_bytes: int
    whole: tuple[tuple[str, str], ...]
    num_tensors: int
    checkpoint_bytes: int
    num_planned: int
    num_cast: int
    num_early: int
    node: str = ""
    taken: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, captured: CapturedSlices, statistics: RankStatistics, *, seconds: float) -> Summary:
        """This rank's part."""
        report = captured.report
        assert report is not None
        index = captured.index
        assert index is not None
        is_taken = np.zeros(len(index), dtype=np.bool_)
        is_taken[[index.position(name) for name in captured.taken]] = True
        return cls(
            seconds=seconds,
            num_bytes=statistics.bytes_read + statistics.page_cache_bytes,
            early_bytes=captured.early_bytes,
            whole=tuple(report.reasons.items()),
            num_tensors=len(index),
            checkpoint_bytes=index.total_bytes,
            num_planned=len(report.planned),
            num_cast=len(report.cast),
            num_early=len(report.early),
            node=socket.gethostname(),
            taken=np.packbits(is_taken).tobytes(),
        )


def gather_summaries(mine: Summary, index: CheckpointIndex, group: dist.ProcessGroup | None) -> str | None:
    """The line for the log on the group's first rank, None on the others; every rank of the group calls it."""
    parts = gather(mine, group)
    return _line(parts, index) if is_first(group) else None


def say_load(
    what: str,
    uri: str,
    num_ranks: int,
    *,
    num_tensors: int,
    held_bytes: int,
    read_bytes: int,
    needed_bytes: int,
    seconds: float,
) -> str:
    """One line about a load: `needed_bytes` are those that each node could not do without."""
    return (
        f"ray_streamer: {what} {counted(num_tensors, 'tensor')} of {human_bytes(held_bytes)} from {uri} into "
        f"{counted(num_ranks, 'rank')} in {seconds:.2f} s ({read_bytes / 1e9 / max(seconds, 1e-9):.2f} GB/s); "
        f"{human_bytes(read_bytes)} read, {read_bytes / max(needed_bytes, 1):.2f}x"
    )


def _line(parts: list[Summary], index: CheckpointIndex) -> str:
    line = say_load(
        "loaded",
        index.uri,
        len(parts),
        num_tensors=parts[0].num_tensors,
        held_bytes=parts[0].checkpoint_bytes,
        read_bytes=sum(part.num_bytes + part.early_bytes for part in parts),
        needed_bytes=_needed_bytes(parts, index),
        seconds=max(part.seconds for part in parts),
    )
    whole = dict(pair for part in parts for pair in part.whole)
    if whole:
        named = ", ".join(f"{name} ({operation})" for name, operation in list(whole.items())[:3])
        line += f"; {counted(len(whole), 'tensor')} read for their values while the loader ran: {named}"
        line += ", ..." if len(whole) > 3 else ""
    return line


def _needed_bytes(parts: list[Summary], index: CheckpointIndex) -> int:
    """Bytes of the tensors that the ranks of each node took anything of, summed over nodes."""
    sizes = index.stops - index.starts
    by_node: dict[str, NDArray[np.uint8]] = {}
    for part in parts:
        is_taken = np.unpackbits(np.frombuffer(part.taken, np.uint8), count=len(index))
        by_node[part.node] = by_node.get(part.node, np.zeros_like(is_taken)) | is_taken
    return sum(int(sizes[is_taken.astype(np.bool_)].sum()) for is_taken in by_node.values())
