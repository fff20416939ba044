"""Where do the tensors of a known model family lie? Families as data, filled in from a checkpoint's config.json.

A family lists its linear modules and the role that each one plays; a role and the config's sizes give the placements of
the module's weight and bias. Names are those on disk, not those of the modules in memory, and may carry any prefix.
Tensors of one dimension that are not named here (norms, rotary frequencies) are replicated by `resolve_slices`.

Sources: transformers 5.23, the modules, tensor-parallel plans and checkpoint names of each family. Where its plan
gathers a fused projection (Phi-3) or cannot share key-value heads, the placement is that of vLLM 0.33.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.placement import Part, Placement, Replicate, Split, SplitVocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping


class Role(Enum):
    """What a linear module does with its input; weights are [outputs, inputs]."""

    QUERY = auto()
    KEY_VALUE = auto()
    FUSED_QKV = auto()
    ATTENTION_OUTPUT = auto()
    COLUMN_PARALLEL = auto()
    FUSED_GATE_UP = auto()
    ROW_PARALLEL = auto()
    VOCABULARY = auto()
    REPLICATED = auto()


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Attributes:
        modules: Glob of a module's name -> its role.
        towers: Globs of all tensors of other modalities' parts, which are replicated and come before `modules`.
        text_config: Key of the config that holds the language model's sizes; None when they are at the top.
        defaults: Sizes that the family's config.json may leave out.
    """

    modules: dict[str, Role]
    towers: tuple[str, ...] = ()
    text_config: str | None = None
    defaults: dict[str, int] = field(default_factory=dict[str, int])


_VOCABULARY = {"*embed_tokens": Role.VOCABULARY, "*lm_head": Role.VOCABULARY}
_ATTENTION = {
    "*.self_attn.q_proj": Role.QUERY,
    "*.self_attn.k_proj": Role.KEY_VALUE,
    "*.self_attn.v_proj": Role.KEY_VALUE,
    "*.self_attn.o_proj": Role.ATTENTION_OUTPUT,
}
_MLP = {
    "*.mlp.gate_proj": Role.COLUMN_PARALLEL,
    "*.mlp.up_proj": Role.COLUMN_PARALLEL,
    "*.mlp.down_proj": Role.ROW_PARALLEL,
}
_LLAMA = Family(_VOCABULARY | _ATTENTION | _MLP)
_GEMMA3_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": Family(_LLAMA.modules, defaults=_GEMMA3_DEFAULTS),
    "gemma3": Family(
        _LLAMA.modules,
        towers=("*vision_tower.*", "*multi_modal_projector.*"),
        text_config="text_config",
        defaults=_GEMMA3_DEFAULTS,
    ),
    "phi3": Family(
        _VOCABULARY
        | {
            "*.self_attn.qkv_proj": Role.FUSED_QKV,
            "*.self_attn.o_proj": Role.ATTENTION_OUTPUT,
            "*.mlp.gate_up_proj": Role.FUSED_GATE_UP,
            "*.mlp.down_proj": Role.ROW_PARALLEL,
        }
    ),
    "mixtral": Family(
        _VOCABULARY
        | _ATTENTION
        | {
            "*.block_sparse_moe.gate": Role.REPLICATED,
            "*.block_sparse_moe.experts.*.w1": Role.COLUMN_PARALLEL,
            "*.block_sparse_moe.experts.*.w3": Role.COLUMN_PARALLEL,
            "*.block_sparse_moe.experts.*.w2": Role.ROW_PARALLEL,
        }
    ),
    "qwen3_moe": Family(
        _LLAMA.modules
        | {
            "*.mlp.gate": Role.REPLICATED,
            "*.mlp.experts.*.gate_proj": Role.COLUMN_PARALLEL,
            "*.mlp.experts.*.up_proj": Role.COLUMN_PARALLEL,
            "*.mlp.experts.*.down_proj": Role.ROW_PARALLEL,
        }
    ),
}
"""Model type, as config.json spells it -> family."""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of the model that `config`, a parsed config.json, describes; None when there is no preset for it."""
    model_type = config.get("model_type")
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def preset_for(config: Mapping[str, Any]) -> list[tuple[str, Placement]]:
    """Globs and placements for the model that `config`, a parsed config.json, describes.

    Raises:
        ShardingError: The config's model type is not among `FAMILIES`, or a size is missing.
    """
    family = family_of(config)
    if family is None:
        raise ShardingError(
            f"no preset for model_type {config.get('model_type')!r} of config.json; known are "
            f"{', '.join(sorted(FAMILIES))}. Give rules of your own, for example "
            'rules={"*.q_proj.weight": Split(0), "*.o_proj.weight": Split(1)}'
        )
    sizes = _Sizes(family, config)
    rules: list[tuple[str, Placement]] = [(glob, Replicate()) for glob in family.towers]
    for module, role in family.modules.items():
        weight, bias = _weight_and_bias(role, sizes)
        rules += [(f"{module}.weight", weight), (f"{module}.bias", bias)]
    return rules


class _Sizes:
    """The sizes that placements need, looked up when asked for: in the config, else in the family's defaults."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        text = config.get(family.text_config, {}) if family.text_config else config
        given = {key: value for key, value in text.items() if value is not None}
        self._values = {**family.defaults, **given}
        self._model_type = config["model_type"]

    def _size(self, key: str) -> int:
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ShardingError(f"config.json of a {self._model_type} model needs a number for {key}, got {value!r}")
        return value

    @property
    def heads(self) -> int:
        return self._size("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        return self._size("num_key_value_heads") if "num_key_value_heads" in self._values else self.heads

    @property
    def head_dim(self) -> int:
        return self._size("head_dim") if "head_dim" in self._values else self._size("hidden_size") // self.heads

    @property
    def intermediate(self) -> int:
        return self._size("intermediate_size")


def _weight_and_bias(role: Role, sizes: _Sizes) -> tuple[Placement, Placement]:
    if role is Role.ROW_PARALLEL:
        return Split(1), Replicate()
    if role is Role.ATTENTION_OUTPUT:
        return Split(1, heads=sizes.heads), Replicate()
    outputs = _along_outputs(role, sizes)
    return outputs, outputs


def _along_outputs(role: Role, sizes: _Sizes) -> Placement:
    match role:
        case Role.QUERY:
            return Split(0, heads=sizes.heads)
        case Role.KEY_VALUE:
            return Split(0, kv_heads=sizes.kv_heads)
        case Role.FUSED_QKV:
            query = Part(sizes.heads * sizes.head_dim, heads=sizes.heads)
            key_or_value = Part(sizes.kv_heads * sizes.head_dim, kv_heads=sizes.kv_heads)
            return Split(0, parts=(query, key_or_value, key_or_value))
        case Role.FUSED_GATE_UP:
            return Split(0, parts=(sizes.intermediate, sizes.intermediate))
        case Role.VOCABULARY:
            return SplitVocabulary()
        case Role.REPLICATED:
            return Replicate()
        case _:
            return Split(0)
