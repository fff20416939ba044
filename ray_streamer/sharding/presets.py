"""Where do the tensors of a known model family lie? A family's roles, made placements by the sizes in config.json.

A role and the config's sizes give the placements of a module's weight and bias. Names are those on disk, not those of
the modules in memory, and may carry any prefix. Tensors of one dimension that no family names (norms, rotary
frequencies) are replicated by `resolve_slices`.

Where the tensor-parallel plan of transformers 5.23 gathers a fused projection (Phi-3) or cannot share key-value heads,
the placement is that of vLLM 0.33.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.families import Family, Role, family_or_refuse
from ray_streamer.sharding.placement import Part, Placement, Replicate, Split, SplitVocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping


def preset_for(config: Mapping[str, Any]) -> list[tuple[str, Placement]]:
    """Globs and placements for the model that `config`, a parsed config.json, describes.

    Raises:
        ShardingError: The config's model type is not among `FAMILIES`, or a size is missing.
    """
    family = family_or_refuse(config)
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
