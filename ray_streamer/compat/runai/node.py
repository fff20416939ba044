"""Which ranks of this node stream together? With `is_distributed`, those of torch.distributed's default group.

Each byte is read by one rank of the node, into memory that all of them map; nothing is broadcast.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.api.membership import find_membership
from ray_streamer.checkpoint.index_bytes import index_from_bytes, index_to_bytes
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.agreement import made_by_first
from ray_streamer.rank.shared_tensors import SharedTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.settings import Settings
    from ray_streamer.storage import Storage

_SWITCH = "RUNAI_STREAMER_DIST"
"""0 = every process reads for itself, whatever the call says; Run:ai's variable, with its meaning."""


def are_several_ranks() -> bool:
    """Whether torch.distributed is initialised here, with more than one rank, and the environment does not forbid sharing."""
    dist = sys.modules.get("torch.distributed")
    is_up = dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return is_up and os.environ.get(_SWITCH, "").strip() != "0"


@dataclass(frozen=True, slots=True)
class NodeRanks:
    """The ranks of one node that met for one stream; closed by their owner.

    Attributes:
        session: Of these ranks.
    """

    session: NodeSession

    @classmethod
    def meet(cls, settings: Settings) -> NodeRanks:
        """Meets the others of torch.distributed's default group on this node; all of them call it.

        Raises:
            StartupTimeoutError: Some did not come.
        """
        membership = find_membership(None, None, None, None)
        return cls(NodeSession.meet(membership.place(settings)))

    def __len__(self) -> int:
        """Number of ranks."""
        return len(self.session.place.ranks)

    def index(self, make: Callable[[], CheckpointIndex]) -> CheckpointIndex:
        """What `make` returned on the node's first rank, where alone it is called.

        Raises:
            RayStreamerError: What it raised, on all ranks.
        """
        return made_by_first(self.session, make, to_bytes=index_to_bytes, from_bytes=index_from_bytes)

    def stream(
        self, index: CheckpointIndex, storage: Storage, names: Sequence[str], *, memory_limit: int, settings: Settings
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of those names, in the order of their bytes; ranks may want different ones.

        Args:
            index: Equal on all ranks.
            storage: Holds its files; stays the caller's.
            names: What this rank wants.
            memory_limit: Bytes for all ranks of the node.
            settings: Block size and concurrency.

        Raises:
            StorageError: A read of this rank failed.
            RankFailedError: Another rank failed, or stopped taking tensors.
        """
        shares = self.session.gather(str(max(1, memory_limit // len(self))).encode())
        with SharedTensors.open(
            self.session,
            index,
            storage,
            memory_limit=min(int(bytes(share)) for share in shares),
            block_bytes=settings.block_bytes,
            concurrency=settings.concurrency,
        ) as shared:
            yield from shared.stream(names)
            # Nobody leaves while another one still waits for what this rank read.
            self.session.gather(b"")

    def close(self) -> None:
        """Leaves the others."""
        self.session.close()
