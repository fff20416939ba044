"""Families without experts, whose modules are named as Llama's are or nearly so."""

from __future__ import annotations

from ray_streamer.sharding.families.family import Family, Meaning, Role, Weight

VOCABULARY: dict[str, Meaning] = {"*embed_tokens": Role.VOCABULARY, "*lm_head": Role.VOCABULARY}
ATTENTION: dict[str, Meaning] = {
    "*.self_attn.q_proj": Role.QUERY,
    "*.self_attn.k_proj": Role.KEY_VALUE,
    "*.self_attn.v_proj": Role.KEY_VALUE,
    "*.self_attn.o_proj": Role.ATTENTION_OUTPUT,
}
MLP: dict[str, Meaning] = {
    "*.mlp.gate_proj": Role.COLUMN_PARALLEL,
    "*.mlp.up_proj": Role.COLUMN_PARALLEL,
    "*.mlp.down_proj": Role.ROW_PARALLEL,
}
LLAMA = VOCABULARY | ATTENTION | MLP
_FUSED_MLP: dict[str, Meaning] = {
    "*.mlp.gate_up_proj": Role.FUSED_GATE_UP,
    "*.mlp.down_proj": Role.ROW_PARALLEL,
}
# transformers gathers what a fused projection gives before it tells the halves apart.
_GATHERED_MLP: dict[str, Meaning] = {"*.mlp.gate_up_proj.weight": Role.CONTIGUOUS}
VISION = ("*vision_tower.*", "*multi_modal_projector.*")
_GEMMA3_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "num_hidden_layers": 26}

_LLAMA = Family(modules=LLAMA)
_TIED_LLAMA = Family(modules=LLAMA, is_tied=True)

DENSE: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral3": Family(modules=LLAMA, towers=VISION, text_config="text_config"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _TIED_LLAMA,
    "gemma2": _TIED_LLAMA,
    "gemma3_text": Family(modules=LLAMA, defaults=_GEMMA3_DEFAULTS, is_tied=True),
    "gemma3": Family(modules=LLAMA, towers=VISION, text_config="text_config", defaults=_GEMMA3_DEFAULTS, is_tied=True),
    "phi": Family(
        modules=VOCABULARY
        | ATTENTION
        | {
            "*.self_attn.dense": Role.ATTENTION_OUTPUT,
            "*.mlp.fc1": Role.COLUMN_PARALLEL,
            "*.mlp.fc2": Role.ROW_PARALLEL,
        },
        last_stage=("*lm_head.*", "*final_layernorm.*"),
    ),
    "phi3": Family(
        modules=VOCABULARY
        | {"*.self_attn.qkv_proj": Role.FUSED_QKV, "*.self_attn.o_proj": Role.ATTENTION_OUTPUT}
        | _FUSED_MLP,
        transformers=_GATHERED_MLP | {"*.self_attn.qkv_proj.weight": Role.CONTIGUOUS},
    ),
    "glm": Family(modules=VOCABULARY | ATTENTION | _FUSED_MLP, transformers=_GATHERED_MLP),
    "glm4": Family(modules=VOCABULARY | ATTENTION | _FUSED_MLP, transformers=_GATHERED_MLP),
    # Its norms have no weights.
    "olmo": Family(modules=LLAMA, last_stage=("*lm_head.*",)),
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "granite": _LLAMA,
    "cohere": Family(
        # Each head has a norm of its own. Norms of one dimension, as in other families, are for all heads, and not to be cut.
        modules=LLAMA
        | {
            "*.self_attn.q_norm": Weight(Role.QUERY, outputs=-2, inputs=-1),
            "*.self_attn.k_norm": Weight(Role.KEY_VALUE, outputs=-2, inputs=-1),
        },
        transformers={"*.self_attn.q_norm.*": Role.REPLICATED, "*.self_attn.k_norm.*": Role.REPLICATED},
        is_tied=True,
    ),
    "cohere2": _TIED_LLAMA,
    "starcoder2": Family(
        modules=VOCABULARY | ATTENTION | {"*.mlp.c_fc": Role.COLUMN_PARALLEL, "*.mlp.c_proj": Role.ROW_PARALLEL},
        is_tied=True,
    ),
}
