"""How does a process that the caller owns load its own rank? In a training script, under torchrun, in an own actor."""

from __future__ import annotations

import queue
import socket
import threading
from typing import TYPE_CHECKING, Unpack

from ray_streamer.api.membership import find_membership
from ray_streamer.api.plan import assumed_limits
from ray_streamer.api.request import SliceArguments, make_request, num_stages, slice_arguments
from ray_streamer.errors import LoadAbortedError, SettingsError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.machine import measure_available_memory
from ray_streamer.planning.limits import rank_memory_limit
from ray_streamer.process_limits import start_thread
from ray_streamer.rank.load import RankLoad
from ray_streamer.rank.options import RankOptions
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from ray_streamer.api.membership import Membership
    from ray_streamer.api.request import Stages
    from ray_streamer.device.base import Device
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.storage import UriLike
    from ray_streamer.storage.base import Storage


class RankArguments(SliceArguments, total=False):
    """What `load_rank` and `stream_rank` take beside the uri, those of `SliceArguments` included; everything has a default.

    Attributes:
        tp: Ranks that share the tensors of one stage; all ranks of a stage when unset, else the rest of them are replicas.
        pp: As in `load_sharded`.
        ep: As in `load_sharded`.
        rank: This process; unset = from torch.distributed when it is initialised, else from the variable RANK.
        world_size: Ranks of the load; given or left out together with `rank`.
        local_world_size: Ranks on each node, numbered in a row; all of them when unset.
        session: With `rank`: a name that the ranks of this load share and no other load on these machines uses.
        device: "cpu"; "cuda", torch's current device; or "cuda:N".
        settings: Every knob, equal on all ranks; from the environment when unset.
        out: Contiguous tensors of this rank by name, filled in place; tensors not named are allocated. After an error their
            content is undefined.
        on_statistics: Called with this rank's statistics when its load is complete.
    """

    tp: int | None
    pp: Stages
    ep: int | bool
    rank: int | None
    world_size: int | None
    local_world_size: int | None
    session: str | None
    device: str
    settings: Settings | None
    out: Mapping[str, torch.Tensor] | None
    on_statistics: Callable[[RankStatistics], None] | None


def load_rank(uri: UriLike, **arguments: Unpack[RankArguments]) -> dict[str, torch.Tensor]:
    """Loads this process's slices; every rank of the load calls it, and ranks of a node read for each other.

    Args:
        uri: As in `load_sharded`.
        arguments: See `RankArguments`.

    Returns:
        Every tensor that this rank holds, by checkpoint name, complete.

    Raises:
        SettingsError: The arguments or the environment do not say which rank this is.
        RankFailedError: Another rank of this node failed; names it.
        StartupTimeoutError: Ranks of this node did not come.
        RayStreamerError: As `load_sharded` raises, for what this rank met itself.
    """
    return dict(stream_rank(uri, **arguments))


def stream_rank(uri: UriLike, **arguments: Unpack[RankArguments]) -> Iterator[tuple[str, torch.Tensor]]:
    """As `load_rank`, but yields each tensor as it becomes complete, while the others still load.

    Planning and every check come before the first tensor. Closing the iterator early ends the load; its neighbours then
    fail with `RankFailedError`.

    Args:
        uri: As in `load_sharded`.
        arguments: See `RankArguments`.

    Yields:
        (checkpoint name, tensor), each tensor once, in no particular order.

    Raises:
        RayStreamerError: As `load_rank`; tensors that were yielded before are complete.
    """
    membership, request = _request_of_rank(uri, arguments)
    # First: a GPU starts in the background, while the headers are read.
    device = request.open_device(request.device)
    plan = _plan(membership, request)
    storage = request.open_storage(num_sharers=len(plan.topology.nodes[plan.topology.node_of(membership.rank)]))
    try:
        yield from _stream(membership, plan, request.settings, storage, device, arguments)
    finally:
        storage.close()


def _stream(
    membership: Membership,
    plan: ReadPlan,
    settings: Settings,
    storage: Storage,
    device: Device,
    arguments: RankArguments,
) -> Iterator[tuple[str, torch.Tensor]]:
    completed: queue.SimpleQueue[tuple[str, torch.Tensor] | BaseException | None] = queue.SimpleQueue()
    load = RankLoad(
        plan,
        membership.rank,
        storage,
        device,
        _options(membership, plan, settings),
        out=arguments.get("out"),
        on_complete=lambda name, tensor: completed.put((name, tensor)),
    )

    def run() -> None:
        try:
            load.run()
            completed.put(None)
        except BaseException as error:
            completed.put(error)

    thread = threading.Thread(target=run, name=f"ray_streamer-{membership.rank}", daemon=True)
    start_thread(thread)
    try:
        while (item := completed.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        load.abort(LoadAbortedError(f"the caller of rank {membership.rank} stopped taking tensors"))
        # Before the threads are waited for: it wakes those that wait for a network.
        storage.close()
        thread.join()
    report = arguments.get("on_statistics")
    if report is not None:
        report(load.statistics())


def _request_of_rank(uri: UriLike, arguments: RankArguments) -> tuple[Membership, LoadRequest]:
    unknown = arguments.keys() - RankArguments.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown arguments {sorted(unknown)}; there are {sorted(RankArguments.__annotations__)}")
    membership = find_membership(
        arguments.get("rank"),
        arguments.get("world_size"),
        arguments.get("local_world_size"),
        arguments.get("session"),
    )
    return membership, _request(uri, arguments, membership.topology.num_ranks)


def _request(uri: UriLike, arguments: RankArguments, num_ranks: int) -> LoadRequest:
    pp, tp = arguments.get("pp", 1), arguments.get("tp")
    stages = num_stages(pp)
    if stages < 1 or num_ranks % stages:
        raise SettingsError(f"pp={stages} does not divide the {num_ranks} ranks of this load")
    if tp is None:
        tp = num_ranks // stages
    if tp < 1 or num_ranks % (tp * stages):
        with_pp = f" and pp={stages}" if stages > 1 else ""
        raise SettingsError(f"tp={tp}{with_pp} does not divide the {num_ranks} ranks of this load")
    return make_request(
        uri,
        tp=tp,
        pp=pp,
        ep=arguments.get("ep", False),
        replicas=num_ranks // (tp * stages),
        settings=arguments.get("settings") or Settings.resolve(),
        device=arguments.get("device", "cpu"),
        **slice_arguments(arguments),
    )


def _plan(membership: Membership, request: LoadRequest) -> ReadPlan:
    # A limit that all ranks know without asking each other, so that all make the same plan.
    limits = assumed_limits(membership.topology, request.settings)

    def make() -> ReadPlan:
        return request.plan(membership.topology, memory_limits=limits)

    return make() if membership.share is None else membership.share(make)


def _options(membership: Membership, plan: ReadPlan, settings: Settings) -> RankOptions:
    node_number = plan.topology.node_of(membership.rank)
    neighbours = plan.topology.nodes[node_number]
    memory_limit = rank_memory_limit(
        memory_limit=settings.memory_limit,
        node_memory_limit=settings.node_memory_limit,
        available_bytes=measure_available_memory(),
        num_local_ranks=len(neighbours),
    )
    if settings.memory_limit is None:
        # The plan was made before this rank knew its memory; one block is the least.
        memory_limit = max(memory_limit, plan.limits.block_bytes)
    return RankOptions(
        # Several nodes may share a machine, and with it the names of sockets.
        session=f"{membership.session}/{node_number}",
        node=socket.gethostname(),
        concurrency=settings.concurrency,
        memory_limit=memory_limit,
        timeouts=Timeouts.of(settings),
    )
