"""Which tensors do real models have? Lists with the names that are on disk, each with a fitting `config.json`.

Counts and sizes agree with the published checkpoints: Llama-3-70B has 723 tensors, Mixtral-8x7B 995, DeepSeek-V3
91,991.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_streamer.dtypes import dtype_named

if TYPE_CHECKING:
    from collections.abc import Iterator

_FP8_BLOCK = 128


class TensorSpec(NamedTuple):
    """One tensor to write: its name, safetensors dtype and logical shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * dtype_named(self.dtype).num_bits // 8


class ModelLayout(NamedTuple):
    """All tensors of one model, in the order of its modules, and its `config.json`."""

    tensors: list[TensorSpec]
    config: dict[str, Any]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


class _Decoder(NamedTuple):
    """The sizes that all decoders with grouped-query attention share."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    dtype: str
    tied: bool
    has_head_norms: bool = False

    def weight(self, module: str, *shape: int) -> TensorSpec:
        return TensorSpec(f"{module}.weight", self.dtype, shape)

    def attention(self, layer: str) -> Iterator[TensorSpec]:
        attention = f"{layer}.self_attn"
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield self.weight(f"{attention}.q_proj", query, self.hidden)
        yield self.weight(f"{attention}.k_proj", key, self.hidden)
        yield self.weight(f"{attention}.v_proj", key, self.hidden)
        yield self.weight(f"{attention}.o_proj", self.hidden, query)
        if self.has_head_norms:
            yield self.weight(f"{attention}.q_norm", self.head_dim)
            yield self.weight(f"{attention}.k_norm", self.head_dim)

    def swiglu(self, module: str, intermediate: int, names: tuple[str, str, str] | None = None) -> Iterator[TensorSpec]:
        gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
        yield self.weight(f"{module}.{gate}", intermediate, self.hidden)
        yield self.weight(f"{module}.{up}", intermediate, self.hidden)
        yield self.weight(f"{module}.{down}", self.hidden, intermediate)

    def norms(self, layer: str) -> Iterator[TensorSpec]:
        yield self.weight(f"{layer}.input_layernorm", self.hidden)
        yield self.weight(f"{layer}.post_attention_layernorm", self.hidden)

    def dense_blocks(self, intermediate: int) -> list[list[TensorSpec]]:
        """Layers of attention and one SwiGLU."""
        return [
            [*self.attention(layer), *self.swiglu(f"{layer}.mlp", intermediate), *self.norms(layer)]
            for layer in _layer_names(self.layers)
        ]

    def model(self, blocks: list[list[TensorSpec]], config: dict[str, Any]) -> ModelLayout:
        """Embedding, `blocks`, final norm and head, and a config with the shared keys."""
        tensors = [self.weight("model.embed_tokens", self.vocab, self.hidden)]
        tensors += [spec for block in blocks for spec in block]
        tensors.append(self.weight("model.norm", self.hidden))
        if not self.tied:
            tensors.append(self.weight("lm_head", self.vocab, self.hidden))
        shared = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "torch_dtype": dtype_named(self.dtype).torch_name,
        }
        return ModelLayout(tensors, shared | config)


def llama_layout(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    dtype: str = "BF16",
    *,
    tied: bool = False,
) -> ModelLayout:
    """Llama: grouped-query attention, dense SwiGLU. Sizes of Llama-3-70B: 8192, 80, 64, 8, 28672, 128256."""
    decoder = _Decoder(hidden, layers, heads, kv_heads, hidden // heads, vocab, dtype, tied)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": intermediate}
    return decoder.model(decoder.dense_blocks(intermediate), config)


def qwen3_layout(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    dtype: str = "BF16",
    *,
    head_dim: int = 128,
) -> ModelLayout:
    """Qwen3: as Llama, with norms on q and k, and heads wider than hidden / heads. 32B: 5120, 64, 64, 8, 25600, 151936."""
    decoder = _Decoder(hidden, layers, heads, kv_heads, head_dim, vocab, dtype, False, has_head_norms=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": head_dim,
        "intermediate_size": intermediate,
    }
    return decoder.model(decoder.dense_blocks(intermediate), config)


def phi3_layout(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, dtype: str = "BF16"
) -> ModelLayout:
    """Phi-3: as Llama, but q, k, v are one fused tensor, and so are gate and up."""
    decoder = _Decoder(hidden, layers, heads, kv_heads, hidden // heads, vocab, dtype, False)
    qkv_rows = (heads + 2 * kv_heads) * decoder.head_dim
    blocks = [
        [
            decoder.weight(f"{layer}.self_attn.qkv_proj", qkv_rows, hidden),
            decoder.weight(f"{layer}.self_attn.o_proj", hidden, heads * decoder.head_dim),
            decoder.weight(f"{layer}.mlp.gate_up_proj", 2 * intermediate, hidden),
            decoder.weight(f"{layer}.mlp.down_proj", hidden, intermediate),
            *decoder.norms(layer),
        ]
        for layer in _layer_names(layers)
    ]
    config = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "intermediate_size": intermediate}
    return decoder.model(blocks, config)


def mixtral_layout(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    dtype: str = "BF16",
    *,
    experts: int = 8,
) -> ModelLayout:
    """Mixtral: sparse experts with the names w1 (gate), w3 (up), w2 (down). 8x7B: 4096, 32, 32, 8, 14336, 32000."""
    decoder = _Decoder(hidden, layers, heads, kv_heads, hidden // heads, vocab, dtype, False)
    blocks: list[list[TensorSpec]] = []
    for layer in _layer_names(layers):
        moe = f"{layer}.block_sparse_moe"
        block = [*decoder.attention(layer), decoder.weight(f"{moe}.gate", experts, hidden)]
        for expert in range(experts):
            block += decoder.swiglu(f"{moe}.experts.{expert}", intermediate, ("w1", "w3", "w2"))
        blocks.append([*block, *decoder.norms(layer)])
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": intermediate,
        "num_local_experts": experts,
    }
    return decoder.model(blocks, config)


def qwen3_moe_layout(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    moe_intermediate: int,
    vocab: int,
    dtype: str = "BF16",
    *,
    experts: int = 128,
    head_dim: int = 128,
) -> ModelLayout:
    """Qwen3-MoE: norms on q and k, heads wider than hidden / heads. 30B-A3B: 2048, 48, 32, 4, 768, 151936."""
    decoder = _Decoder(hidden, layers, heads, kv_heads, head_dim, vocab, dtype, False, has_head_norms=True)
    blocks: list[list[TensorSpec]] = []
    for layer in _layer_names(layers):
        block = [
            *decoder.attention(layer),
            decoder.weight(f"{layer}.mlp.gate", experts, hidden),
        ]
        for expert in range(experts):
            block += decoder.swiglu(f"{layer}.mlp.experts.{expert}", moe_intermediate)
        blocks.append([*block, *decoder.norms(layer)])
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": head_dim,
        "moe_intermediate_size": moe_intermediate,
        "num_experts": experts,
    }
    return decoder.model(blocks, config)


def deepseek_v3_layout() -> ModelLayout:
    """DeepSeek-V3 as published: 91,991 tensors, 688.6 GB, FP8 with block scales, layer 61 for the second token (MTP)."""
    tensors = [TensorSpec("model.embed_tokens.weight", "BF16", (129280, 7168))]
    for number in range(62):
        tensors += _deepseek_layer(f"model.layers.{number}", is_dense=number < 3)
    mtp = "model.layers.61"
    tensors += [
        TensorSpec(f"{mtp}.embed_tokens.weight", "BF16", (129280, 7168)),
        TensorSpec(f"{mtp}.enorm.weight", "BF16", (7168,)),
        TensorSpec(f"{mtp}.hnorm.weight", "BF16", (7168,)),
        TensorSpec(f"{mtp}.eh_proj.weight", "BF16", (7168, 2 * 7168)),
        TensorSpec(f"{mtp}.shared_head.norm.weight", "BF16", (7168,)),
        TensorSpec(f"{mtp}.shared_head.head.weight", "BF16", (129280, 7168)),
        TensorSpec("model.norm.weight", "BF16", (7168,)),
        TensorSpec("lm_head.weight", "BF16", (129280, 7168)),
    ]
    return ModelLayout(tensors, dict(_DEEPSEEK_V3_CONFIG))


_DEEPSEEK_V3_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK]},
}


def _deepseek_layer(layer: str, *, is_dense: bool) -> Iterator[TensorSpec]:
    attention = f"{layer}.self_attn"
    yield from _fp8_weight(f"{attention}.q_a_proj", 1536, 7168)
    yield TensorSpec(f"{attention}.q_a_layernorm.weight", "BF16", (1536,))
    yield from _fp8_weight(f"{attention}.q_b_proj", 128 * (128 + 64), 1536)
    yield from _fp8_weight(f"{attention}.kv_a_proj_with_mqa", 512 + 64, 7168)
    yield TensorSpec(f"{attention}.kv_a_layernorm.weight", "BF16", (512,))
    yield from _fp8_weight(f"{attention}.kv_b_proj", 128 * (128 + 128), 512)
    yield from _fp8_weight(f"{attention}.o_proj", 7168, 128 * 128)
    if is_dense:
        yield from _fp8_swiglu(f"{layer}.mlp", 18432)
    else:
        yield TensorSpec(f"{layer}.mlp.gate.weight", "BF16", (256, 7168))
        yield TensorSpec(f"{layer}.mlp.gate.e_score_correction_bias", "F32", (256,))
        yield from _fp8_swiglu(f"{layer}.mlp.shared_experts", 2048)
        for expert in range(256):
            yield from _fp8_swiglu(f"{layer}.mlp.experts.{expert}", 2048)
    yield TensorSpec(f"{layer}.input_layernorm.weight", "BF16", (7168,))
    yield TensorSpec(f"{layer}.post_attention_layernorm.weight", "BF16", (7168,))


def _fp8_swiglu(module: str, intermediate: int) -> Iterator[TensorSpec]:
    yield from _fp8_weight(f"{module}.gate_proj", intermediate, 7168)
    yield from _fp8_weight(f"{module}.up_proj", intermediate, 7168)
    yield from _fp8_weight(f"{module}.down_proj", 7168, intermediate)


def _fp8_weight(module: str, rows: int, columns: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{module}.weight", "F8_E4M3", (rows, columns))
    scale_shape = (math.ceil(rows / _FP8_BLOCK), math.ceil(columns / _FP8_BLOCK))
    yield TensorSpec(f"{module}.weight_scale_inv", "F32", scale_shape)


def _layer_names(layers: int) -> Iterator[str]:
    return (f"model.layers.{number}" for number in range(layers))
