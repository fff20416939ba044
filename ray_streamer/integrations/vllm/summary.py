"""What did a load into vLLM take? One line for the log, over all ranks of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    import torch.distributed as dist

    from ray_streamer.integrations.vllm.capturing import CapturedSlices
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

    @classmethod
    def of(cls, captured: CapturedSlices, statistics: RankStatistics, *, seconds: float) -> Summary:
        """This rank's part."""
        report = captured.report
        assert report is not None
        assert captured.index is not None
        return cls(
            seconds=seconds,
            num_bytes=statistics.bytes_read + statistics.page_cache_bytes,
            early_bytes=captured.early_bytes,
            whole=tuple(report.reasons.items()),
            num_tensors=len(captured.index),
            checkpoint_bytes=captured.index.total_bytes,
            num_planned=len(report.planned),
            num_cast=len(report.cast),
            num_early=len(report.early),
        )


def gather_summaries(mine: Summary, group: dist.ProcessGroup | None) -> str | None:
    """The line for the log on the group's first rank, None on the others; every rank of the group calls it."""
    import torch.distributed as dist

    parts: list[Summary] = [mine]
    if group is not None:
        parts = [mine] * dist.get_world_size(group)
        dist.all_gather_object(parts, mine, group=group)
    return _line(parts) if group is None or dist.get_rank(group) == 0 else None


def _line(parts: list[Summary]) -> str:
    seconds = max(part.seconds for part in parts)
    read = sum(part.num_bytes + part.early_bytes for part in parts)
    line = (
        f"ray_streamer: {counted(parts[0].num_tensors, 'tensor')} of {human_bytes(parts[0].checkpoint_bytes)} into "
        f"{counted(len(parts), 'rank')} in {seconds:.2f} s, {human_bytes(read)} read by all of them "
        f"({read / 1e9 / max(seconds, 1e-9):.2f} GB/s)"
    )
    whole = dict(pair for part in parts for pair in part.whole)
    if whole:
        named = ", ".join(f"{name} ({operation})" for name, operation in list(whole.items())[:3])
        line += f"; {counted(len(whole), 'tensor')} read whole by each rank that needs their values: {named}"
        line += ", ..." if len(whole) > 3 else ""
    return line
