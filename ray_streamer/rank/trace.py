"""What does one rank tell of its load's time axis? Its spans and what the blocks were, so that nobody needs the plan to draw it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from ray_streamer.column_bytes import columns_from_bytes, columns_to_bytes, refused
from ray_streamer.errors import ClusterError
from ray_streamer.rank.conditions import RankConditions
from ray_streamer.rank.recorder import Phase, Spans, Step
from ray_streamer.storage.base import Incident

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ray_streamer.planning.rank_plan import RankPlan

_COLUMNS = ("numbers", "file_ids", "starts", "stops", "readers")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankTrace:
    """The blocks that one rank read or took, one row each; travels to whoever draws all ranks.

    Attributes:
        rank: Global rank.
        ranks: Global ranks that share its node's plan, in local order; numbers of blocks are theirs alone.
        node: Name of the node.
        files: Path of each file of the checkpoint.
        numbers: Of the blocks, in the node's plan.
        file_ids: File of each block.
        starts: First byte of each block in its file.
        stops: One past the last.
        readers: Global rank that reads each block, were its file not mapped.
        spans: What happened to these blocks.
        conditions: Under what.
        incidents: When the storage had to try again.
    """

    rank: int
    ranks: tuple[int, ...]
    node: str
    files: tuple[str, ...]
    numbers: NDArray[np.int64]
    file_ids: NDArray[np.integer]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    readers: NDArray[np.int64]
    spans: Spans
    conditions: RankConditions
    incidents: tuple[Incident, ...] = ()

    @classmethod
    def of(
        cls,
        mine: RankPlan,
        spans: Spans,
        *,
        node: str,
        conditions: RankConditions,
        incidents: tuple[Incident, ...] = (),
    ) -> Self:
        """The rows of the blocks with which anything happened."""
        numbers = np.flatnonzero(spans.times.any(axis=0))
        blocks = mine.node_plan.blocks
        return cls(
            rank=mine.rank,
            ranks=mine.ranks,
            node=node,
            files=tuple(file.path for file in mine.files),
            numbers=numbers,
            file_ids=blocks.file_ids[numbers],
            starts=blocks.starts[numbers],
            stops=blocks.stops[numbers],
            readers=np.array(mine.ranks, dtype=np.int64)[mine.node_plan.readers[numbers]],
            spans=Spans(
                spans.times[:, numbers],
                spans.ways[numbers],
                spans.landed_bytes[numbers],
                spans.taken_bytes[numbers],
                spans.touch_seconds[numbers],
                phases=spans.phases,
            ),
            conditions=conditions,
            incidents=incidents,
        )

    def to_bytes(self) -> bytes:
        """The trace as it crosses to the other ranks of the node; `from_bytes` reads it."""
        spans = self.spans
        columns = {
            **{name: getattr(self, name) for name in _COLUMNS},
            "way": spans.ways,
            "landed_bytes": spans.landed_bytes,
            "taken_bytes": spans.taken_bytes,
            "touch_seconds": spans.touch_seconds,
            **{step.name: spans.times[step] for step in Step},
        }
        said = {
            "rank": self.rank,
            "ranks": self.ranks,
            "node": self.node,
            "files": self.files,
            "phases": spans.phases,
            "conditions": asdict(self.conditions),
            "incidents": self.incidents,
        }
        return columns_to_bytes(columns, said)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """The trace that `to_bytes` wrote.

        Raises:
            ClusterError: This is none.
        """
        with refused(lambda error: ClusterError(f"another rank gave something else than its trace: {error}")):
            columns, said = columns_from_bytes(data)
            spans = Spans(
                np.stack([columns[step.name] for step in Step]),
                columns["way"],
                columns["landed_bytes"],
                columns["taken_bytes"],
                columns["touch_seconds"],
                phases=tuple(Phase(*phase) for phase in said["phases"]),
            )
            return cls(
                rank=said["rank"],
                ranks=tuple(said["ranks"]),
                node=said["node"],
                files=tuple(said["files"]),
                **{name: columns[name] for name in _COLUMNS},
                spans=spans,
                conditions=RankConditions(**said["conditions"]),
                incidents=tuple(Incident(*incident) for incident in said["incidents"]),
            )
