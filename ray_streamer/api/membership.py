"""Which rank is this process, and who else loads? From arguments, torch.distributed, or the launcher's environment.

rank=..., world_size=...        said by the caller, with a session that all ranks of the load share
torch.distributed               a process group that is initialised: ranks ask each other where they run
RANK, WORLD_SIZE, ...           set by torchrun and its like, which number the ranks of a node in a row
nothing                         a load of one rank
"""

from __future__ import annotations

import itertools
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import SettingsError
from ray_streamer.planning.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable

_num_loads = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """This process's place in a load.

    Attributes:
        rank: Global rank.
        topology: Which ranks share a node.
        session: Secret, or at least unique, name of this load.
        share: Gives every rank what the first rank's function returns, or None when the ranks cannot speak to each other
            before the load.
    """

    rank: int
    topology: Topology
    session: str
    share: Callable[[Callable[[], Any]], Any] | None = None


def find_membership(
    rank: int | None, world_size: int | None, local_world_size: int | None, session: str | None
) -> Membership:
    """This process's place.

    Args:
        rank: Given together with `world_size`, or neither.
        world_size: Ranks of the load.
        local_world_size: Ranks on each node; all of them when unset.
        session: A name that all ranks of this load, and no other load on these machines, give; needed where the ranks of a
            node know nothing else in common.

    Raises:
        SettingsError: The values do not fit together.
    """
    if (rank is None) != (world_size is None):
        raise SettingsError(f"give rank and world_size, or neither: rank={rank} world_size={world_size}")
    if rank is not None and world_size is not None:
        topology = _rows(rank, world_size, world_size if local_world_size is None else local_world_size)
        if session is None and len(topology.nodes[topology.node_of(rank)]) > 1:
            raise SettingsError("give session: a name that the ranks of this load share and no other load uses")
        return Membership(rank=rank, topology=topology, session=session or secrets.token_hex(16))
    return _from_process_group() or _from_environment(session)


def _rows(rank: int, world_size: int, local_world_size: int) -> Topology:
    if not 0 <= rank < world_size or local_world_size < 1 or world_size % local_world_size:
        raise SettingsError(
            f"need 0 <= rank < world_size and local_world_size dividing it, got rank={rank} world_size={world_size} "
            f"local_world_size={local_world_size}"
        )
    return Topology.even(world_size, world_size // local_world_size)


def _from_process_group() -> Membership | None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (_machine(), secrets.token_hex(16)))
    machines = [machine for machine, _ in places]
    nodes = tuple(
        tuple(rank for rank, other in enumerate(machines) if other == machine) for machine in dict.fromkeys(machines)
    )

    def share(make: Callable[[], Any]) -> Any:
        made: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                made = [make()]
            except Exception as error:  # every rank must leave the collective, and with this error
                made = [error]
        dist.broadcast_object_list(made, src=0)
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    return Membership(rank=dist.get_rank(), topology=Topology(nodes), session=places[0][1], share=share)


def _machine() -> tuple[str, str, int]:
    """What ranks must have in common to meet on an abstract socket: the running kernel and its network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname(), boot, os.stat("/proc/self/ns/net").st_ino


def _from_environment(session: str | None) -> Membership:
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Membership(rank=0, topology=Topology.even(1), session=secrets.token_hex(16))
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    except (KeyError, ValueError) as error:
        raise SettingsError(
            f"RANK, WORLD_SIZE and LOCAL_WORLD_SIZE must be whole numbers, all or none: {error}"
        ) from None
    if session is None:
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
        # Counted, so that the next load of the same processes is another session; all ranks load equally often.
        session = "/".join([*(os.environ.get(name, "") for name in names), str(next(_num_loads))])
    return Membership(rank=rank, topology=_rows(rank, world_size, local_world_size), session=session)
