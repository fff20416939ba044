"""The families themselves, by the model type that config.json spells."""

from __future__ import annotations

from ray_streamer.sharding.families.family import Family, Role

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
_LLAMA = _VOCABULARY | _ATTENTION | _MLP
_GEMMA3_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}

FAMILIES: dict[str, Family] = {
    "llama": Family(modules=_LLAMA),
    "mistral": Family(modules=_LLAMA),
    "qwen2": Family(modules=_LLAMA),
    "qwen3": Family(modules=_LLAMA),
    "gemma2": Family(modules=_LLAMA),
    "gemma3_text": Family(modules=_LLAMA, defaults=_GEMMA3_DEFAULTS),
    "gemma3": Family(
        modules=_LLAMA,
        towers=("*vision_tower.*", "*multi_modal_projector.*"),
        text_config="text_config",
        defaults=_GEMMA3_DEFAULTS,
    ),
    "phi3": Family(
        modules=_VOCABULARY
        | {
            "*.self_attn.qkv_proj": Role.FUSED_QKV,
            "*.self_attn.o_proj": Role.ATTENTION_OUTPUT,
            "*.mlp.gate_up_proj": Role.FUSED_GATE_UP,
            "*.mlp.down_proj": Role.ROW_PARALLEL,
        }
    ),
    "mixtral": Family(
        modules=_VOCABULARY
        | _ATTENTION
        | {
            "*.block_sparse_moe.gate": Role.REPLICATED,
            "*.block_sparse_moe.experts.*.w1": Role.COLUMN_PARALLEL,
            "*.block_sparse_moe.experts.*.w3": Role.COLUMN_PARALLEL,
            "*.block_sparse_moe.experts.*.w2": Role.ROW_PARALLEL,
        },
        num_experts=("num_local_experts",),
    ),
    "qwen3_moe": Family(
        modules=_LLAMA
        | {
            "*.mlp.gate": Role.REPLICATED,
            "*.mlp.experts.*.gate_proj": Role.COLUMN_PARALLEL,
            "*.mlp.experts.*.up_proj": Role.COLUMN_PARALLEL,
            "*.mlp.experts.*.down_proj": Role.ROW_PARALLEL,
        },
        num_experts=("num_experts", "num_local_experts"),
    ),
}
"""Model type, as config.json spells it -> family."""
