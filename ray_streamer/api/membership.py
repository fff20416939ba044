"""Which rank is this process, and who else loads? From arguments, a process group, or the launcher's environment.

rank=..., world_size=...        said by the caller, with a session that all ranks of the load share
group=...                       a torch.distributed process group: its ranks ask each other where they run
torch.distributed               its default group, where it is initialised
RANK, WORLD_SIZE, ...           set by torchrun and its like; see `launchers` for who shares a machine
nothing                         a load of one rank
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.api.launchers import find_layout, in_rows
from ray_streamer.api.process_group import ProcessGroup
from ray_streamer.arguments import whole_number
from ray_streamer.checkpoint.index_bytes import index_to_bytes
from ray_streamer.errors import SettingsError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.planning.topology import MAX_RANKS, Topology

if TYPE_CHECKING:
    import torch.distributed as dist

    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.settings import Settings

_JOB_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "OMPI_MCA_ess_base_jobid",
    "PMIX_NAMESPACE",
)
"""What tells one job on a machine from another; equal on all ranks of a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """This process's place in a load.

    Attributes:
        rank: Global rank.
        topology: Which ranks share a node.
        session: Secret, or at least unique, name of this load.
        assumption: What was assumed about the other ranks, to be said when they do not come; empty when they are known.
        group: The process group whose ranks load, when there is one.
        index_bytes: The checkpoint's index, where all ranks of the load have it already.
    """

    rank: int
    topology: Topology
    session: str
    assumption: str = ""
    group: ProcessGroup | None = None
    index_bytes: bytes | None = None

    @property
    def node_number(self) -> int:
        """Position in the topology of this rank's node."""
        return self.topology.node_of(self.rank)

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """Global ranks of this rank's node, in order."""
        return self.topology.nodes[self.node_number]

    def place(self, settings: Settings) -> Place:
        """Where this rank meets the others of its node."""
        return Place(
            # Several nodes may share a machine, and with it the names of sockets.
            session=f"{self.session}/{self.node_number}",
            rank=self.rank,
            ranks=self.local_ranks,
            node=socket.gethostname(),
            timeouts=Timeouts.of(settings),
            assumption=self.assumption,
        )

    def read_index(self, request: LoadRequest) -> bytes | None:
        """The index where all ranks have it, as the first rank of a process group on several nodes reads it for them.

        None where the ranks of a node ask each other.

        Raises:
            ClusterError: The first rank was asked for something else.
            RayStreamerError: The first rank could not read it; the same error on all ranks.
        """
        if self.group is None or len(self.topology.nodes) == 1:
            return self.index_bytes
        asked = json.dumps(request.asked_of_all).encode()
        # JSON has no line break of its own.
        shared = self.group.share(lambda: b"\n".join((asked, index_to_bytes(request.open_index()))))
        theirs, _, index_bytes = shared.partition(b"\n")
        request.check_alike(json.loads(theirs), rank=0, own_rank=self.rank)
        return index_bytes


def find_membership(
    rank: int | None,
    world_size: int | None,
    local_world_size: int | None,
    session: str | None,
    group: dist.ProcessGroup | None = None,
) -> Membership:
    """This process's place.

    Args:
        rank: Given together with `world_size`, or neither.
        world_size: Ranks of the load.
        local_world_size: Ranks on each node; when unset, what the environment says, else all of them.
        session: A name that all ranks of this load, and no other load on these machines, give; needed where the ranks of a
            node know nothing else in common.
        group: Its ranks load; instead of `rank` and `world_size`.

    Raises:
        SettingsError: The values do not fit together.
    """
    if (rank is None) != (world_size is None):
        raise SettingsError(f"give rank and world_size, or neither: rank={rank} world_size={world_size}")
    if session is not None and not session:
        raise SettingsError("session is empty: give a name that the ranks of this load share and no other load uses")
    local_world_size = None if local_world_size is None else whole_number("local_world_size", local_world_size)
    if rank is not None and world_size is not None:
        if group is not None:
            raise SettingsError("give group, or rank and world_size, not both: a group's ranks know who they are")
        rank, world_size = whole_number("rank", rank), whole_number("world_size", world_size)
        return _from_arguments(rank, world_size, local_world_size, session)
    asked = ProcessGroup(group) if group is not None else ProcessGroup.default()
    if asked is not None:
        _check_local_size(local_world_size, asked.topology)
        return Membership(rank=asked.rank, topology=asked.topology, session=asked.session, group=asked)
    return _from_environment(local_world_size, session)


def _check_local_size(said: int | None, found: Topology) -> None:
    """Refuses what is said of the nodes where a process group's ranks have told each other where they run."""
    sizes = sorted({len(ranks) for ranks in found.nodes})
    if said is not None and sizes != [said]:
        raise SettingsError(
            f"local_world_size={said}, and the process group has {' or '.join(map(str, sizes))} on each machine; leave it out"
        )


def _from_arguments(rank: int, world_size: int, local_world_size: int | None, session: str | None) -> Membership:
    local_size = world_size if local_world_size is None else local_world_size
    layout = in_rows(rank, world_size, local_size, "local_world_size")
    if session is None and local_size > 1:
        raise SettingsError("give session: a name that the ranks of this load share and no other load uses")
    assumed = (
        f"local_world_size was not given, so all {world_size} ranks were taken to be on this machine"
        if local_world_size is None
        else ""
    )
    return Membership(rank=rank, topology=layout.topology, session=session or secrets.token_hex(16), assumption=assumed)


def _number(text: str) -> int:
    """As `int` reads it, but for digits that only Python groups, such as 1_0."""
    if "_" in text:
        raise ValueError(f"{text!r} is no number")
    return int(text)


def _from_environment(local_world_size: int | None, session: str | None) -> Membership:
    environment = os.environ
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        if local_world_size not in (None, 1):
            raise SettingsError(
                f"local_world_size={local_world_size}, and nothing says that this process is one of several ranks: start them with "
                "torchrun, or give rank and world_size"
            )
        return Membership(rank=0, topology=Topology.even(1), session=secrets.token_hex(16))
    try:
        rank, world_size = _number(environment["RANK"]), _number(environment["WORLD_SIZE"])
        _number(environment.get("LOCAL_WORLD_SIZE", str(world_size)))
    except (KeyError, ValueError) as error:
        raise SettingsError(
            f"RANK, WORLD_SIZE and LOCAL_WORLD_SIZE must be whole numbers, all or none: {error}"
        ) from None
    if not 0 <= rank < world_size <= MAX_RANKS:
        raise SettingsError(f"need 0 <= RANK < WORLD_SIZE <= {MAX_RANKS}, got RANK={rank} WORLD_SIZE={world_size}")
    layout = find_layout(rank, world_size, environment, local_world_size=local_world_size)
    if session is None:
        # Not counted: a rank that tries again, after an error that the others know nothing of, must meet them.
        session = "/".join([str(os.geteuid()), *(environment.get(name, "") for name in _JOB_VARIABLES)])
    return Membership(rank=rank, topology=layout.topology, session=session, assumption=layout.explanation)
