"""How does a driver load a checkpoint over a group of ranks? Everything checked, then Ray, then the ranks' own work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.api.arguments import SHARDING, Sharding
from ray_streamer.api.bootstrap import bootstrapped, find_bootstrap
from ray_streamer.api.frames import with_few_frames
from ray_streamer.api.node_trace import checked_output
from ray_streamer.cluster.phases import Phases
from ray_streamer.cluster.placement import PlacementOptions
from ray_streamer.cluster.preflight import Preflight
from ray_streamer.device import is_cuda
from ray_streamer.errors import SettingsError
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from ray_streamer.api.arguments import DeviceLike, StagesLike
    from ray_streamer.api.bootstrap import BootstrapLike
    from ray_streamer.cluster.model import ShardedModel
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


@with_few_frames
def load_sharded(
    uri: UrisLike,
    tp: int | None = SHARDING.tp,
    *,
    pp: StagesLike = SHARDING.pp,
    ep: int | bool = SHARDING.ep,
    replicas: int = 1,
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
    bootstrap: BootstrapLike | None = None,
    device: DeviceLike = "cpu",
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    node_memory_limit: int | str | None = None,
    settings: Settings | None = None,
    placement: PlacementOptions | None = None,
    address: str | None = None,
    wait: bool = True,
    on_progress: Callable[[list[RankStatistics | None]], None] | None = None,
    progress: bool = False,
    trace: str | os.PathLike[str] | None = None,
) -> ShardedModel:
    """Loads a safetensors checkpoint tensor-parallel into a group of Ray actors, each byte read once per node.

    Args:
        uri: Folder or prefix, one `.safetensors` file, or one index json: a path, of the caller's
            folder when it is relative and with `~` for homes, `file://`, `s3://`, `gs://`, `az://`, `https://`, `hf://` or
            `hdfs://`. Or a list of https addresses, the checkpoint's files. Https addresses may be signed; see docs/stores.md.
        tp: Ranks that share the tensors of one stage; 1 when unset.
        pp: Stages of layers, as even as can be; or the number of layers of each, such as (31, 30).
        ep: True = every rank of a replica holds whole experts, a `tp`-th of them, instead of slices of all; a number = over
            so many groups of ranks, see `Mesh`.
        replicas: Copies of the model; `tp * pp * replicas` ranks are started.
        rules: Glob of tensor names -> placement, before the preset that the checkpoint's config.json names.
        slices: Instead of rules, fuse, rename and dtype: a picklable callable (index, rank) -> `RankSlices`. `RuleSlices` is one;
            its mesh says tp, pp, ep and replicas where they are left out.
        unmatched: "error", or "replicate" for tensors of two or more dimensions without a rule.
        layout: Which preset: "generic" as Megatron-LM, "transformers" as its tensor-parallel plan, "vllm" as its layers hold
            their tensors; see docs/families.md.
        model_type: The model's type, where config.json names one that has no preset, such as an old architecture's new name.
        mtp: Whether the layers for multi-token prediction (MTP) are loaded, too.
        experts: With `ep`: the experts that each group holds, such as [[0, 1, 4], [2, 3, 4]], or such lists by layer; an
            expert may be in several.
        fuse: True = q, k and v projections land in one qkv_proj, gate and up in one gate_up_proj, where a model has them
            apart; or fused module's name -> names of its modules, in order.
        rename: Results' names: pairs of a regular expression and its replacement, applied in turn; or name -> name, picklable.
        dtype: "bfloat16", "float16", "float32" or "float64", or glob of names -> dtype: floating tensors of 16 bits and more are
            cast on their way in, by torch; tensors of quantized weights stay as they are.
        bootstrap: "transformers" = each rank holds its part of a ready model, and the handle has `generate` and `stream` too;
            a `TransformersBootstrap` says the class. Goes with tp, dtype and device only. See docs/transformers.md.
        device: Where the tensors go: "cpu", or "cuda", the GPU that Ray assigns to each rank; see `PlacementOptions`.
        concurrency: Reads in flight per rank; see `Settings`.
        memory_limit: Staging bytes per rank: N or text such as "512MiB" = at most N; 0 = the least that works; -1 = as much
            as the plan can use; unset = the smaller of 1 GiB and a quarter of the node's available memory over its ranks.
        node_memory_limit: Upper bound of staging bytes over all ranks of a node.
        settings: Every other knob; from the environment when unset. The three above win over it.
        placement: What each rank reserves, and where; a placement group of the caller's is one of its fields.
        address: Ray cluster; unset = the one this process is connected to, else RAY_ADDRESS, else a running one, else a
            local one, which stays until this process ends or calls `ray.shutdown()`. A process uses one Ray at a time: another
            address than that of a local one is an error, than that of a cluster a warning.
        wait: Whether to return only when every rank has its tensors; else see `ShardedModel.wait`.
        on_progress: Called about four times a second while ranks load, with every rank's statistics.
        progress: Whether the load is shown on stderr: a bar in a terminal or notebook, else a line every five seconds.
        trace: File to write when the model is loaded: every block's life on all ranks, for ui.perfetto.dev; see
            `ShardedModel.write_trace`.

    Returns:
        A handle on the ranks and their tensors; `shutdown` it, or use it as a context manager. With `bootstrap` a handle on the
            model, such as `TransformersModel`.

    Raises:
        SettingsError: An argument or environment variable cannot mean anything.
        DeviceError: This version knows no such `device`; where a rank has none, `RankFailedError` says so.
        BudgetError: The memory limit cannot work; names the smallest that would.
        CheckpointError: The checkpoint is malformed.
        ShardingError: A tensor has no rule, or cannot be cut over `tp` ranks; lists the sizes that would work.
        StorageError: There is no such checkpoint, or it may not be read.
        ClusterError: No cluster, or no room for the ranks.
        RankFailedError: A rank failed while loading; names it, its node and the cause. Nothing is left running then.
    """
    phases = Phases()
    ready = find_bootstrap(bootstrap)
    sharding = Sharding(
        tp=tp,
        pp=pp,
        ep=ep,
        replicas=replicas,
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
    )
    settings = Settings.of_call(
        settings, concurrency=concurrency, memory_limit=memory_limit, node_memory_limit=node_memory_limit
    )
    _check_kinds(placement, on_progress)
    request = bootstrapped(sharding, ready).request(uri, settings=settings, device=device)
    placement = (placement or PlacementOptions()).for_device(is_gpu=is_cuda(request.device))
    preflight = Preflight(request)
    preflight.check_request()
    trace_file = None if trace is None else checked_output(trace)
    phases.end("check")
    # Ray takes seconds to import: not before it is known that it is needed.
    from ray_streamer.cluster.driver import drive

    return drive(
        request,
        placement,
        preflight,
        phases,
        address=address,
        wait=wait,
        on_progress=on_progress,
        progress=progress,
        trace=trace_file,
        handle=None if ready is None else ready.handle(),
    )


def _check_kinds(placement: object, on_progress: object) -> None:
    """Refuses what would fail only when Ray has started."""
    if placement is not None and not isinstance(placement, PlacementOptions):
        raise SettingsError(f"placement is a ray_streamer.PlacementOptions, got {type(placement).__name__}")
    if on_progress is not None and not callable(on_progress):
        raise SettingsError(f"on_progress is a function, got {type(on_progress).__name__}")
