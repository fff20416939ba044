"""What do ranks of a torch.distributed process group ask each other before they load? Where each runs, and one rank's result."""

from __future__ import annotations

import secrets
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import CheckpointError, ClusterError, RayStreamerError, SettingsError
from ray_streamer.planning.topology import Topology
from ray_streamer.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch.distributed as dist


class ProcessGroup:
    """A process group, asked for what a load needs; its own timeout bounds every question.

    Attributes:
        rank: Of this process in the group.
        topology: Which ranks of the group share a machine.
        session: A secret that the group's ranks share.

    Raises:
        SettingsError: It is none, or this process is no member.
        ClusterError: Other ranks did not answer within the group's timeout, or have ended.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        import torch.distributed as dist

        self._dist, self._group = dist, group
        try:
            self.rank = dist.get_rank(group)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise SettingsError(
                f"group is a torch.distributed process group that is initialised here, got {type(group).__name__}: "
                f"{first_line(error)}; of a device mesh give mesh.get_group()"
            ) from error
        if self.rank < 0:
            raise SettingsError(
                "this process is no member of the process group that was given; call it in members only"
            )
        places: list[Any] = [None] * dist.get_world_size(group)
        with _asking("where each rank runs"):
            dist.all_gather_object(places, (this_machine(), secrets.token_hex(16)), group=group)
        machines = [machine for machine, _ in places]
        self.topology = Topology(
            tuple(
                tuple(rank for rank, other in enumerate(machines) if other == machine)
                for machine in dict.fromkeys(machines)
            )
        )
        self.session: str = places[0][1]

    @classmethod
    def default(cls) -> ProcessGroup | None:
        """The default group; None when torch.distributed is not initialised."""
        # Where nobody has imported it yet, nobody has initialised it.
        dist = sys.modules.get("torch.distributed")
        return cls(None) if dist is not None and dist.is_available() and dist.is_initialized() else None

    def share(self, make: Callable[[], bytes]) -> bytes:
        """What `make` returned on the first rank, on all ranks.

        Raises:
            RayStreamerError: What it raised, on all ranks.
            ClusterError: Other ranks did not answer within the group's timeout, or have ended.
        """
        made: list[Any] = [None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                made = [make()]
            except Exception as error:  # every rank must leave the collective, and with this error
                failure = error
                made = [error if isinstance(error, RayStreamerError) else f"{type(error).__name__}: {error}"]
        with _asking("what is in the checkpoint"):
            self._dist.broadcast_object_list(made, src=self._first(), group=self._group)
        if failure is not None:
            raise failure
        if isinstance(made[0], RayStreamerError):
            raise made[0]
        if isinstance(made[0], str):
            raise CheckpointError(f"rank 0 of the process group could not read the checkpoint: {made[0]}")
        return made[0]

    def _first(self) -> int:
        return 0 if self._group is None else self._dist.get_global_rank(self._group, 0)


@contextmanager
def _asking(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's, of every backend; also when a timeout passed
        raise ClusterError(
            f"the ranks of the process group did not tell each other {what}, {type(error).__name__}: {first_line(error)}; "
            "the timeout is the group's own; each rank must call the load, and a rank that failed says why itself"
        ) from error


def this_machine() -> tuple[str, str, int]:
    """What ranks must have in common to meet on an abstract socket: the running kernel and its network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname(), boot, Path("/proc/self/ns/net").stat().st_ino
