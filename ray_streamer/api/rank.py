"""How does a process that the caller owns load its own rank? In a training script, under torchrun, in an own actor."""

from __future__ import annotations

import contextlib
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING

from ray_streamer.api.arguments import SHARDING, Sharding
from ray_streamer.api.membership import find_membership
from ray_streamer.api.rank_stream import RankCall, RankStream
from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from ray_streamer.api.arguments import DeviceLike, StagesLike
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.sharding.cast import DTypeLike
    from ray_streamer.sharding.experts import ExpertsLike
    from ray_streamer.sharding.fuse import FuseLike
    from ray_streamer.sharding.groups import Unmatched
    from ray_streamer.sharding.presets import Layout
    from ray_streamer.sharding.rename import RenameLike
    from ray_streamer.sharding.rules import RulesLike
    from ray_streamer.slices import SliceSource
    from ray_streamer.storage import UrisLike


def load_rank(
    uri: UrisLike,
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
    device: DeviceLike = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    node_memory_limit: int | str | None = None,
    settings: Settings | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    on_statistics: Callable[[RankStatistics], None] | None = None,
    progress: bool = False,
    trace: str | os.PathLike[str] | None = None,
    as_dtensor: DeviceMesh | None = None,
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
        local_world_size: Ranks on each node, numbered in a row; when unset, all of them, or what the launcher says.
        session: With `rank`: a name that the ranks of this load share and no other load on these machines uses.
        group: The torch.distributed process group whose ranks load, instead of `rank` and `world_size`; its default group when
            unset. Ranks are those of the group.
        device: "cpu"; "cuda", torch's current device; or "cuda:N"; as text or as a torch.device.
        concurrency: Reads in flight per rank; see `Settings`.
        memory_limit: Staging bytes per rank.
        node_memory_limit: Upper bound of staging bytes over all ranks of a node.
        settings: Every other knob, equal on all ranks; from the environment when unset. The three above win over it.
        out: Tensors of this rank by name, filled in place, of any strides; tensors not named are allocated. After an error their
            content is undefined.
        on_statistics: Called with this rank's statistics when its load is complete.
        progress: Whether rank 0 shows its part on stderr, as `load_sharded` does.
        trace: File to write, given on all ranks: every block's life on the ranks of this node, for ui.perfetto.dev. Of several
            nodes each writes its own, with its number in the name; see docs/trace.md.
        as_dtensor: Device mesh of the `tp` ranks: results are DTensors on it, with the whole tensor's shape, Shard or Replicate.
            What cannot be said so is refused before it is read: fused tensors, interleaved parts, heads that ranks share.

    Returns:
        Every tensor that this rank holds, by the name of its result, complete; in order of names, so that ranks which go through
        theirs and call collectives, as `DTensor.full_tensor` does, meet in each.

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
        progress=progress,
        trace=trace,
        as_dtensor=as_dtensor,
    )
    with contextlib.closing(stream):
        return dict(sorted(stream, key=itemgetter(0)))


def stream_rank(
    uri: UrisLike,
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
    device: DeviceLike = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    node_memory_limit: int | str | None = None,
    settings: Settings | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    on_statistics: Callable[[RankStatistics], None] | None = None,
    progress: bool = False,
    trace: str | os.PathLike[str] | None = None,
    as_dtensor: DeviceMesh | None = None,
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
        local_world_size: Ranks on each node, numbered in a row; when unset, all of them, or what the launcher says.
        session: With `rank`: a name that the ranks of this load share and no other load on these machines uses.
        group: The torch.distributed process group whose ranks load, instead of `rank` and `world_size`; its default group when
            unset. Ranks are those of the group.
        device: "cpu"; "cuda", torch's current device; or "cuda:N"; as text or as a torch.device.
        concurrency: Reads in flight per rank; see `Settings`.
        memory_limit: Staging bytes per rank.
        node_memory_limit: Upper bound of staging bytes over all ranks of a node.
        settings: Every other knob, equal on all ranks; from the environment when unset. The three above win over it.
        out: Tensors of this rank by name, filled in place, of any strides; tensors not named are allocated. After an error their
            content is undefined.
        on_statistics: Called with this rank's statistics when its load is complete.
        progress: Whether rank 0 shows its part on stderr, as `load_sharded` does.
        trace: File to write, given on all ranks: every block's life on the ranks of this node, for ui.perfetto.dev. Of several
            nodes each writes its own, with its number in the name; see docs/trace.md.
        as_dtensor: Device mesh of the ranks whose DTensors results are.

    Returns:
        An iterator of (name of the result, tensor), each tensor once, in no particular order, and in another one on each rank: no
        collectives, such as `DTensor.full_tensor`, before the stream has ended.

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
    # Where the caller speaks: a relative path may be another one when the first tensor is taken.
    named = NamedCheckpoint.of(uri, settings)
    return RankStream(
        RankCall(
            uri=named.uri,
            sharding=sharding,
            # Ranks of a process group ask each other: not before the load begins.
            find_membership=partial(find_membership, rank, world_size, local_world_size, session, group),
            settings=named.settings,
            device=device,
            out=out,
            on_statistics=on_statistics,
            progress=progress,
            trace=trace,
            as_dtensor=as_dtensor,
        )
    )
