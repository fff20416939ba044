"""What is kept of a load for its verdict? The traces of one node, the settings and a way to make the plan again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.report.findings import Finder, Findings
from ray_streamer.report.tensor_kinds import tensor_kinds
from ray_streamer.report.timeline import make_timeline
from ray_streamer.report.verdict.judge import judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.rank.trace import RankTrace
    from ray_streamer.report.verdict.model import RequestedSettings


class Evidence:
    """The traces of the node that took longest; what they show is found once.

    Args:
        traces: Of the node's ranks, in local order.
        asked: The settings of the load.
        plan: Makes the plan of all ranks; None where only they can.
    """

    def __init__(
        self, traces: Sequence[RankTrace], asked: RequestedSettings, *, plan: Callable[[], ReadPlan] | None = None
    ) -> None:
        self._traces, self._asked, self._plan = tuple(traces), asked, plan
        self._found: Findings | None = None

    def findings(self, ranks: Sequence[RankStatistics], phases: Mapping[str, float]) -> Findings:
        """What the traces show.

        Args:
            ranks: Statistics of all ranks.
            phases: Seconds by phase of the report.
        """
        if self._found is None:
            self._found = self._find(ranks, phases)
            # A report may be kept for long, and the traces are large.
            self._traces, self._plan = (), None
        return self._found

    def _find(self, ranks: Sequence[RankStatistics], phases: Mapping[str, float]) -> Findings:
        traces = self._traces
        of_node = [rank for rank in ranks if any(rank.rank == trace.rank for trace in traces)]
        finder = Finder()
        verdict = finder.find("what bounded the load", lambda: judge(traces, of_node, self._asked, phases))
        if verdict is None and not finder.untold:
            finder.untold.append("Nothing was read or copied, so nothing bounded the load.")
        timeline = finder.find("what happened when", lambda: make_timeline(traces))
        plan = self._plan
        kinds = None if plan is None else finder.find("bytes by kind of tensor", lambda: tensor_kinds(plan()))
        return Findings(verdict=verdict, timeline=timeline, tensor_kinds=kinds, untold=tuple(finder.untold))


def slowest_node(nodes: Sequence[tuple[int, ...]], ranks: Sequence[RankStatistics]) -> tuple[int, ...]:
    """The ranks of the node whose load took longest.

    Args:
        nodes: Ranks of each node.
        ranks: Statistics of all ranks, in rank order.
    """
    return max(nodes, key=lambda node: max(sum(ranks[rank].seconds.values()) for rank in node))
