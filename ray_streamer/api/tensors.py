"""How do the ranks of a process group read a checkpoint's tensors together, for a loader that wants them whole?"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.api.membership import find_membership
from ray_streamer.exchange.session import NodeSession
from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.rank.agreement import agree_on_index, share_tensors
from ray_streamer.rank.request import LoadRequest
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.slices import RankSlices

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch.distributed as dist

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.rank.shared_tensors import SharedTensors
    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike


@dataclass(frozen=True, slots=True)
class OpenTensors:
    """A checkpoint whose tensors the ranks of a node read together.

    Attributes:
        index: Of the checkpoint.
        shared: Its tensors.
    """

    index: CheckpointIndex
    shared: SharedTensors


@contextlib.contextmanager
def open_tensors(uri: UrisLike, *, settings: Settings, group: dist.ProcessGroup | None) -> Iterator[OpenTensors]:
    """Meets the other ranks of the group over a checkpoint, for the length of the block; every rank of the group calls it.

    An error that leaves the block ends it for the other ranks of this node, too.

    Args:
        uri: As in `load_sharded`.
        settings: Every knob, equal on all ranks.
        group: A torch.distributed process group; None for a rank on its own.

    Raises:
        RankFailedError: Another rank of this node failed; names it.
        StartupTimeoutError: Ranks of this node did not come.
        RayStreamerError: The checkpoint cannot be read.
    """
    alone = (0, 1) if group is None else (None, None)
    membership = find_membership(*alone, None, None, group)
    named = NamedCheckpoint.of(uri, settings)
    request = LoadRequest(
        uri=named.uri,
        mesh=Mesh(tp=membership.topology.num_ranks),
        slices=lambda index, _: RankSlices.from_rows(index, [], []),
        settings=named.settings,
        device="cpu",
    )
    index_bytes = membership.read_index(request)
    with contextlib.ExitStack() as owned:
        session = owned.enter_context(NodeSession(membership.place(settings)))
        storage = owned.enter_context(contextlib.closing(request.open_storage(num_sharers=len(membership.local_ranks))))
        session.wait_met()
        met = agree_on_index(session, request, storage, index_bytes=index_bytes)
        session.activity.phase = "loading whole tensors"
        yield OpenTensors(met.index, owned.enter_context(share_tensors(session, request, storage, met)))
