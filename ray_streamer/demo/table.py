"""What do people see of a demo? One table: a row for each load, and under it one for each rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.report.tables import human_limit, new_table
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from ray_streamer.demo.proof import Proof
    from ray_streamer.demo.run import Demo, DemoLoad
    from ray_streamer.rank.statistics import RankStatistics

_COLUMNS = (
    "storage, rank",
    "seconds",
    "GB/s",
    "read",
    "amplification",
    "page cache",
    "in tensors",
    "peak staging / limit",
    "verified",
)


def demo_table(demo: Demo) -> Table:
    """Seconds, bytes, memory and proof of every load and rank."""
    table = new_table("Loads", *_COLUMNS)
    for load in demo.loads:
        _add_load(table, load)
        for rank, proof in zip(load.report.ranks, load.proofs, strict=True):
            _add_rank(table, rank, proof)
        table.add_section()
    return table


def _add_load(table: Table, load: DemoLoad) -> None:
    report = load.report
    staged = sum(rank.peak_staging_bytes for rank in report.ranks)
    limit = sum(rank.memory_limit for rank in report.ranks)
    table.add_row(
        load.storage,
        f"{report.reading_seconds:.2f}",
        f"{report.gigabytes_per_second:.2f}",
        human_bytes(report.bytes_read),
        f"{report.amplification:.2f}" if load.must_read else "",
        human_bytes(report.page_cache_bytes),
        human_bytes(report.bytes_delivered),
        f"{human_bytes(staged)} / {human_limit(limit)}",
        "NO" if load.failures else "yes",
        style="bold red" if load.failures else "bold",
    )


def _add_rank(table: Table, rank: RankStatistics, proof: Proof) -> None:
    seconds = sum(rank.seconds.values())
    table.add_row(
        f"  rank {rank.rank}",
        f"{seconds:.2f}",
        f"{rank.bytes_delivered / seconds / 1e9:.2f}" if seconds else "",
        human_bytes(rank.bytes_read),
        "",
        human_bytes(rank.page_cache_bytes),
        human_bytes(rank.bytes_delivered),
        f"{human_bytes(rank.peak_staging_bytes)} / {human_limit(rank.memory_limit)}",
        f"{len(proof.faults)} DIFFER" if proof.faults else f"{proof.num_tensors} equal",
    )
