"""What did a load do, over all ranks? One value, made once at the end, that prints as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.report.findings import Findings
from ray_streamer.storage.base import StorageStatistics
from ray_streamer.units import counted, human_bytes

if TYPE_CHECKING:
    import os

    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.report.evidence import Evidence
    from ray_streamer.report.verdict.judge import Verdict


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class LoadReport:
    """A finished load.

    Attributes:
        uri: What was loaded.
        mesh: Size of each axis, and groups of experts (ep).
        seconds: Wall seconds from the call by phase, one after the other: `check` (what the driver sees of the checkpoint),
            `ray` (connecting to Ray, or starting it), `start` (room, and the ranks' processes), `plan` (the ranks of each
            node meet and plan; headers, where the driver could not read them), `import` (torch and the device on the ranks,
            as far as it lasts longer than the plan; the first blocks are read meanwhile), `load` (until the last rank was
            done), and their sum `total`. A reload begins with `headers`, in place of `check`, `ray` and `start`.
        checkpoint_bytes: All tensor bytes of the checkpoint.
        needed_bytes: Bytes that each node's ranks want, summed over nodes.
        plan_hash: Of the plan that was executed.
        nodes: Name of each rank's node.
        ranks: Every rank's statistics.
        evidence: What `findings` are found from, or these where they are known already; None where nothing was collected.
    """

    uri: str
    mesh: dict[str, int]
    seconds: dict[str, float]
    checkpoint_bytes: int
    needed_bytes: int
    plan_hash: str
    nodes: tuple[str, ...]
    ranks: tuple[RankStatistics, ...]
    evidence: Evidence | Findings | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return (
            f"LoadReport({self.uri!r}, {counted(len(self.ranks), 'rank')}, {human_bytes(self.needed_bytes)} in "
            f"{self.reading_seconds:.2f} s, total {self.seconds.get('total', 0.0):.2f} s)"
        )

    @property
    def findings(self) -> Findings:
        """What the load shows beside its counts; found when it is asked for first, which takes up to a second."""
        if self.evidence is None:
            return Findings(untold=("No word on what bounded the load: its ranks' traces were not collected.",))
        if isinstance(self.evidence, Findings):
            return self.evidence
        return self.evidence.findings(self.ranks, self.seconds)

    @property
    def verdict(self) -> Verdict | None:
        """Why the load took as long as it did, and what would make it faster; see docs/measuring.md.

        None where nothing was read or copied, or where it cannot be told: `findings.untold` says why.
        """
        return self.findings.verdict

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one page that any browser shows without a network: timeline, throughput, slots, bytes, plan and verdict.

        Raises:
            SettingsError: plotly is not installed, which draws it, or the file cannot be written.
        """
        from ray_streamer.report.page.document import write_page

        write_page(self, Path(path))

    @property
    def reading_seconds(self) -> float:
        """Seconds in which blocks may be read: those of the phases `import` and `load`."""
        return self.seconds.get("import", 0.0) + self.seconds.get("load", 0.0)

    @property
    def bytes_read(self) -> int:
        """Bytes requested from storage by all ranks."""
        return sum(rank.bytes_read for rank in self.ranks)

    @property
    def page_cache_bytes(self) -> int:
        """Bytes copied out of files that were in the nodes' page caches."""
        return sum(rank.page_cache_bytes for rank in self.ranks)

    @property
    def bytes_delivered(self) -> int:
        """Bytes written to all ranks' tensors."""
        return sum(rank.bytes_delivered for rank in self.ranks)

    @property
    def storage(self) -> StorageStatistics:
        """What it took all ranks to get the bytes."""
        names = (field.name for field in fields(StorageStatistics))
        return StorageStatistics(**{name: sum(getattr(rank.storage, name) for rank in self.ranks) for name in names})

    @property
    def amplification(self) -> float:
        """Bytes requested from storage over bytes needed; below 1 when files came out of the page cache."""
        return self.bytes_read / self.needed_bytes if self.needed_bytes else 1.0

    @property
    def gigabytes_per_second(self) -> float:
        """Checkpoint bytes needed, over `reading_seconds`, in 10^9 bytes per second."""
        seconds = self.reading_seconds
        return self.needed_bytes / seconds / 1e9 if seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every attribute, every total and all findings; `read_report` makes it a report again."""
        totals = ("bytes_read", "page_cache_bytes", "bytes_delivered", "amplification", "gigabytes_per_second")
        ranks = [{"node": node, **rank.as_dict()} for node, rank in zip(self.nodes, self.ranks, strict=True)]
        known = {name: getattr(self, name) for name in totals}
        said = asdict(replace(self, evidence=None, ranks=()))
        del said["evidence"]
        return said | known | {"storage": asdict(self.storage), "ranks": ranks} | asdict(self.findings)
