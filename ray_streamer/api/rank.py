"""How does a process that the caller owns load its own rank? In a training script, under torchrun, in an own actor."""

from __future__ import annotations

import contextlib
import queue
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Unpack

from ray_streamer.api.agreement import agree, read_index_for_all_nodes
from ray_streamer.api.membership import find_membership
from ray_streamer.api.request import SliceArguments, make_request, num_stages, slice_arguments
from ray_streamer.errors import SettingsError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.background import BackgroundLoad
from ray_streamer.rank.load import RankLoad
from ray_streamer.rank.options import RankOptions
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    import torch.distributed as dist

    from ray_streamer.api.agreement import Agreement
    from ray_streamer.api.membership import Membership
    from ray_streamer.api.request import Stages
    from ray_streamer.rank.background import Item
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.storage import UriLike


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
        group: The torch.distributed process group whose ranks load, instead of `rank` and `world_size`; its default group when
            unset. Ranks are those of the group.
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
    group: dist.ProcessGroup | None
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
        Every tensor that this rank holds, by the name of its result, complete.

    Raises:
        SettingsError: The arguments or the environment do not say which rank this is.
        RankFailedError: Another rank of this node failed; names it.
        StartupTimeoutError: Ranks of this node did not come.
        RayStreamerError: As `load_sharded` raises, for what this rank met itself.
    """
    with contextlib.closing(stream_rank(uri, **arguments)) as stream:
        return dict(stream)


def stream_rank(uri: UriLike, **arguments: Unpack[RankArguments]) -> RankStream:
    """As `load_rank`, but gives each tensor as it becomes complete, while the others still load.

    The load begins with the first tensor asked for: planning and every check come before it. Closing the stream early ends
    the load; its neighbours then fail with `RankFailedError`. A stream that is dropped ends, too.

    Args:
        uri: As in `load_sharded`.
        arguments: See `RankArguments`.

    Returns:
        An iterator of (name of the result, tensor), each tensor once, in no particular order.

    Raises:
        RayStreamerError: As `load_rank`, while tensors are taken; those that were given before are complete.
    """
    return RankStream(uri, arguments)


class RankStream(Iterator[tuple[str, "torch.Tensor"]]):
    """The tensors of one rank as they become complete; made by `stream_rank`. One thread takes them."""

    def __init__(self, uri: UriLike, arguments: RankArguments) -> None:
        self._uri, self._arguments = uri, arguments
        self._running: BackgroundLoad | None = None
        self._load: RankLoad | None = None
        self._is_over = False

    def __next__(self) -> tuple[str, torch.Tensor]:
        """The next complete tensor; waits for it."""
        if self._is_over:
            raise StopIteration
        try:
            if self._running is None:
                self._load, self._running = _begin(self._uri, self._arguments)
            item = self._running.take()
        except BaseException:
            self.close()
            raise
        if item is not None:
            return item
        self._is_over = True
        report = self._arguments.get("on_statistics")
        if report is not None and self._load is not None:
            report(self._load.statistics())
        raise StopIteration

    def close(self) -> None:
        """Ends the load, if it is under way, and waits until nothing of it is left."""
        if not self._is_over:
            self._is_over = True
            if self._running is not None:
                self._running.end()

    def __del__(self) -> None:
        """Ends the load; the collector may call this in a thread of the load itself."""
        if not self._is_over and self._running is not None:
            self._running.drop()


def _begin(uri: UriLike, arguments: RankArguments) -> tuple[RankLoad, BackgroundLoad]:
    """Meets the other ranks, agrees with them and starts the load."""
    membership, request = _request_of_rank(uri, arguments)
    index_bytes = read_index_for_all_nodes(membership, request)
    completed: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
    with contextlib.ExitStack() as owned:
        # The others are looked for while device and storage are opened; what fails there is told to them.
        session = owned.enter_context(NodeSession(_place(membership, request.settings)))
        device = request.open_device(request.device)
        storage = request.open_storage(num_sharers=len(membership.local_ranks))
        owned.callback(storage.close)
        session.wait_met()
        agreement = agree(session, membership, request, storage, index_bytes)
        load = RankLoad(
            agreement.plan,
            storage,
            device,
            _options(session, agreement, request.settings),
            session=session,
            out=arguments.get("out"),
            on_complete=lambda name, tensor: completed.put((name, tensor)),
        )

        def abort(error: BaseException) -> None:
            load.abort(error)
            # It wakes threads that wait for a network.
            storage.close()

        def close(error: BaseException | None) -> None:
            held.__exit__(type(error) if error is not None else None, error, None)

        held = owned.pop_all()
        try:
            return load, BackgroundLoad(membership.rank, run=load.run, abort=abort, close=close, completed=completed)
        except BaseException as error:
            close(error)
            raise


def _place(membership: Membership, settings: Settings) -> Place:
    return Place(
        # Several nodes may share a machine, and with it the names of sockets.
        session=f"{membership.session}/{membership.node_number}",
        rank=membership.rank,
        ranks=membership.local_ranks,
        node=socket.gethostname(),
        timeouts=Timeouts.of(settings),
        assumption=membership.assumption,
    )


def _options(session: NodeSession, agreement: Agreement, settings: Settings) -> RankOptions:
    return RankOptions(
        session=session.place.session,
        node=session.place.node,
        concurrency=settings.concurrency,
        memory_limit=agreement.memory_limit,
        timeouts=session.place.timeouts,
    )


def _request_of_rank(uri: UriLike, arguments: RankArguments) -> tuple[Membership, LoadRequest]:
    unknown = arguments.keys() - RankArguments.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown arguments {sorted(unknown)}; there are {sorted(RankArguments.__annotations__)}")
    membership = find_membership(
        arguments.get("rank"),
        arguments.get("world_size"),
        arguments.get("local_world_size"),
        arguments.get("session"),
        arguments.get("group"),
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
