"""How does a URI become a plan? Storage opened, headers read, slices asked for, reads planned; no tensor byte is read.

Slices may come from any source: a callable that is given index and rank. Rules are one such source.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_streamer.checkpoint import locate
from ray_streamer.checkpoint.named import read_index
from ray_streamer.device import check_device_name, is_cuda, open_device
from ray_streamer.errors import ClusterError
from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.planning.limits import (
    FILESYSTEM_MIN_RUN_BYTES,
    OBJECT_STORE_MIN_RUN_BYTES,
    ReadLimits,
    fit_block_bytes,
)
from ray_streamer.rank.device_start import DeviceStart
from ray_streamer.sharding.completeness import refuse_incomplete
from ray_streamer.slices import checked_slices
from ray_streamer.storage import open_storage, scheme_of
from ray_streamer.wording import brief

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.device.base import Device
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.planning.topology import Topology
    from ray_streamer.settings import Settings
    from ray_streamer.sharding.mesh import Mesh
    from ray_streamer.slices import SliceSource
    from ray_streamer.storage.base import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What the user asked for, as it travels to the ranks.

    Attributes:
        uri: Folder or prefix, one `.safetensors` file, or one index json.
        mesh: The grid of ranks.
        slices: Who says what each rank holds.
        settings: Every knob, resolved where the request was made.
        device: Where the tensors go.
        model_type: What the model is, where config.json names a type without a preset; None = as config.json says.
        shared_arguments: Arguments that decide what a rank holds, and that the caller gives all ranks alike, as texts.
    """

    uri: str
    mesh: Mesh
    slices: SliceSource
    settings: Settings
    device: str
    model_type: str | None = None
    shared_arguments: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Refused here, before anything is started or read.
        check_device_name(self.device)
        scheme_of(self.uri)
        if self.settings.memory_limit is not None:
            _fit(self.settings.memory_limit, self.settings)

    @property
    def is_remote(self) -> bool:
        """Whether the checkpoint lies in an object store, and in no file system or memory."""
        return scheme_of(self.uri) not in ("file", "memory")

    @property
    def asked_of_all(self) -> dict[str, str]:
        """What must be equal on all ranks of the load."""
        return {"uri": self.uri, **self.shared_arguments}

    def check_alike(self, theirs: Mapping[str, str], *, rank: int, own_rank: int) -> None:
        """Refuses a load whose ranks would not hold parts of one model.

        Args:
            theirs: What another rank's `asked_of_all` says.
            rank: That rank.
            own_rank: This one.

        Raises:
            ClusterError: It was asked for another checkpoint, or given another argument; names it.
        """
        mine = self.asked_of_all
        for name in {**mine, **theirs}:
            their, own = theirs.get(name), mine.get(name)
            if their != own:
                raise ClusterError(
                    f"rank {rank} was given other {name} than rank {own_rank}, {brief(their)} and not {brief(own)}: give all ranks of "
                    "a load the same, and concurrent loads a session of their own"
                )

    def open_storage(self, *, num_sharers: int = 1) -> Storage:
        """The storage that holds the checkpoint; the caller closes it.

        Args:
            num_sharers: Ranks of this node that read at the same time, and share its bandwidth.
        """
        settings = self.settings
        if settings.max_bandwidth is not None:
            share = max(1, settings.max_bandwidth // num_sharers)
            settings = settings.model_copy(update={"max_bandwidth": share})
        return open_storage(locate(self.uri).folder_uri, settings)

    def open_device(self, name: str) -> Device:
        """The device called `name`, as the settings want it; a GPU starts in the background."""
        return open_device(
            name,
            device_scratch_bytes=self.settings.device_scratch_bytes,
            gpu_direct_storage=self.settings.gpu_direct_storage == "on",
        )

    def start_device(self, name: str, *, owns_process: bool = False) -> DeviceStart:
        """The device called `name`, which begins to come up; see `DeviceStart`.

        Raises:
            DeviceError: Where torch is imported already, and there is no such device.
        """
        return DeviceStart(
            lambda: self.open_device(name),
            wants_staging=is_cuda(name),
            timeout_seconds=self.settings.startup_timeout_seconds,
            owns_process=owns_process,
        )

    def open_index(self) -> CheckpointIndex:
        """Reads the headers.

        Raises:
            CheckpointError: The checkpoint is malformed.
            StorageError: Headers could not be read.
        """
        with closing(self.open_storage()) as storage:
            return self.read_index(storage)

    def read_index(self, storage: Storage) -> CheckpointIndex:
        """As `open_index`, through a storage that is open already and stays so."""
        is_divided = max(self.mesh.tp, self.mesh.pp, self.mesh.ep) > 1
        named = NamedCheckpoint(self.uri, self.settings)
        index = read_index(named, storage, wants_base_config=is_divided).as_model_type(self.model_type)
        refuse_incomplete(index)
        return index

    def read_limits(self, memory_limits: Sequence[int]) -> ReadLimits:
        """The sizes that shape a plan: blocks are small enough for the rank with the least staging memory.

        Raises:
            BudgetError: A limit cannot hold one block.
        """
        min_run_bytes = self.settings.min_run_bytes
        if min_run_bytes is None:
            min_run_bytes = OBJECT_STORE_MIN_RUN_BYTES if self.is_remote else FILESYSTEM_MIN_RUN_BYTES
        return ReadLimits(
            block_bytes=min(_fit(limit, self.settings) for limit in memory_limits),
            min_run_bytes=min_run_bytes,
            max_gap_bytes=self.settings.max_gap_bytes,
        )

    def plan(
        self, topology: Topology, *, memory_limits: tuple[int, ...], index: CheckpointIndex | None = None
    ) -> ReadPlan:
        """Plans, after reading the headers where `index` is not given.

        Args:
            topology: Which ranks share a node.
            memory_limits: Staging bytes of every rank; blocks are small enough for the smallest.
            index: What the headers say, where they were read before.

        Raises:
            CheckpointError: The checkpoint is malformed.
            ShardingError: No rule, or one that cannot cut.
            PlanError: Slices write an element twice, or leave a tensor or a result.
            StorageError: Headers could not be read.
            BudgetError: A limit cannot hold one block.
        """
        # A rank plans its node's reads alone.
        from ray_streamer.planning.read_plan import plan_reads

        limits = self.read_limits(memory_limits)
        index = self.open_index() if index is None else index
        said = [checked_slices(self.slices(index, rank), rank) for rank in range(topology.num_ranks)]
        return plan_reads(index, said, topology, limits)


def _fit(memory_limit: int, settings: Settings) -> int:
    return fit_block_bytes(
        memory_limit=memory_limit, block_bytes=settings.block_bytes, concurrency=settings.concurrency
    )
