"""How large is a model? What a config.json says of heads, layers and experts, whatever it calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import ShardingError
from ray_streamer.wording import brief

if TYPE_CHECKING:
    from ray_streamer.sharding.families import Family

_OTHER_NAMES = {
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "hidden_size": ("n_embd", "n_embed"),
}
"""What older configs call a size."""

_LAYER_NUMBER = re.compile(r"[0-9]{1,9}")

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096
MAX_MTP_LAYERS = 64
MAX_EXPERTS = 1 << 16
"""What is done for each layer or expert that a config.json claims is bounded by these; models have a hundredth of it."""


class Sizes:
    """The sizes of one model, looked up when asked for: in its config, else in its family's defaults.

    Args:
        family: Says where in the config they are, and what it may leave out.
        config: A parsed config.json with a `model_type`.

    Raises:
        ShardingError: By every property: the config does not say, or not as a number of at least 1 that a model can have.
    """

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self._model_type = config["model_type"]
        self._family = family
        text = self._object(family.text_config, config.get(family.text_config)) if family.text_config else config
        self._tied_above = config.get("tie_word_embeddings")
        self._values = {**family.defaults, **{key: value for key, value in text.items() if value is not None}}

    def _object(self, key: str, value: Any) -> Mapping[str, Any]:
        if value is not None and not isinstance(value, Mapping):
            raise ShardingError(
                f"config.json of a {self._model_type} model needs an object for {key}, got {brief(value)}"
            )
        return value or {}

    def _value(self, key: str) -> Any:
        return next((self._values[name] for name in (key, *_OTHER_NAMES.get(key, ())) if name in self._values), None)

    def _size(self, key: str, *, least: int = 1, largest: int = MAX_SIZE) -> int:
        return self._count(key, self._value(key), least=least, largest=largest)

    def _count(self, key: str, value: Any, *, least: int = 1, largest: int = MAX_SIZE) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= largest:
            raise ShardingError(
                f"config.json of a {self._model_type} model needs a number for {key}, got {brief(value)}; a model has {least} to {largest}"
            )
        return value

    @property
    def says_tied(self) -> bool | None:
        """Whether the embedding is the head, too; None where the config does not say."""
        said = self._values.get("tie_word_embeddings", self._tied_above)
        return said if isinstance(said, bool) else None

    @property
    def says_layers(self) -> bool:
        """Whether the config has something for the number of layers."""
        return self._value("num_hidden_layers") is not None

    @property
    def layers(self) -> int:
        """Layers of the model itself; 0 where a checkpoint has only what is around them."""
        return self._size("num_hidden_layers", least=0, largest=MAX_LAYERS)

    @property
    def mtp_layers(self) -> int:
        """Layers for multi-token prediction, numbered on after the model's own; 1 where such a config does not say."""
        key = self._family.num_mtp_layers
        if key is None or self._value(key) == 0:
            return 0
        return 1 if self._value(key) is None else self._size(key, largest=MAX_MTP_LAYERS)

    @property
    def experts(self) -> int:
        """Routed experts of a layer that has any; 0 when there are none."""
        key = next((key for key in self._family.num_experts if self._value(key) is not None), None)
        return self._size(key, largest=MAX_EXPERTS) if key else 0

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self._size("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.heads if self._value("num_key_value_heads") is None else self._size("num_key_value_heads")

    @property
    def other_kv_heads(self) -> dict[int, int]:
        """Number of a layer -> its key-value heads, for layers that have not `kv_heads` of them, as in Gemma 4."""
        if sizes_of := self._object("per_layer_config", self._values.get("per_layer_config")):
            limit = self.layers if self.says_layers else MAX_LAYERS
            if not all(_LAYER_NUMBER.fullmatch(number) and int(number) < limit for number in sizes_of):
                raise ShardingError(
                    f"per_layer_config of config.json needs numbers of layers, got {brief(sorted(sizes_of))}; the model has {limit}"
                )
            heads = {n: self._object(f"layer {n}", sizes).get("num_key_value_heads") for n, sizes in sizes_of.items()}
            return {
                int(number): self._count(f"num_key_value_heads of layer {number}", count)
                for number, count in heads.items()
                if count is not None
            }
        if not self._values.get("attention_k_eq_v") or "num_global_key_value_heads" not in self._values:
            return {}
        kinds = self._values.get("layer_types", ())
        if not isinstance(kinds, list | tuple) or len(kinds) > self.layers:
            raise ShardingError(
                f"config.json of a {self._model_type} model needs a list of {self.layers} kinds for layer_types, "
                f"got {brief(kinds)}"
            )
        heads = self._size("num_global_key_value_heads")
        return {number: heads for number, kind in enumerate(kinds) if kind == "full_attention"}

    @property
    def head_dim(self) -> int:
        """Indices of an attention head."""
        return self._size("hidden_size") // self.heads if self._value("head_dim") is None else self._size("head_dim")

    @property
    def qkv_groups(self) -> int:
        """Groups of a projection in which heads take turns: each has one key-value head."""
        if self._values.get("new_decoder_architecture"):
            return self.kv_heads
        return 1 if self._values.get("multi_query") else self.heads

    @property
    def linear_key_heads(self) -> int:
        """Key heads of linear attention."""
        return self._size("linear_num_key_heads")

    @property
    def linear_value_heads(self) -> int:
        """Value heads of linear attention."""
        return self._size("linear_num_value_heads")

    @property
    def linear_key_size(self) -> int:
        """Indices of all keys of linear attention."""
        return self.linear_key_heads * self._size("linear_key_head_dim")

    @property
    def linear_value_size(self) -> int:
        """Indices of all values of linear attention."""
        return self.linear_value_heads * self._size("linear_value_head_dim")
