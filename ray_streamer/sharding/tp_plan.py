"""What do the styles of a transformers tensor-parallel plan mean for the tensors of a checkpoint?

A plan maps names of modules or parameters, layer numbers written as `*`, to styles: `config.base_model_tp_plan`, whose
names are relative to the base model, or `model.tp_plan` of a model that was made on the meta device, which also speaks
of embeddings and head. A style says along which dimension `DTensor` shards a weight; here that is a placement.

Source: `transformers/distributed/tensor_parallel.py` of version 5.23, `ALL_PARALLEL_STYLES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.placement import Placement, Replicate, Split

if TYPE_CHECKING:
    from collections.abc import Iterator

_COLUMNS = (Split(-2, unit=1), Split(-1, unit=1))
_ROWS = (Split(-1, unit=1), Replicate())
_WHOLE = (Replicate(), Replicate())
_WEIGHT_AND_BIAS: dict[str, tuple[Placement, Placement]] = {
    "colwise": _COLUMNS,
    "colwise_gather_output": _COLUMNS,
    "colwise_rep": _COLUMNS,
    "rowwise": _ROWS,
    "rowwise_split_input": _ROWS,
    "rowwise_rep": _ROWS,
    "packed_colwise": (Split(-2, num_parts=2, unit=1), Split(-1, num_parts=2, unit=1)),
    "packed_rowwise": (Split(-1, num_parts=2, unit=1), Replicate()),
    "embedding_rowwise": (Split(0, unit=1), Replicate()),
    "embedding_colwise": (Split(1, unit=1), Replicate()),
    "grouped_gemm": (Split(0, unit=1), Split(0, unit=1)),
    "mla_kv_a_proj": _WHOLE,
    "replicated_with_grad_allreduce": _WHOLE,
    "replicate": _WHOLE,
    "sequence_parallel": _WHOLE,
}
_OF_FORWARD_ONLY = {"moe_tp_experts", "moe_identity_expert", "all_reduce", "local_params", "ep_dispatch_experts"}
"""Styles of modules that hold others: they shard nothing, and say nothing of what is inside."""

_SINGLE_EXPERTS: dict[tuple[str, str], tuple[tuple[str, ...], Placement]] = {
    ("gate_up_proj", "packed_colwise"): (("gate_proj", "up_proj"), Split(0, unit=1)),
    ("down_proj", "rowwise"): (("down_proj",), Split(1, unit=1)),
}
"""Stacked experts in memory, which checkpoints hold one by one: parameter and style -> modules on disk, and their weights'."""


def rules_of_plan(plan: Mapping[str, Any]) -> list[tuple[str, Placement]]:
    """Globs and placements for the tensors that a plan speaks of.

    Raises:
        ShardingError: It is no plan, or has a style that is not known; names both.
    """
    if not isinstance(plan, Mapping) or not plan:
        raise ShardingError(f"a plan maps names of modules to styles, such as model.tp_plan, got {plan!r}")
    unknown = {name: style for name, style in plan.items() if style not in {*_WEIGHT_AND_BIAS, *_OF_FORWARD_ONLY}}
    if unknown:
        raise ShardingError(
            f"unknown styles in the tensor-parallel plan: {', '.join(f'{n}: {s!r}' for n, s in unknown.items())}; known "
            f"are {', '.join(sorted({*_WEIGHT_AND_BIAS, *_OF_FORWARD_ONLY}))}. Give rules for these tensors instead"
        )
    return [rule for name, style in plan.items() if style in _WEIGHT_AND_BIAS for rule in _rules_of(name, style)]


def _rules_of(name: str, style: str) -> Iterator[tuple[str, Placement]]:
    weight, bias = _WEIGHT_AND_BIAS[style]
    # The name may be a module's or a parameter's own, and the checkpoint's names may carry a prefix.
    yield f"*{name}.weight", weight
    yield f"*{name}.bias", bias
    yield f"*{name}", weight
    experts, _, parameter = name.rpartition(".")
    modules, placement = _SINGLE_EXPERTS.get((parameter, style), ((), weight))
    for module in modules if experts.endswith("experts") else ():
        yield f"*{experts}.*.{module}.weight", placement
