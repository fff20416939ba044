"""How does one rank come to its load? The other ranks of the node are met and agreed with; the load is then made by what was agreed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.rank.agreement import agree
from ray_streamer.rank.conditions import reads_in_flight
from ray_streamer.rank.device_start import DeviceStart
from ray_streamer.rank.load import RankLoad

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ray_streamer.device.base import Device
    from ray_streamer.exchange.session import NodeSession
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.results import OnComplete
    from ray_streamer.storage.base import Storage


def agreed_load(
    session: NodeSession,
    request: LoadRequest,
    storage: Storage,
    device: Device | DeviceStart,
    *,
    index_bytes: bytes | memoryview | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    on_complete: OnComplete | None = None,
) -> RankLoad:
    """This rank's load, ready to run; every rank of the node calls it.

    Args:
        session: Of the node's ranks, which may still be on their way.
        request: What this rank was asked for.
        storage: Open on the checkpoint; see `RankLoad`.
        device: Where the tensors go; it may still be coming up.
        index_bytes: The index, where all nodes have it already.
        out: Tensors of the caller, filled in place.
        on_complete: Called with names and tensors as these complete.

    Raises:
        StartupTimeoutError: Ranks of this node did not come.
        RankFailedError: Another rank failed.
        RayStreamerError: As `agree` and `RankLoad` raise.
    """
    session.wait_met()
    imports_torch = isinstance(device, DeviceStart) and device.is_under_way
    agreement = agree(session, request, storage, index_bytes=index_bytes, held=out, imports_torch=imports_torch)
    return RankLoad(
        agreement.plan,
        storage,
        device,
        session,
        concurrency=reads_in_flight(request.settings, storage),
        memory_limit=agreement.memory_limit,
        out=out,
        on_complete=on_complete,
    )
