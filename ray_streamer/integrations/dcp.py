"""How does torch.distributed.checkpoint load safetensors from S3, or from anywhere else that this package reads?

    import torch.distributed.checkpoint as dcp
    from ray_streamer.integrations.dcp import StorageReader

    state_dict = model.state_dict()                       # DTensors included
    dcp.load(state_dict, storage_reader=StorageReader("s3://bucket/llama"))

1. torch asks for the names, shapes and dtypes of the checkpoint, and says which box of which tensor each rank wants.
2. The coordinator tells ranks of one machine that they read together, and every rank what it has read of the checkpoint's headers.
3. Each node reads every byte that one of its ranks wants once; boxes land in the memory of the state dict.

Ranks of a load are known by their plans, so `process_group=` and `no_dist=True` of torch need no repetition here.
"""

from __future__ import annotations

import secrets
from collections import deque
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader as TorchStorageReader
from torch.futures import Future

from ray_streamer.api.arguments import Sharding
from ray_streamer.api.membership import Membership
from ray_streamer.api.process_group import this_machine
from ray_streamer.api.rank_stream import RankCall, RankStream
from ray_streamer.checkpoint.index_bytes import index_to_bytes
from ray_streamer.checkpoint.named import open_index
from ray_streamer.errors import SettingsError
from ray_streamer.integrations.dcp_plan import PlannedSlices
from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.planning.topology import Topology
from ray_streamer.settings import Settings
from ray_streamer.sharding.completeness import refuse_incomplete
from ray_streamer.storage import split_signature

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.storage import UrisLike


@dataclass(frozen=True, slots=True)
class _Seat:
    """A rank among those of its machine, which read together.

    Attributes:
        number: Of this rank among them.
        num_ranks: Of them.
        session: A secret that they share.
        index_bytes: The checkpoint's index as the coordinator read it.
    """

    number: int
    num_ranks: int
    session: str
    index_bytes: bytes

    def membership(self) -> Membership:
        """This rank's place in the load."""
        topology = Topology.even(self.num_ranks)
        return Membership(rank=self.number, topology=topology, session=self.session, index_bytes=self.index_bytes)


class StorageReader(TorchStorageReader):
    """A reader of safetensors for `torch.distributed.checkpoint.load`; every rank makes its own.

    Args:
        uri: Folder or prefix, one `.safetensors` file, or one index json; `checkpoint_id` of `load` wins over it.
        settings: Every knob, equal on all ranks; from the environment when unset.
        on_statistics: Called with what this rank's load did, once it is complete.
    """

    def __init__(
        self,
        uri: UrisLike | None = None,
        *,
        settings: Settings | None = None,
        on_statistics: Callable[[RankStatistics], None] | None = None,
    ) -> None:
        super().__init__()
        self._settings = Settings.of_call(settings)
        self._named = None if uri is None else NamedCheckpoint.of(uri, self._settings)
        self._on_statistics = on_statistics
        self._index: CheckpointIndex | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: UrisLike) -> bool:
        """Whether it is a uri that this package reads from; nothing is opened."""
        try:
            split_signature(checkpoint_id)
        except SettingsError:
            return False
        return True

    def reset(self, checkpoint_id: UrisLike | None = None) -> None:
        """Begins another load, of `checkpoint_id` if it is given; called by torch.

        Raises:
            SettingsError: It is no uri.
        """
        if checkpoint_id is not None:
            self._named = NamedCheckpoint.of(checkpoint_id, self._settings)
        self._index = None

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """What the headers say; called by torch, on every rank.

        Raises:
            SettingsError: No uri was given.
            CheckpointError: The checkpoint is malformed, or its files hold parts of tensors.
            StorageError: Headers could not be read.
        """
        index = self._opened()
        return Metadata(
            state_dict_metadata={name: _metadata(index, position) for position, name in enumerate(index.names)},
            storage_meta=StorageMeta(),
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to do: ranks meet when they read; called by torch."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Says which machine this rank is on; called by torch."""
        return replace(plan, storage_data=this_machine())

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Tells ranks of one machine that they read together, and what; called by torch, on the coordinator."""
        machines = [plan.storage_data for plan in plans]
        sessions = {machine: secrets.token_hex(16) for machine in machines}
        index_bytes = index_to_bytes(self._opened())
        return [
            replace(
                plan,
                storage_data=_Seat(
                    number=machines[:at].count(plan.storage_data),
                    num_ranks=machines.count(plan.storage_data),
                    session=sessions[plan.storage_data],
                    index_bytes=index_bytes,
                ),
            )
            for at, plan in enumerate(plans)
        ]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills what the plan names, and gives a future that is complete; called by torch, on every rank.

        Raises:
            RayStreamerError: As `load_rank`; `RankFailedError` numbers the ranks of a machine from 0.
        """
        seat = plan.storage_data
        assert isinstance(seat, _Seat)
        wanted = PlannedSlices.of(plan.items, planner, self._index)
        call = RankCall(
            uri=self._located().uri,
            sharding=Sharding(slices=wanted, replicas=None),
            find_membership=seat.membership,
            settings=self._located().settings,
            device=wanted.device,
            out=wanted.out,
            on_statistics=self._on_statistics,
            progress=False,
            trace=None,
            as_dtensor=None,
        )
        with closing(RankStream(call)) as stream:
            deque(stream, maxlen=0)
        for item, target in wanted.targets:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _located(self) -> NamedCheckpoint:
        if self._named is None:
            raise SettingsError("give a uri: StorageReader(uri), or checkpoint_id of torch.distributed.checkpoint.load")
        return self._named

    def _opened(self) -> CheckpointIndex:
        if self._index is None:
            # torch asks for names, dtypes and shapes only.
            self._index = open_index(self._located(), wants_base_config=False)
            refuse_incomplete(self._index)
        return self._index


def _metadata(index: CheckpointIndex, position: int) -> TensorStorageMetadata:
    """A tensor as torch knows it: one chunk, whole in one file."""
    stored = index.dtype_of(position)
    shape = torch.Size(stored.torch_shape(index.shape_of(position)))
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, stored.torch_name)),
        size=shape,
        chunks=[ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=shape)],
    )
