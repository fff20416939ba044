"""Can every node of a running Ray cluster take its part of a load? Each is asked, and what differs is told with its name.

A node is looked at for as many ranks as it may hold. What is well on all nodes is one finding; everything else is one for each node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ray_streamer.cluster.placement import NodeRoom, PlacementOptions, check_room, choose_strategy, count_ranks
from ray_streamer.cluster.survey import ask_nodes
from ray_streamer.device import is_cuda
from ray_streamer.doctor.finding import Finding
from ray_streamer.doctor.node_checks import NodeLook, check_link, check_time_of_day
from ray_streamer.errors import ClusterError
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ray_streamer.cluster.survey import ClusterNode, NodeReply
    from ray_streamer.doctor.checkpoint_view import CheckpointView
    from ray_streamer.doctor.examine import Examination
    from ray_streamer.doctor.finding import Level
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.settings import Settings

ANSWER_SECONDS = 60.0
"""How long nodes may take to start a process and to look around; less with a smaller startup_timeout_seconds."""

_OF_EACH_NODE = {"open files", "address space", "memory", "CPUs", "GPUs"}
"""What the nodes answer for themselves, for the ranks that they may hold instead of all."""

_NUM_SHOWN = 4
"""Nodes whose figures a good finding tells; `--json` has all."""


@dataclass(frozen=True, slots=True)
class ClusterFindings:
    """What the nodes of a cluster answered.

    Attributes:
        replies: Of each node.
        findings: What that means.
    """

    replies: tuple[NodeReply[tuple[Finding, ...]], ...]
    findings: tuple[Finding, ...]

    def joined_to(self, examination: Examination) -> Examination:
        """The examination of this node with these findings in place of those about its memory and limits.

        That this node does not see the checkpoint is no error where others hold the ranks and see it.
        """
        is_readable = _sees_checkpoint(self.replies)
        kept = [
            replace(finding, level="warning") if is_readable and _is_unreadable(finding) else finding
            for finding in examination.findings
            if finding.subject not in _OF_EACH_NODE
        ]
        return replace(examination, findings=(*kept, *self.findings), nodes=self.replies)


def _is_unreadable(finding: Finding) -> bool:
    return finding.subject == "checkpoint" and finding.level == "error"


def _sees_checkpoint(replies: Sequence[NodeReply[tuple[Finding, ...]]]) -> bool:
    """Whether a node that may hold ranks can read it. Those that cannot have an error of their own."""
    found = [finding for reply in replies for finding in reply.answer or () if finding.subject == "checkpoint"]
    return any(finding.level == "good" for finding in found)


def examine_nodes(
    settings: Settings,
    *,
    address: str,
    num_ranks: int,
    device: str,
    devices: Path,
    request: LoadRequest | None = None,
    view: CheckpointView | None = None,
) -> ClusterFindings:
    """Asks every node of a cluster.

    Args:
        settings: Of the load.
        address: Of the cluster: `host:port` or "auto".
        num_ranks: Ranks of the load.
        device: Where tensors go.
        devices: Where device files are on each node.
        request: The load; None for the machines alone.
        view: What this node sees of its checkpoint.

    Raises:
        ClusterError: No cluster answers there.
    """
    bundle = PlacementOptions().for_device(is_gpu=is_cuda(device)).bundle
    index = None if view is None else view.index
    # Of the rank that holds most: nobody knows yet which of them comes to which node.
    rank_bytes = 0 if view is None or is_cuda(device) else max(view.rank_bytes, default=0)

    def look(node: ClusterNode) -> NodeLook:
        num_here = ranks_on(node, bundle, num_ranks)
        files = () if index is None else index.files
        return NodeLook(
            settings=settings,
            request=request,
            files=files,
            num_ranks=num_here,
            held_bytes=num_here * rank_bytes,
            useful_bytes=None if view is None else view.useful_bytes,
            device=device,
            devices=devices,
        )

    timeout_seconds = min(settings.startup_timeout_seconds, ANSWER_SECONDS)
    patience = settings.connect_timeout_seconds
    replies = ask_nodes(look, address=address, connect_timeout_seconds=patience, timeout_seconds=timeout_seconds)
    room = check_cluster_room([reply.node for reply in replies], bundle, num_ranks)
    return ClusterFindings(tuple(replies), (room, *node_findings(replies, bundle)))


def ranks_on(node: ClusterNode, bundle: Mapping[str, float], num_ranks: int) -> int:
    """How many ranks of a load the node may get, were it idle."""
    return min(num_ranks, count_ranks(node.resources, bundle))


def check_cluster_room(nodes: Sequence[ClusterNode], bundle: Mapping[str, float], num_ranks: int) -> Finding:
    """Whether the nodes could hold all ranks."""
    rooms = [NodeRoom(node.name, node.resources, count_ranks(node.resources, bundle)) for node in nodes]
    strategy = choose_strategy("auto", rooms, num_ranks)
    try:
        check_room(strategy, rooms, num_ranks, bundle)
    except ClusterError as error:
        return Finding(
            subject="cluster",
            level="error",
            found=str(error),
            why="A load is refused for the same reason.",
            advice="Add nodes, or use fewer ranks.",
        )
    num_able = sum(room.num_ranks > 0 for room in rooms)
    together = "on one of them" if strategy == "STRICT_PACK" else "on several of them"
    found = f"{counted(len(nodes), 'node')}, {num_able} of them with room for ranks; {counted(num_ranks, 'rank')} {together}"
    return Finding(subject="cluster", level="good", found=found)


def node_findings(replies: Sequence[NodeReply[tuple[Finding, ...]]], bundle: Mapping[str, float]) -> list[Finding]:
    """What the answers mean: each thing that is not well by itself, then what is well on several nodes together.

    Args:
        replies: Of all nodes.
        bundle: What a rank reserves: a node without room for one that does not answer fails no load.
    """
    told: list[Finding] = []
    good: dict[str, dict[str, str]] = {}
    for reply in replies:
        for finding in _of(reply, may_hold=ranks_on(reply.node, bundle, 1) > 0):
            if finding.level == "good":
                good.setdefault(finding.subject, {})[reply.node.name] = finding.found
            else:
                told.append(replace(finding, subject=f"{finding.subject} on {reply.node.name}"))
    return [*told, *(_together(subject, found) for subject, found in good.items())]


def _together(subject: str, found: Mapping[str, str]) -> Finding:
    nodes = counted(len(found), "node")
    if len(set(found.values())) == 1:
        return Finding(subject=f"{subject} on {nodes}", level="good", found=next(iter(found.values())))
    each = [f"{name}: {words}" for name, words in found.items()]
    more = f"; and {counted(len(each) - _NUM_SHOWN, 'more node', 'more nodes')}" if len(each) > _NUM_SHOWN else ""
    return Finding(subject=f"{subject} on {nodes}", level="good", found="; ".join(each[:_NUM_SHOWN]) + more)


def _of(reply: NodeReply[tuple[Finding, ...]], *, may_hold: bool) -> list[Finding]:
    if reply.answer is None:
        return [_silent(reply.failure, "error" if may_hold else "warning")]
    found = list(reply.answer)
    if reply.link is not None:
        found.append(check_link(reply.link))
    if reply.clock is not None:
        found.append(check_time_of_day(reply.clock))
    return found


def _silent(failure: str, level: Level) -> Finding:
    return Finding(
        subject="answer",
        level=level,
        found=failure,
        why="A rank that is placed there does not start either, or waits for a mount that hangs.",
        advice="Look at `ray list nodes` and at the logs of that node's raylet, list the checkpoint's folder there, and see "
        "that ray_streamer is installed on it in the same version.",
    )
