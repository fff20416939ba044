"""Families from before Llama, with names and fused projections of their own."""

from __future__ import annotations

from ray_streamer.sharding.families.family import Family, Meaning, Role, Weight

_COLUMNS_FIRST = {"outputs": 1, "inputs": 0}
"""Conv1D, which is a linear module whose weight is [inputs, outputs]."""

_HEADS_IN_TURN: dict[str, Meaning] = {
    "*.query_key_value": Role.GROUPED_QKV,
    "*.dense": Role.ATTENTION_OUTPUT,
    "*.mlp.dense_h_to_4h": Role.COLUMN_PARALLEL,
    "*.mlp.dense_4h_to_h": Role.ROW_PARALLEL,
}
_WORD_EMBEDDINGS: dict[str, Meaning] = {"*word_embeddings": Role.VOCABULARY, "*lm_head": Role.VOCABULARY}

CLASSICS: dict[str, Family] = {
    "gpt2": Family(
        modules={
            "*wte": Role.VOCABULARY,
            "*wpe": Role.REPLICATED,
            "*lm_head": Role.VOCABULARY,
            "*.attn.c_attn": Weight(Role.FUSED_QKV, **_COLUMNS_FIRST),
            "*.attn.c_proj": Weight(Role.ATTENTION_OUTPUT, **_COLUMNS_FIRST),
            "*.mlp.c_fc": Weight(Role.COLUMN_PARALLEL, **_COLUMNS_FIRST),
            "*.mlp.c_proj": Weight(Role.ROW_PARALLEL, **_COLUMNS_FIRST),
        },
        skipped=("*.attn.bias", "*.attn.masked_bias"),
        transformers=None,
        layers="h",
        first_stage=("*wte.*", "*wpe.*"),
        last_stage=("*lm_head.*", "*ln_f.*"),
        is_tied=True,
    ),
    "falcon": Family(
        modules=_HEADS_IN_TURN | _WORD_EMBEDDINGS,
        transformers=None,
        defaults={"multi_query": True},
        layers="h",
        first_stage=("*word_embeddings.*",),
        last_stage=("*lm_head.*", "*ln_f.*"),
        is_tied=True,
    ),
    "bloom": Family(
        modules=_HEADS_IN_TURN | _WORD_EMBEDDINGS,
        transformers=None,
        layers="h",
        first_stage=("*word_embeddings*",),
        last_stage=("*lm_head.*", "*ln_f.*"),
        is_tied=True,
    ),
    "gpt_neox": Family(
        modules=_HEADS_IN_TURN | {"*embed_in": Role.VOCABULARY, "*embed_out": Role.VOCABULARY},
        skipped=("*.attention.bias", "*.attention.masked_bias"),
        transformers={"*embed_in.*": Role.REPLICATED},
        first_stage=("*embed_in.*",),
        last_stage=("*embed_out.*", "*final_layer_norm.*"),
    ),
}
