"""Where do the tensors of a known model family lie? A family's names and roles, made placements by the sizes in config.json.

Names are those on disk, not those of the modules in memory, and may carry any prefix. Tensors of one dimension that no
family names (norms, rotary frequencies) are replicated by `RuleSlices`.

A layout is what the tensors are for. All differences between layouts are in this module, and in what a family says of
transformers:

- generic: the conventions of Megatron-LM. Whole heads, key-value heads shared when there are fewer than ranks, fused
  projections cut part by part; only the vocabulary may be cut unevenly.
- transformers: its tensor-parallel plan, version 5.23, as far as a family has one. Uneven dimensions are cut as
  `torch.chunk` does, key-value heads are never shared, and what the plan does not name is replicated.
- vllm: generic, with the vocabulary padded to a multiple of 64, and projections in which heads take turns sorted into
  queries, keys and values, as the layers of vLLM 0.32 expect them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.families import RENAMED, Family, Meaning, Role, Weight, family_or_refuse
from ray_streamer.sharding.part import Part
from ray_streamer.sharding.placement import Placement, Replicate, Skip, Split, SplitGroups, SplitVocabulary
from ray_streamer.sharding.sizes import Sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Layout = Literal["generic", "transformers", "vllm"]

DEFAULT_LAYOUT: Layout = "generic"

VLLM_VOCABULARY_MULTIPLE = 64
"""`DEFAULT_VOCAB_PADDING_SIZE` of vLLM 0.32."""

_Rules = list[tuple[str, Placement]]


def preset_for(config: Mapping[str, Any], *, layout: Layout, mtp: bool) -> _Rules:
    """Globs and placements for the model that `config`, a parsed config.json, describes.

    Args:
        config: Needs `model_type` and the sizes that its family splits by.
        layout: What the tensors are for.
        mtp: Whether the layers for multi-token prediction (MTP) are loaded, too.

    Raises:
        ShardingError: The config's model type is not among `FAMILIES`, transformers has no plan for it, or a size is
            missing.
    """
    family = family_or_refuse(config)
    if layout == "transformers" and (family.transformers is None or config["model_type"] in RENAMED):
        raise ShardingError(
            f"transformers has no tensor-parallel plan for {config['model_type']} models that is known here; "
            'use layout="generic", or give rules of your own, such as ShardRules.from_tp_plan(config.base_model_tp_plan)'
        )
    sizes = Sizes(family, config)
    return [
        *((glob, Skip()) for glob in family.skipped),
        *(() if mtp else _without_mtp(family, sizes)),
        *(_tensors(family.transformers or {}, sizes, layout) if layout == "transformers" else ()),
        *((glob, Replicate()) for glob in family.towers),
        *_tensors(family.tensors, sizes, layout),
        *_modules(family, sizes, layout),
    ]


def _without_mtp(family: Family, sizes: Sizes) -> Iterator[tuple[str, Placement]]:
    for glob in family.mtp:
        yield glob, Skip()
    for number in range(sizes.layers, sizes.layers + sizes.mtp_layers) if family.num_mtp_layers else ():
        yield f"*{family.layers}.{number}.*", Skip()


def _tensors(meanings: Mapping[str, Meaning], sizes: Sizes, layout: Layout) -> Iterator[tuple[str, Placement]]:
    for glob, meaning in meanings.items():
        yield glob, _placement(_weight(meaning), sizes, layout)


def _modules(family: Family, sizes: Sizes, layout: Layout) -> Iterator[tuple[str, Placement]]:
    for glob, meaning in family.modules.items():
        weight = _weight(meaning)
        if weight.role is Role.KEY_VALUE:
            yield from _other_key_values(family, glob, sizes, layout)
        yield f"{glob}.weight", _placement(weight, sizes, layout)
        yield f"{glob}.bias", _bias(weight, sizes, layout)


def _other_key_values(family: Family, glob: str, sizes: Sizes, layout: Layout) -> Iterator[tuple[str, Placement]]:
    """Rules for single layers that have another number of key-value heads than the rest."""
    for number, kv_heads in sizes.other_kv_heads.items():
        for kind in ("weight", "bias"):
            yield f"*{family.layers}.{number}{glob.removeprefix('*')}.{kind}", _key_value(kv_heads, 0, layout)


def _weight(meaning: Meaning) -> Weight:
    return meaning if isinstance(meaning, Weight) else Weight(meaning)


def _bias(weight: Weight, sizes: Sizes, layout: Layout) -> Placement:
    """A bias has the weight's outputs; those of an input-parallel module are added once, by whoever runs the model."""
    if weight.role in (Role.ROW_PARALLEL, Role.ATTENTION_OUTPUT, Role.LINEAR_OUTPUT):
        return Replicate()
    return _placement(Weight(weight.role), sizes, layout)


def _placement(weight: Weight, sizes: Sizes, layout: Layout) -> Placement:
    match weight.role:
        case Role.REPLICATED:
            return Replicate()
        case Role.VOCABULARY:
            return SplitVocabulary(pad_to=VLLM_VOCABULARY_MULTIPLE if layout == "vllm" else None)
        case Role.ROW_PARALLEL:
            return Split(weight.inputs, unit=_unit(weight, layout))
        case Role.ATTENTION_OUTPUT:
            return Split(weight.inputs, heads=sizes.heads)
        case Role.LINEAR_OUTPUT:
            return Split(weight.inputs, heads=sizes.linear_value_heads)
        case _:
            return _along_outputs(weight, sizes, layout)


def _along_outputs(weight: Weight, sizes: Sizes, layout: Layout) -> Placement:
    dim = weight.outputs
    match weight.role:
        case Role.QUERY:
            return Split(dim, heads=sizes.heads)
        case Role.KEY_VALUE:
            return _key_value(sizes.kv_heads, dim, layout)
        case Role.FUSED_QKV:
            key_or_value = Part(sizes.kv_heads * sizes.head_dim, kv_heads=sizes.kv_heads)
            return Split(dim, parts=(Part(sizes.heads * sizes.head_dim, heads=sizes.heads), key_or_value, key_or_value))
        case Role.GROUPED_QKV:
            return _grouped(sizes, dim, layout)
        case Role.FUSED_GATE_UP:
            return Split(dim, num_parts=2, unit=_unit(weight, layout))
        case Role.LINEAR_KEY_GROUPS:
            return Split(dim, heads=sizes.linear_key_heads)
        case Role.LINEAR_VALUES:
            return Split(dim, heads=sizes.linear_value_heads)
        case Role.LINEAR_FUSED_QKV:
            key = Part(sizes.linear_key_size, heads=sizes.linear_key_heads)
            return Split(dim, parts=(key, key, Part(sizes.linear_value_size, heads=sizes.linear_value_heads)))
        case Role.CONTIGUOUS:
            return Split(dim, unit=1)
        case _:
            return Split(dim, unit=_unit(weight, layout))


def _unit(weight: Weight, layout: Layout) -> int | None:
    return 1 if weight.unit is None and layout == "transformers" else weight.unit


def _key_value(kv_heads: int, dim: int, layout: Layout) -> Placement:
    # transformers cuts through the middle of heads when there are fewer than ranks, and then cannot run the model.
    return Split(dim, heads=kv_heads) if layout == "transformers" else Split(dim, kv_heads=kv_heads)


def _grouped(sizes: Sizes, dim: int, layout: Layout) -> Placement:
    num_queries = sizes.heads // sizes.qkv_groups
    key_or_value = Part(sizes.head_dim, kv_heads=1)
    queries = Part(num_queries * sizes.head_dim, heads=num_queries)
    parts = (queries, key_or_value, key_or_value)
    return SplitGroups(dim, groups=sizes.qkv_groups, parts=parts, apart=layout == "vllm")
