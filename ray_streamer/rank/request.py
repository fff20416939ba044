"""How does a URI become a plan? Storage opened, headers read, slices asked for, reads planned; no tensor byte is read.

Slices may come from any source: a callable that is given index and mesh. Rules are one such source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from ray_streamer.checkpoint import locate, open_checkpoint
from ray_streamer.checkpoint.index import CheckpointIndex
from ray_streamer.device import check_device_name, open_device
from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.planning.limits import (
    FILESYSTEM_MIN_RUN_BYTES,
    OBJECT_STORE_MIN_RUN_BYTES,
    ReadLimits,
    fit_block_bytes,
)
from ray_streamer.planning.read_plan import ReadPlan, plan_reads
from ray_streamer.sharding.cast import DTypeLike, checked_dtypes
from ray_streamer.sharding.completeness import refuse_absent, refuse_incomplete
from ray_streamer.sharding.fuse import FuseLike, checked_fusions
from ray_streamer.sharding.groups import Unmatched
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.presets import Layout
from ray_streamer.sharding.rename import RenameLike, renaming
from ray_streamer.sharding.resolve import resolve_slices
from ray_streamer.sharding.rules import ShardRules
from ray_streamer.sharding.slice_tables import cast_results, fuse_slices, rename_results
from ray_streamer.sharding.slices import SliceTable
from ray_streamer.storage import open_storage, scheme_of

if TYPE_CHECKING:
    from ray_streamer.device.base import Device
    from ray_streamer.planning.topology import Topology
    from ray_streamer.settings import Settings
    from ray_streamer.sharding.experts import ExpertsLike
    from ray_streamer.storage.base import Storage

SliceSource = Callable[[CheckpointIndex, Mesh], SliceTable]
"""Who says which part of each tensor a rank holds; must be picklable where ranks are other processes."""


@dataclass(frozen=True, slots=True)
class RuleSlices:
    """Slices from rules: the caller's first, then the preset of the checkpoint's config.json.

    Attributes:
        rules: The caller's.
        unmatched: What becomes of tensors of two or more dimensions that no rule matches.
        layout: What the tensors are for, and so which preset.
        drafts: Whether what only multi-token prediction uses is loaded, too.
        stage_layers: Layers of each stage; as even as can be when unset.
        experts: Experts of each group, for all layers or by layer; neighbours when unset.
    """

    rules: ShardRules = field(default_factory=ShardRules)
    unmatched: Unmatched = "error"
    layout: Layout = "generic"
    drafts: bool = False
    stage_layers: tuple[int, ...] | None = None
    experts: ExpertsLike | None = None

    def __post_init__(self) -> None:
        for name, value, kind in (("unmatched", self.unmatched, Unmatched), ("layout", self.layout, Layout)):
            if value not in get_args(kind):
                raise SettingsError(f"{name} is one of {', '.join(get_args(kind))}, not {value!r}")

    def __call__(self, index: CheckpointIndex, mesh: Mesh) -> SliceTable:
        """Every rank's slices; see `resolve_slices` for what is refused."""
        try:
            rules = ShardRules.for_config(index.config, first=self.rules, layout=self.layout, drafts=self.drafts)
        except ShardingError as error:
            raise ShardingError(f"{index.uri}: {error}") from error
        refuse_absent(index, rules)
        return resolve_slices(
            index, rules, mesh, unmatched=self.unmatched, stage_layers=self.stage_layers, experts=self.experts
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What the user asked for, as it travels to the ranks.

    Attributes:
        uri: Folder or prefix, one `.safetensors` file, or one index json.
        mesh: The grid of ranks.
        slices: Who says which part of each tensor a rank holds.
        settings: Every knob, resolved where the request was made.
        device: Where the tensors go.
        fuse: Which modules' tensors land in common results.
        rename: What results are called.
        dtype: What results are cast to.
    """

    uri: str
    mesh: Mesh
    slices: SliceSource
    settings: Settings
    device: str
    fuse: FuseLike = False
    rename: RenameLike | None = None
    dtype: DTypeLike = None

    def __post_init__(self) -> None:
        checked_fusions(self.fuse)
        if self.rename is not None:
            renaming(self.rename)
        if self.dtype is not None:
            checked_dtypes(self.dtype)
        # Refused here, before anything is started or read.
        check_device_name(self.device)
        scheme_of(self.uri)
        if self.settings.memory_limit is not None:
            _fit(self.settings.memory_limit, self.settings)

    @property
    def is_remote(self) -> bool:
        """Whether the checkpoint lies in an object store, and in no file system or memory."""
        return scheme_of(self.uri) not in ("file", "memory")

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

    def open_index(self) -> CheckpointIndex:
        """Reads the headers.

        Raises:
            CheckpointError: The checkpoint is malformed.
            StorageError: Headers could not be read.
        """
        storage = self.open_storage()
        try:
            return self.read_index(storage)
        finally:
            storage.close()

    def read_index(self, storage: Storage) -> CheckpointIndex:
        """As `open_index`, through a storage that is open already and stays so."""
        index = open_checkpoint(
            self.uri, storage, concurrency=self.settings.concurrency, strict_index=self.settings.strict_index
        )
        refuse_incomplete(index)
        return index

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
            StorageError: Headers could not be read.
            BudgetError: A limit cannot hold one block.
        """
        block_bytes = min(_fit(limit, self.settings) for limit in memory_limits)
        index = self.open_index() if index is None else index
        min_run_bytes = self.settings.min_run_bytes
        if min_run_bytes is None:
            min_run_bytes = OBJECT_STORE_MIN_RUN_BYTES if self.is_remote else FILESYSTEM_MIN_RUN_BYTES
        limits = ReadLimits(
            block_bytes=block_bytes, min_run_bytes=min_run_bytes, max_gap_bytes=self.settings.max_gap_bytes
        )
        return plan_reads(index, self._slices_in_results(index), topology, limits)

    def _slices_in_results(self, index: CheckpointIndex) -> SliceTable:
        table = fuse_slices(index, self.slices(index, self.mesh), self.fuse)
        if self.dtype is not None:
            table = cast_results(index, table, self.dtype)
        return table if self.rename is None else rename_results(index, table, self.rename)


def _fit(memory_limit: int, settings: Settings) -> int:
    return fit_block_bytes(
        memory_limit=memory_limit, block_bytes=settings.block_bytes, concurrency=settings.concurrency
    )
