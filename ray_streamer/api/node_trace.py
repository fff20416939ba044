"""How do ranks without a driver draw their load? Those of a node give each other their parts, and the first one writes the file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ray_streamer.errors import SettingsError
from ray_streamer.rank.trace import RankTrace
from ray_streamer.report.output_file import check_file, why_unwritten
from ray_streamer.report.trace import ClockOffset, LoadTrace, epoch_of_this_clock

if TYPE_CHECKING:
    import os

    from ray_streamer.api.membership import Membership
    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.rank.load import RankLoad

logger = logging.getLogger(__name__)


def checked_output(trace: str | os.PathLike[str]) -> Path:
    """The file of a trace, which can be written.

    Raises:
        SettingsError: It cannot; says why.
    """
    path = _path_of(trace)
    try:
        check_file(path)
    except OSError as error:
        raise SettingsError(f"trace={str(path)!r} cannot be written: {why_unwritten(path, error)}") from error
    return path


def _path_of(trace: str | os.PathLike[str]) -> Path:
    try:
        return Path(trace)
    except TypeError:
        raise SettingsError(f"trace is the path of a file, got {trace!r}") from None


@dataclass(frozen=True, slots=True)
class NodeTrace:
    """The trace of one node's ranks.

    Attributes:
        path: Where it is written.
        is_writer: Whether this rank writes it.
    """

    path: Path
    is_writer: bool

    @classmethod
    def of(cls, trace: str | os.PathLike[str], membership: Membership) -> Self:
        """The file of this rank's node: as named, or with the number of the node where there are several.

        Raises:
            SettingsError: It cannot be written.
        """
        path = _path_of(trace)
        if len(membership.topology.nodes) > 1:
            path = path.with_name(f"{path.stem}.node-{membership.node_number}{path.suffix}")
        is_writer = membership.rank == membership.local_ranks[0]
        return cls(checked_output(path) if is_writer else path, is_writer)

    def write(self, session: NodeSession, load: RankLoad, *, uri: str) -> None:
        """Exchanges the parts and writes the file; every rank of the node calls it after its load.

        What goes wrong here costs the trace and no tensors: it is logged.
        """
        session.activity.phase = "writing the trace"
        try:
            parts = session.gather(load.trace().to_bytes())
            if self.is_writer:
                ranks = tuple(map(RankTrace.from_bytes, parts))
                LoadTrace(
                    uri=uri,
                    phases=(),
                    ranks=ranks,
                    offsets=(ClockOffset(0.0, 0.0),) * len(ranks),
                    epoch_seconds=epoch_of_this_clock(),
                ).write(self.path)
        except Exception as error:
            logger.warning(
                "the tensors are loaded, but %s was not written: %s; was trace given on all ranks?", self.path, error
            )
