"""How many ranks are on this machine? What launchers say in the environment, and what can be told when they say nothing.

torchrun, accelerate       LOCAL_WORLD_SIZE, and LOCAL_RANK
Open MPI, MPICH, MVAPICH   the size of the node's part of the job, each in a variable of its own
Slurm                      SLURM_STEP_TASKS_PER_NODE, such as "4(x2),3"
DeepSpeed, Horovod         LOCAL_SIZE, HOROVOD_LOCAL_SIZE
Kubeflow, torchrun         PET_NNODES, GROUP_WORLD_SIZE, NNODES: how many nodes there are

A launcher's variables count only when they are about this job: their own rank and size must be those of RANK and WORLD_SIZE.
Where nothing says it, all ranks are taken to be here, unless MASTER_ADDR is another machine, which refutes that.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from ray_streamer.errors import SettingsError
from ray_streamer.planning.topology import Topology
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Mapping


class _Launcher(NamedTuple):
    """Variables of one launcher: rank and size of the job, rank and size on the node; unknown ones are empty."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_LAUNCHERS = (
    _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Launcher(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Launcher("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("PALS_RANKID", "", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Launcher("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
)

_NODE_COUNTS = ("PET_NNODES", "GROUP_WORLD_SIZE", "NNODES", "CROSS_SIZE")
_SLURM_TASKS = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
# No larger numbers: no cluster has as many ranks, and Python does not read any number of digits.
_NUMBER = re.compile(r"[0-9]{1,9}")
_SLURM_RUN = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Which ranks share a node.

    Attributes:
        topology: All ranks by node.
        said_by: The variable that says so; empty when nothing does.
    """

    topology: Topology
    said_by: str

    @property
    def explanation(self) -> str:
        """What this was concluded from, for the error when ranks do not come."""
        if self.said_by:
            return f"{self.said_by} says which ranks are on this machine"
        return (
            f"nothing says how many of the {counted(self.topology.num_ranks, 'rank')} are on this machine, so all of them were taken to be; "
            "set LOCAL_WORLD_SIZE if they are not, or start torch.distributed before the load"
        )


def find_layout(
    rank: int, world_size: int, environment: Mapping[str, str], *, local_world_size: int | None = None
) -> RankLayout:
    """Where the ranks of a launched job are, numbered in a row on each node.

    Args:
        rank: Of this process.
        world_size: Ranks of the job.
        environment: What the launcher set.
        local_world_size: What the caller says of the ranks on each node, instead.

    Raises:
        SettingsError: Variables contradict each other, or the ranks are on several machines and nothing says how many are here.
    """
    if local_world_size is not None:
        layout = in_rows(rank, world_size, local_world_size, "local_world_size")
        _check_local_rank(layout, rank, "LOCAL_RANK", environment)
        return layout
    for launcher in _LAUNCHERS:
        if _speaks_of(launcher.rank, launcher.size, rank, world_size, environment):
            local_size = _number(launcher.local_size, environment)
            if local_size is not None:
                layout = in_rows(rank, world_size, local_size, launcher.local_size)
                _check_local_rank(layout, rank, launcher.local_rank, environment)
                return layout
    sizes = _slurm_sizes(rank, world_size, environment)
    if sizes is not None:
        layout = RankLayout(_packed(sizes), "SLURM_STEP_TASKS_PER_NODE")
        _check_local_rank(layout, rank, "SLURM_LOCALID", environment)
        return layout
    for name in _NODE_COUNTS:
        num_nodes = _number(name, environment)
        if num_nodes is not None and num_nodes >= 1 and world_size % num_nodes == 0:
            return in_rows(rank, world_size, world_size // num_nodes, name)
    _refute_one_machine(world_size, environment)
    return RankLayout(Topology.even(world_size), "")


def in_rows(rank: int, world_size: int, local_size: int, said_by: str) -> RankLayout:
    """So many ranks on each node, numbered in a row.

    Raises:
        SettingsError: They do not divide the ranks, or there is no such rank; names who said so.
    """
    if not 0 <= rank < world_size or local_size < 1 or world_size % local_size:
        raise SettingsError(
            f"need 0 <= rank < world_size and {said_by} dividing it, got rank={rank} world_size={world_size} "
            f"{said_by}={local_size}"
        )
    return RankLayout(Topology.even(world_size, world_size // local_size), said_by)


def _packed(sizes: list[int]) -> Topology:
    stops = list(accumulate(sizes))
    return Topology(tuple(tuple(range(stop - size, stop)) for size, stop in zip(sizes, stops, strict=True)))


def _speaks_of(rank_name: str, size_name: str, rank: int, world_size: int, environment: Mapping[str, str]) -> bool:
    """Whether a launcher's variables are about the job of RANK and WORLD_SIZE."""
    if _number(rank_name, environment) != rank:
        return False
    return not size_name or _number(size_name, environment) == world_size


def _number(name: str, environment: Mapping[str, str]) -> int | None:
    text = environment.get(name, "").strip()
    return int(text) if _NUMBER.fullmatch(text) else None


def _check_local_rank(layout: RankLayout, rank: int, name: str, environment: Mapping[str, str]) -> None:
    """Refuses ranks that are dealt out over the nodes in turn: here the ranks of a node are numbered in a row."""
    said = _number(name, environment)
    here = layout.topology.nodes[layout.topology.node_of(rank)]
    if said is not None and (said >= len(here) or here[said] != rank):
        raise SettingsError(
            f"rank {rank} has {name}={said}, but {layout.said_by} puts it on a node with ranks {list(here)}: number the ranks "
            "of a node in a row (Slurm: --distribution=block; Open MPI: --map-by slot), or start torch.distributed before "
            "the load"
        )


def _slurm_sizes(rank: int, world_size: int, environment: Mapping[str, str]) -> list[int] | None:
    """Ranks on each node of a Slurm job step; None when this is none."""
    if not _speaks_of("SLURM_PROCID", "SLURM_NTASKS", rank, world_size, environment):
        return None
    text = next((environment[name] for name in _SLURM_TASKS if environment.get(name)), "")
    sizes: list[int] = []
    for run in text.split(","):
        match = _SLURM_RUN.fullmatch(run.strip())
        if match is None or int(match[2] or 1) > world_size:
            return None
        sizes += [int(match[1])] * int(match[2] or 1)
    return sizes if sum(sizes) == world_size and all(sizes) else None


def _refute_one_machine(world_size: int, environment: Mapping[str, str]) -> None:
    """Raises when the variables say that other ranks are elsewhere, without saying how many."""
    local_rank, rank = _number("LOCAL_RANK", environment), _number("RANK", environment)
    is_elsewhere = local_rank is not None and local_rank != rank
    address = environment.get("MASTER_ADDR", "")
    if is_elsewhere or (address and _is_another_machine(address)):
        sign = (
            f"LOCAL_RANK={local_rank} for RANK={rank}" if is_elsewhere else f"MASTER_ADDR={address} is another machine"
        )
        raise SettingsError(
            f"{sign}, so not all {world_size} ranks are here, and nothing says how many are: set LOCAL_WORLD_SIZE to the "
            "number of ranks on each machine, or start torch.distributed before the load"
        )


def _is_another_machine(address: str) -> bool:
    """Whether `address` leads elsewhere for certain: an address that this machine has can be bound."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(place)
        except OSError:
            continue
        return False
    return bool(found)
