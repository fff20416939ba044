"""What would a load read? The plan, made in this process from headers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.api.arguments import SHARDING, Sharding
from ray_streamer.planning.limits import assumed_limits
from ray_streamer.planning.topology import Topology
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from ray_streamer.api.arguments import StagesLike
    from ray_streamer.planning.read_plan import ReadPlan
    from ray_streamer.sharding.cast import DTypeLike
    from ray_streamer.sharding.experts import ExpertsLike
    from ray_streamer.sharding.fuse import FuseLike
    from ray_streamer.sharding.groups import Unmatched
    from ray_streamer.sharding.presets import Layout
    from ray_streamer.sharding.rename import RenameLike
    from ray_streamer.sharding.rules import RulesLike
    from ray_streamer.slices import SliceSource
    from ray_streamer.storage import UrisLike


def plan(
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
    num_nodes: int = 1,
    concurrency: int | None = None,
    memory_limit: int | str | None = None,
    node_memory_limit: int | str | None = None,
    settings: Settings | None = None,
) -> ReadPlan:
    """Plans a load without loading; only headers are read, and Ray is not used.

    Args:
        uri: As in `load_sharded`, like every argument that is not named here.
        tp: Ranks that share the tensors of one stage; 1 when unset.
        pp: Stages.
        ep: Groups of experts.
        replicas: Copies of the model.
        rules: Placements by glob of names.
        slices: Who says what each rank holds, instead of rules.
        unmatched: What becomes of weights without a rule.
        layout: Which preset.
        model_type: The model's type, where config.json names one that has no preset, such as an old architecture's new name.
        mtp: Whether MTP layers are planned, too.
        experts: Experts of each group.
        fuse: Modules that share results.
        rename: Results' names.
        dtype: Results' dtypes.
        num_nodes: Nodes over which the ranks are packed in order.
        concurrency: Reads in flight per rank; see `Settings`.
        memory_limit: Staging bytes per rank. When unset, a node with enough memory is assumed.
        node_memory_limit: Upper bound of staging bytes over all ranks of a node.
        settings: Every other knob; from the environment when unset. The three above win over it.

    Returns:
        The plan; `plan.summary()` gives its figures.

    Raises:
        SettingsError: An argument cannot mean anything.
        BudgetError: The memory limit cannot work.
        CheckpointError: The checkpoint is malformed.
        ShardingError: A tensor has no rule, or cannot be cut.
        StorageError: There is no such checkpoint, or it may not be read.
        PlanError: The ranks cannot lie on that many nodes.
    """
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
    request = sharding.request(uri, settings=settings, device="cpu")
    topology = Topology.even(request.mesh.num_ranks, num_nodes)
    return request.plan(topology, memory_limits=assumed_limits(topology, settings))
