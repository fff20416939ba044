"""What is a node of the cluster asked, and what do its clock and its link mean? `NodeLook` runs there, the checks run here."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.cluster.survey import PARCEL_BYTES
from ray_streamer.doctor.finding import Finding
from ray_streamer.doctor.machine_checks import check_gpus, check_limits
from ray_streamer.doctor.storage_checks import (
    MOST_SKEW_SECONDS,
    check_checkpoint,
    check_clock,
    check_files,
    checkpoint_refused,
)
from ray_streamer.errors import RayStreamerError
from ray_streamer.units import human_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.checkpoint.index import ShardFile
    from ray_streamer.cluster.survey import LinkSpeed
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.report.trace import ClockOffset
    from ray_streamer.settings import Settings

_LEAST_BYTES_PER_SECOND = 50e6
"""Half of what a link of 1 Gb/s carries."""

_MOST_ROUND_TRIP_SECONDS = 0.010
"""Nodes of one zone answer within a millisecond; ten are another region, or a tunnel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLook:
    """A look around on one node, for a load that may put ranks there. Pickled on its way.

    Attributes:
        settings: Of the load.
        request: The load; None looks at the machine alone.
        files: Of the checkpoint, as the asking node sees them; empty where it does not see any.
        num_ranks: As many as may be placed on the node.
        held_bytes: Tensors that they will hold in its memory; 0 when that is not known.
        useful_bytes: Staging memory that they can use; None when that is not known.
        device: Where their tensors go.
        devices: Where device files are.
    """

    settings: Settings
    request: LoadRequest | None
    files: tuple[ShardFile, ...]
    num_ranks: int
    held_bytes: int
    useful_bytes: int | None
    device: str
    devices: Path

    def __call__(self) -> tuple[Finding, ...]:
        """What is so there; nothing where no rank will be."""
        if not self.num_ranks:
            return ()
        limits = check_limits(
            self.settings, num_ranks=self.num_ranks, held_bytes=self.held_bytes, useful_bytes=self.useful_bytes
        )
        # Ray hides GPUs from a task that reserves none.
        found = [*limits, check_gpus(self.devices, device=self.device, visible=None)]
        return tuple(found if self.request is None else [*self._check_storage(self.request), *found])

    def _check_storage(self, request: LoadRequest) -> list[Finding]:
        try:
            storage = request.open_storage()
        except RayStreamerError as error:
            return [checkpoint_refused(error)]
        with contextlib.closing(storage):
            opened = [check_files(storage, self.files)] if self.files else check_checkpoint(request, storage)[1]
            return [*opened, *check_clock(storage, timeout_seconds=self.settings.connect_timeout_seconds)]


def check_time_of_day(offset: ClockOffset) -> Finding:
    """Whether another node's clock agrees with this one's."""
    least = abs(offset.seconds) - offset.error_seconds
    if least <= MOST_SKEW_SECONDS:
        most = abs(offset.seconds) + offset.error_seconds
        return Finding(subject="time of day", level="good", found=f"within {most:.1f} s of this node's")
    return Finding(
        subject="time of day",
        level="warning",
        found=f"{abs(offset.seconds):.0f} s {'ahead of' if offset.seconds > 0 else 'behind'} this node's, "
        f"to within {offset.error_seconds:.1f} s",
        why="A store refuses signed requests whose date is off. Log lines of several nodes cannot be put in order.",
        advice="Set the clock of the node that is wrong, such as by chrony or systemd-timesyncd.",
    )


def check_link(link: LinkSpeed) -> Finding:
    """Whether the way between this node and another one is as quick as it is within a cluster."""
    if link.round_trip_seconds is None or link.fetch_seconds is None:
        return _broken(link)
    rate = PARCEL_BYTES / link.fetch_seconds
    found = (
        f"{human_bytes(PARCEL_BYTES)} from this node through Ray's object store in {link.fetch_seconds * 1e3:.0f} ms "
        f"({human_bytes(int(rate))}/s, all nodes at once), a round trip of TCP in {link.round_trip_seconds * 1e3:.2f} ms"
    )
    if rate >= _LEAST_BYTES_PER_SECOND and link.round_trip_seconds <= _MOST_ROUND_TRIP_SECONDS:
        return Finding(subject="link", level="good", found=found)
    return Finding(
        subject="link",
        level="warning",
        found=found,
        why="Ranks get calls and the checkpoint's index this way, not its weights. The start of a load waits for it.",
        advice="Look for a tunnel, another zone, or a network card that is busy or slow; compare with `iperf3`.",
    )


def _broken(link: LinkSpeed) -> Finding:
    lost = (
        "no TCP connection to the raylet of this node"
        if link.round_trip_seconds is None
        else f"{human_bytes(PARCEL_BYTES)} of Ray's object store did not come from this node"
    )
    return Finding(
        subject="link",
        level="warning",
        found=lost,
        why="Ranks get calls and the checkpoint's index from the driver's node. The start of a load waits for them.",
        advice="Open the ports of Ray between all nodes, in both directions; see Ray's page on configuring ports.",
    )
