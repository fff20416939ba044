"""What came of it? Every run of every contender in every place, as JSON, and the medians that tables and plots show."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from side_by_side.contenders import OURS

if TYPE_CHECKING:
    from pathlib import Path

METRICS = ("load_seconds", "whole_seconds", "load_cpu_seconds", "whole_cpu_seconds", "added_bytes", "read_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load by one group of fresh processes.

    Attributes:
        whole_seconds: From the start of the first process until every rank has its tensors.
        load_seconds: The same without start and imports: from the first rank that loads until the last one has loaded.
        whole_cpu_seconds: User and system time of all ranks, from their start.
        load_cpu_seconds: The same while they load.
        added_bytes: Peak memory of all ranks beyond what they had before the load; results are in it, the page cache is not.
        read_bytes: What the server sent by its own count, or what the disk was asked for on behalf of the ranks.
    """

    whole_seconds: float
    load_seconds: float
    whole_cpu_seconds: float
    load_cpu_seconds: float
    added_bytes: int
    read_bytes: int


@dataclass(slots=True, kw_only=True)
class Cell:
    """One contender in one place.

    Attributes:
        place: One of `places.TITLES`.
        contender: Its name.
        tp: Ranks.
        runs: Those that count.
        reason: Why there are none.
    """

    place: str
    contender: str
    tp: int
    runs: list[Run] = field(default_factory=list)
    reason: str | None = None

    def median(self, metric: str) -> float:
        """Over the runs, of one of `METRICS`."""
        return statistics.median(self.values(metric))

    def values(self, metric: str) -> list[float]:
        """Of all runs, of one of `METRICS`."""
        return [getattr(run, metric) for run in self.runs]


@dataclass(slots=True, kw_only=True)
class Results:
    """All of it.

    Attributes:
        facts: Where, when and with what it was measured, see `machine.facts`; and the limits on memory.
        checkpoint_bytes: Of all tensors.
        tp: Ranks of everybody; this project also runs with others.
        cells: In the order of tables: by place, this project first.
        load_averages: Of one minute, at the beginning and after each round.
        elapsed_seconds: Of all rounds.
    """

    facts: dict[str, Any]
    checkpoint_bytes: int
    tp: int
    cells: list[Cell]
    load_averages: list[float] = field(default_factory=list)
    elapsed_seconds: float = 0.0

    @property
    def num_rounds(self) -> int:
        """Of those that count, the fewest that a contender has."""
        return min((len(cell.runs) for cell in self.cells if not cell.reason), default=0)

    def places(self) -> list[str]:
        """Those that have cells, in order."""
        return list(dict.fromkeys(cell.place for cell in self.cells))

    def of_place(self, place: str) -> list[Cell]:
        """The cells of a place, in order."""
        return [cell for cell in self.cells if cell.place == place]

    def ours(self, place: str) -> Cell | None:
        """This project's cell that has as many ranks as everybody; None where it has no runs."""
        cells = [cell for cell in self.of_place(place) if cell.contender == OURS.name and cell.tp == self.tp]
        return next((cell for cell in cells if cell.runs), None)

    def save(self, path: Path) -> None:
        """Writes everything as JSON, with medians beside the runs."""
        document = asdict(self)
        for cell, said in zip(self.cells, document["cells"], strict=True):
            said["medians"] = {metric: cell.median(metric) for metric in METRICS} if cell.runs else None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote."""
        document = json.loads(path.read_text())
        cells = []
        for said in document.pop("cells"):
            said.pop("medians")
            cells.append(Cell(**said | {"runs": [Run(**run) for run in said["runs"]]}))
        return cls(**document, cells=cells)
