"""How does a process that the caller owns load its own rank? In a training script, under torchrun, in an own actor."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ray_streamer.api.arguments import SHARDING, Sharding
from ray_streamer.api.membership import find_membership
from ray_streamer.api.node_trace import NodeTrace
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.agreement import agree
from ray_streamer.rank.background import BackgroundLoad
from ray_streamer.rank.given_memory import into_given
from ray_streamer.rank.load import RankLoad
from ray_streamer.rank.options import RankOptions
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import torch
    import torch.distributed as dist

    from ray_streamer.api.arguments import StagesLike
    from ray_streamer.api.membership import Membership
    from ray_streamer.rank.background import Item
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.sharding.cast import DTypeLike
    from ray_streamer.sharding.experts import ExpertsLike
    from ray_streamer.sharding.fuse import FuseLike
    from ray_streamer.sharding.groups import Unmatched
    from ray_streamer.sharding.presets import Layout
    from ray_streamer.sharding.rename import RenameLike
    from ray_streamer.sharding.rules import RulesLike
    from ray_streamer.slices import SliceSource
    from ray_streamer.storage import UriLike


def load_rank(
    uri: UriLike,
    tp: int | None = SHARDING.tp,
    *,
    pp: StagesLike = SHARDING.pp,
    ep: int | bool = SHARDING.ep,
    rules: RulesLike | None = SHARDING.rules,
    slices: SliceSource | None = SHARDING.slices,
    unmatched: Unmatched = SHARDING.unmatched,
    layout: Layout = SHARDING.layout,
    model_type: str | None = SHARDING.model_type,
    mtp: bool = SHARDING.mtp,
    experts: ExpertsLike | None = SHARDING.experts,
    fuse: FuseLike = SHARDING.fuse,
    rename: RenameLike | None = SHARDING.rename,
    dtype: DTypeLike = SHARDING.dtype,
    rank: int | None = None,
    world_size: int | None = None,
    local_world_size: int | None = None,
    session: str | None = None,
    group: dist.ProcessGroup | None = None,
    device: str = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    node_memory_limit: int | str | None = None,
    settings: Settings | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    on_statistics: Callable[[RankStatistics], None] | None = None,
    trace: str | os.PathLike[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Loads this process's slices; every rank of the load calls it, and ranks of a node read for each other.

    Args:
        uri: As in `load_sharded`, like every argument that is not named here.
        tp: Ranks that share the tensors of one stage; all ranks of a stage when unset, else the rest of them are replicas.
        pp: Stages.
        ep: Groups of experts.
        rules: Placements by glob of names.
        slices: Who says what each rank holds, instead of rules.
        unmatched: What becomes of weights without a rule.
        layout: Which preset.
        model_type: The model's type, where config.json names one that has no preset, such as an old architecture's new name.
        mtp: Whether MTP layers are loaded, too.
        experts: Experts of each group.
        fuse: Modules that share results.
        rename: Results' names.
        dtype: Results' dtypes.
        rank: This process; unset = from torch.distributed when it is initialised, else from the variable RANK.
        world_size: Ranks of the load; given or left out together with `rank`.
        local_world_size: Ranks on each node, numbered in a row; all of them when unset.
        session: With `rank`: a name that the ranks of this load share and no other load on these machines uses.
        group: The torch.distributed process group whose ranks load, instead of `rank` and `world_size`; its default group when
            unset. Ranks are those of the group.
        device: "cpu"; "cuda", torch's current device; or "cuda:N".
        concurrency: Reads in flight per rank.
        memory_limit: Staging bytes per rank.
        node_memory_limit: Upper bound of staging bytes over all ranks of a node.
        settings: Every other knob, equal on all ranks; from the environment when unset. The three above win over it.
        out: Tensors of this rank by name, filled in place, of any strides; tensors not named are allocated. After an error their
            content is undefined.
        on_statistics: Called with this rank's statistics when its load is complete.
        trace: File to write, given on all ranks: every block's life on the ranks of this node, for ui.perfetto.dev. Of several
            nodes each writes its own, with its number in the name; see docs/trace.md.

    Returns:
        Every tensor that this rank holds, by the name of its result, complete.

    Raises:
        SettingsError: The arguments or the environment do not say which rank this is.
        RankFailedError: Another rank of this node failed; names it.
        StartupTimeoutError: Ranks of this node did not come.
        RayStreamerError: As `load_sharded` raises, for what this rank met itself.
    """
    stream = stream_rank(
        uri,
        tp=tp,
        pp=pp,
        ep=ep,
        rules=rules,
        slices=slices,
        unmatched=unmatched,
        layout=layout,
        model_type=model_type,
        mtp=mtp,
        experts=experts,
        fuse=fuse,
        rename=rename,
        dtype=dtype,
        rank=rank,
        world_size=world_size,
        local_world_size=local_world_size,
        session=session,
        group=group,
        device=device,
        concurrency=concurrency,
        memory_limit=memory_limit,
        node_memory_limit=node_memory_limit,
        settings=settings,
        out=out,
        on_statistics=on_statistics,
        trace=trace,
    )
    with contextlib.closing(stream):
        return dict(stream)


def stream_rank(
    uri: UriLike,
    tp: int | None = SHARDING.tp,
    *,
    pp: StagesLike = SHARDING.pp,
    ep: int | bool = SHARDING.ep,
    rules: RulesLike | None = SHARDING.rules,
    slices: SliceSource | None = SHARDING.slices,
    unmatched: Unmatched = SHARDING.unmatched,
    layout: Layout = SHARDING.layout,
    model_type: str | None = SHARDING.model_type,
    mtp: bool = SHARDING.mtp,
    experts: ExpertsLike | None = SHARDING.experts,
    fuse: FuseLike = SHARDING.fuse,
    rename: RenameLike | None = SHARDING.rename,
    dtype: DTypeLike = SHARDING.dtype,
    rank: int | None = None,
    world_size: int | None = None,
    local_world_size: int | None = None,
    session: str | None = None,
    group: dist.ProcessGroup | None = None,
    device: str = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    node_memory_limit: int | str | None = None,
    settings: Settings | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    on_statistics: Callable[[RankStatistics], None] | None = None,
    trace: str | os.PathLike[str] | None = None,
) -> RankStream:
    """As `load_rank`, whose arguments it takes, but gives each tensor as it becomes complete, while the others still load.

    The load begins with the first tensor asked for: meeting the other ranks, planning and every check of the checkpoint come
    before it. Closing the stream early ends the load; its neighbours then fail with `RankFailedError`. A stream that is
    dropped ends, too.

    Args:
        uri: As in `load_sharded`, like every argument that is not named here.
        tp: Ranks that share the tensors of one stage; all ranks of a stage when unset, else the rest of them are replicas.
        pp: Stages.
        ep: Groups of experts.
        rules: Placements by glob of names.
        slices: Who says what each rank holds, instead of rules.
        unmatched: What becomes of weights without a rule.
        layout: Which preset.
        model_type: The model's type, where config.json names one that has no preset, such as an old architecture's new name.
        mtp: Whether MTP layers are loaded, too.
        experts: Experts of each group.
        fuse: Modules that share results.
        rename: Results' names.
        dtype: Results' dtypes.
        rank: This process; unset = from torch.distributed when it is initialised, else from the variable RANK.
        world_size: Ranks of the load; given or left out together with `rank`.
        local_world_size: Ranks on each node, numbered in a row; all of them when unset.
        session: With `rank`: a name that the ranks of this load share and no other load on these machines uses.
        group: The torch.distributed process group whose ranks load, instead of `rank` and `world_size`; its default group when
            unset. Ranks are those of the group.
        device: "cpu"; "cuda", torch's current device; or "cuda:N".
        concurrency: Reads in flight per rank.
        memory_limit: Staging bytes per rank.
        node_memory_limit: Upper bound of staging bytes over all ranks of a node.
        settings: Every other knob, equal on all ranks; from the environment when unset. The three above win over it.
        out: Tensors of this rank by name, filled in place, of any strides; tensors not named are allocated. After an error their
            content is undefined.
        on_statistics: Called with this rank's statistics when its load is complete.
        trace: File to write, given on all ranks: every block's life on the ranks of this node, for ui.perfetto.dev. Of several
            nodes each writes its own, with its number in the name; see docs/trace.md.

    Returns:
        An iterator of (name of the result, tensor), each tensor once, in no particular order.

    Raises:
        RayStreamerError: As `load_rank`, while tensors are taken; those that were given before are complete.
    """
    sharding = Sharding(
        tp=tp,
        pp=pp,
        ep=ep,
        rules=rules,
        slices=slices,
        unmatched=unmatched,
        layout=layout,
        model_type=model_type,
        mtp=mtp,
        experts=experts,
        fuse=fuse,
        rename=rename,
        dtype=dtype,
        # As many as the ranks make.
        replicas=None,
    )
    settings = Settings.of_call(
        settings, concurrency=concurrency, memory_limit=memory_limit, node_memory_limit=node_memory_limit
    )
    return RankStream(
        _Call(
            uri=uri,
            sharding=sharding,
            # Ranks of a process group ask each other: not before the load begins.
            find_membership=partial(find_membership, rank, world_size, local_world_size, session, group),
            settings=settings,
            device=device,
            out=out,
            on_statistics=on_statistics,
            trace=trace,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What one rank was asked to load, and how.

    Attributes:
        uri: The checkpoint.
        sharding: Which part of it.
        find_membership: Says which rank this is, among which others.
        settings: Every knob.
        device: Where the tensors go.
        out: Tensors that are filled, by name.
        on_statistics: Who is told what the load did.
        trace: Where it is drawn.
    """

    uri: UriLike
    sharding: Sharding
    find_membership: Callable[[], Membership]
    settings: Settings
    device: str
    out: Mapping[str, torch.Tensor] | None
    on_statistics: Callable[[RankStatistics], None] | None
    trace: str | os.PathLike[str] | None


class RankStream(Iterator[tuple[str, "torch.Tensor"]]):
    """The tensors of one rank as they become complete; made by `stream_rank`. One thread takes them."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._running: BackgroundLoad | None = None
        self._load: RankLoad | None = None
        self._is_over = False

    def __next__(self) -> tuple[str, torch.Tensor]:
        """The next complete tensor; waits for it."""
        if self._is_over:
            raise StopIteration
        try:
            if self._running is None:
                self._load, self._running = _begin(self._call)
            item = self._running.take()
        except BaseException:
            self.close()
            raise
        if item is not None:
            return item
        self._is_over = True
        if self._call.on_statistics is not None and self._load is not None:
            self._call.on_statistics(self._load.statistics())
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


def _begin(call: _Call) -> tuple[RankLoad, BackgroundLoad]:
    """Meets the other ranks, agrees with them and starts the load."""
    membership = call.find_membership()
    request = call.sharding.request(
        call.uri, settings=call.settings, device=call.device, num_ranks=membership.topology.num_ranks
    )
    if call.out is not None:
        request = replace(request, slices=into_given(request.slices, call.out))
    index_bytes = membership.read_index(request)
    completed: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
    with contextlib.ExitStack() as owned:
        # The others are looked for while device and storage are opened; what fails there is told to them.
        session = owned.enter_context(NodeSession(membership.place(request.settings)))
        trace = None if call.trace is None else NodeTrace.of(call.trace, membership)
        device = request.start_device(request.device)
        storage = request.open_storage(num_sharers=len(membership.local_ranks))
        owned.callback(storage.close)
        session.wait_met()
        agreement = agree(session, request, storage, index_bytes=index_bytes)
        load = RankLoad(
            agreement.plan,
            storage,
            device,
            RankOptions.at(
                session.place, concurrency=request.settings.concurrency, memory_limit=agreement.memory_limit
            ),
            session=session,
            out=call.out,
            on_complete=lambda name, tensor: completed.put((name, tensor)),
        )

        def run() -> None:
            load.run()
            if trace is not None:
                trace.write(session, load, uri=request.uri)

        def abort(error: BaseException) -> None:
            load.abort(error)
            # It wakes threads that wait for a network.
            storage.close()

        def close(error: BaseException | None) -> None:
            held.__exit__(type(error) if error is not None else None, error, None)

        held = owned.pop_all()
        try:
            return load, BackgroundLoad(membership.rank, run=run, abort=abort, close=close, completed=completed)
        except BaseException as error:
            close(error)
            raise
