"""Families with experts, each one's tensors by themselves or all experts stacked in one tensor."""

from __future__ import annotations

from dataclasses import replace

from ray_streamer.sharding.families.dense import ATTENTION, LLAMA, MLP, VOCABULARY
from ray_streamer.sharding.families.family import Family, Meaning, Role, Weight

_EXPERTS: dict[str, Meaning] = {
    "*.mlp.gate": Role.REPLICATED,
    "*.mlp.experts.*.gate_proj": Role.COLUMN_PARALLEL,
    "*.mlp.experts.*.up_proj": Role.COLUMN_PARALLEL,
    "*.mlp.experts.*.down_proj": Role.ROW_PARALLEL,
}
_SHARED_EXPERTS: dict[str, Meaning] = {
    "*.mlp.shared_expert*.gate_proj": Role.COLUMN_PARALLEL,
    "*.mlp.shared_expert*.up_proj": Role.COLUMN_PARALLEL,
    "*.mlp.shared_expert*.down_proj": Role.ROW_PARALLEL,
    "*.mlp.shared_expert_gate": Role.REPLICATED,
}
_MIXTRAL = (
    VOCABULARY
    | ATTENTION
    | {
        "*.block_sparse_moe.gate": Role.REPLICATED,
        "*.block_sparse_moe.experts.*.w1": Role.COLUMN_PARALLEL,
        "*.block_sparse_moe.experts.*.w3": Role.COLUMN_PARALLEL,
        "*.block_sparse_moe.experts.*.w2": Role.ROW_PARALLEL,
    }
)
_NO_ATTENTION_PLAN: dict[str, Meaning] = {"*.self_attn.*": Role.REPLICATED}
_LATENT_ATTENTION: dict[str, Meaning] = {
    "*.self_attn.q_proj": Role.QUERY,
    "*.self_attn.q_a_proj": Role.REPLICATED,
    "*.self_attn.q_b_proj": Role.QUERY,
    "*.self_attn.kv_a_proj_with_mqa": Role.REPLICATED,
    # For each head its key and its value.
    "*.self_attn.kv_b_proj": Role.QUERY,
    "*.self_attn.o_proj": Role.ATTENTION_OUTPUT,
}
_DEEPSEEK = VOCABULARY | MLP | _LATENT_ATTENTION | _EXPERTS | _SHARED_EXPERTS
# Sparse attention (DeepSeek-V3.2): chooses positions for all heads alike.
_INDEXER: dict[str, Meaning] = {
    "*.self_attn.indexer.wq_b": Role.REPLICATED,
    "*.self_attn.indexer.wk": Role.REPLICATED,
    "*.self_attn.indexer.weights_proj": Role.REPLICATED,
}
# Some layers have experts, the first ones or every other one have none.
_DENSE_OR_NOT = ("*.mlp.*",)
# A layer for multi-token prediction has its own embedding and head beside an ordinary layer.
_DRAFT_LAYER: dict[str, Meaning] = {"*.eh_proj": Role.REPLICATED, "*.shared_head.head": Role.VOCABULARY}

_LLAMA4_MODULES = (
    VOCABULARY
    | ATTENTION
    | {
        "*.feed_forward.gate_proj": Role.COLUMN_PARALLEL,
        "*.feed_forward.up_proj": Role.COLUMN_PARALLEL,
        "*.feed_forward.down_proj": Role.ROW_PARALLEL,
        "*.feed_forward.router": Role.REPLICATED,
        "*.feed_forward.shared_expert.gate_proj": Role.COLUMN_PARALLEL,
        "*.feed_forward.shared_expert.up_proj": Role.COLUMN_PARALLEL,
        "*.feed_forward.shared_expert.down_proj": Role.ROW_PARALLEL,
    }
)
_LLAMA4_EXPERTS: dict[str, Meaning] = {
    "*.experts.gate_up_proj": Weight(Role.FUSED_GATE_UP, outputs=2, inputs=1),
    "*.experts.down_proj": Weight(Role.ROW_PARALLEL, outputs=2, inputs=1),
}
_LLAMA4_TOWER_PLAN: dict[str, Meaning] = {
    "*vision_model.patch_embedding.linear.weight": Role.CONTIGUOUS,
    "*vision_model.*.self_attn.q_proj.weight": Role.CONTIGUOUS,
    "*vision_model.*.self_attn.q_proj.bias": Role.CONTIGUOUS,
    "*vision_model.*.self_attn.k_proj.weight": Role.CONTIGUOUS,
    "*vision_model.*.self_attn.k_proj.bias": Role.CONTIGUOUS,
    "*vision_model.*.self_attn.v_proj.weight": Role.CONTIGUOUS,
    "*vision_model.*.self_attn.v_proj.bias": Role.CONTIGUOUS,
    "*vision_model.*.self_attn.o_proj.weight": Role.ROW_PARALLEL,
    "*vision_model.vision_adapter.mlp.fc1.weight": Role.CONTIGUOUS,
    "*vision_model.vision_adapter.mlp.fc2.weight": Role.ROW_PARALLEL,
    "*multi_modal_projector.linear_1.weight": Role.CONTIGUOUS,
}
_LLAMA4 = Family(
    varying=("*.feed_forward.*",),
    modules=_LLAMA4_MODULES,
    tensors=_LLAMA4_EXPERTS,
    stacked_experts=tuple(_LLAMA4_EXPERTS),
    num_experts=("num_local_experts",),
)

_GPT_OSS_EXPERTS: dict[str, Meaning] = {
    # Gate and up rows take turns, and weights are quantized in blocks of 32 inputs: a rank holds both rows of whole blocks.
    "*.experts.gate_up_proj": Weight(Role.COLUMN_PARALLEL, outputs=2, inputs=1, unit=64),
    "*.experts.gate_up_proj_bias": Weight(Role.COLUMN_PARALLEL, outputs=1, unit=64),
    "*.experts.gate_up_proj_blocks": Weight(Role.COLUMN_PARALLEL, outputs=1, unit=64),
    "*.experts.gate_up_proj_scales": Weight(Role.COLUMN_PARALLEL, outputs=1, unit=64),
    "*.experts.down_proj": Weight(Role.ROW_PARALLEL, outputs=2, inputs=1, unit=32),
    "*.experts.down_proj_bias": Role.REPLICATED,
    "*.experts.down_proj_blocks": Weight(Role.ROW_PARALLEL, inputs=2, unit=1),
    "*.experts.down_proj_scales": Weight(Role.ROW_PARALLEL, inputs=2, unit=1),
    "*.self_attn.sinks": Role.QUERY,
}

_GEMMA4_PLAN: dict[str, Meaning] = {"*embed_tokens_per_layer.*": Role.REPLICATED}
_GEMMA4_TOWER_PLAN: dict[str, Meaning] = {
    "*vision_tower.*.self_attn.q_proj.linear.weight": Role.CONTIGUOUS,
    "*vision_tower.*.self_attn.k_proj.linear.weight": Role.CONTIGUOUS,
    "*vision_tower.*.self_attn.v_proj.linear.weight": Role.CONTIGUOUS,
    "*vision_tower.*.self_attn.o_proj.linear.weight": Role.ROW_PARALLEL,
    "*vision_tower.*.mlp.gate_proj.linear.weight": Role.CONTIGUOUS,
    "*vision_tower.*.mlp.up_proj.linear.weight": Role.CONTIGUOUS,
    "*vision_tower.*.mlp.down_proj.linear.weight": Role.ROW_PARALLEL,
}
_GEMMA4 = Family(
    # Layers may share keys and values with an earlier one, or take the values from the keys.
    varying=("*.self_attn.*",),
    is_tied=True,
    modules=LLAMA
    | {
        "*embed_tokens_per_layer": Role.VOCABULARY,
        "*per_layer_model_projection": Role.REPLICATED,
        "*.per_layer_input_gate": Role.REPLICATED,
        "*.per_layer_projection": Role.REPLICATED,
        "*.router.proj": Role.REPLICATED,
    },
    tensors={
        "*.experts.gate_up_proj": Weight(Role.FUSED_GATE_UP, outputs=1, inputs=2),
        "*.experts.down_proj": Weight(Role.ROW_PARALLEL, outputs=1, inputs=2),
    },
    transformers=_GEMMA4_PLAN,
    first_stage=("*embed_tokens*", "*per_layer_model_projection.*", "*per_layer_projection_norm.*"),
    stacked_experts=("*.experts.gate_up_proj", "*.experts.down_proj"),
    num_experts=("num_experts",),
)

_GRANITE_MOE = Family(
    modules=VOCABULARY
    | ATTENTION
    | {
        "*.block_sparse_moe.router.layer": Role.REPLICATED,
        "*.block_sparse_moe.input_linear": Weight(Role.FUSED_GATE_UP, outputs=1, inputs=2),
        "*.block_sparse_moe.output_linear": Weight(Role.ROW_PARALLEL, outputs=1, inputs=2),
    },
    transformers=_NO_ATTENTION_PLAN,
    stacked_experts=("*.block_sparse_moe.input_linear.weight", "*.block_sparse_moe.output_linear.weight"),
    num_experts=("num_local_experts",),
)

MIXTURES: dict[str, Family] = {
    "mixtral": Family(modules=_MIXTRAL, num_experts=("num_local_experts",)),
    "phimoe": Family(modules=_MIXTRAL, transformers=_NO_ATTENTION_PLAN, num_experts=("num_local_experts",)),
    "qwen2_moe": Family(
        modules=LLAMA | _EXPERTS | _SHARED_EXPERTS,
        transformers={"*.mlp.shared_expert.*": Role.REPLICATED},
        num_experts=("num_experts",),
        varying=_DENSE_OR_NOT,
    ),
    "qwen3_moe": Family(
        modules=LLAMA | _EXPERTS, num_experts=("num_experts", "num_local_experts"), varying=_DENSE_OR_NOT
    ),
    "qwen3_next": Family(
        modules=LLAMA
        | _EXPERTS
        | _SHARED_EXPERTS
        | {
            "*.linear_attn.in_proj_qkvz": Role.LINEAR_KEY_GROUPS,
            "*.linear_attn.in_proj_ba": Role.LINEAR_KEY_GROUPS,
            "*.linear_attn.conv1d": Role.LINEAR_FUSED_QKV,
            "*.linear_attn.out_proj": Role.LINEAR_OUTPUT,
            "mtp.fc": Role.REPLICATED,
        },
        tensors={"*.linear_attn.A_log": Role.LINEAR_VALUES, "*.linear_attn.dt_bias": Role.LINEAR_VALUES},
        transformers={
            "*.linear_attn.in_proj_*.weight": Role.CONTIGUOUS,
            "*.linear_attn.out_proj.weight": Role.CONTIGUOUS,
            "*.linear_attn.*": Role.REPLICATED,
        },
        num_experts=("num_experts",),
        mtp=("mtp.*",),
        varying=("*.self_attn.*", "*.linear_attn.*", *_DENSE_OR_NOT),
    ),
    "olmoe": Family(modules=LLAMA | _EXPERTS, num_experts=("num_experts",)),
    "deepseek_v2": Family(modules=_DEEPSEEK, num_experts=("n_routed_experts",), varying=_DENSE_OR_NOT),
    "deepseek_v3": Family(
        modules=_DEEPSEEK | _INDEXER | _DRAFT_LAYER,
        transformers=_NO_ATTENTION_PLAN,
        num_experts=("n_routed_experts",),
        num_mtp_layers="num_nextn_predict_layers",
        varying=_DENSE_OR_NOT,
    ),
    "glm4_moe": Family(
        modules=LLAMA | _EXPERTS | _SHARED_EXPERTS | _DRAFT_LAYER,
        num_experts=("n_routed_experts",),
        num_mtp_layers="num_nextn_predict_layers",
        varying=_DENSE_OR_NOT,
    ),
    "llama4_text": _LLAMA4,
    "llama4": replace(
        _LLAMA4,
        towers=("*vision_model.*", "*multi_modal_projector.*"),
        transformers=_LLAMA4_TOWER_PLAN,
        text_config="text_config",
    ),
    "gpt_oss": Family(
        modules=VOCABULARY | ATTENTION | {"*.mlp.router": Role.REPLICATED},
        tensors=_GPT_OSS_EXPERTS,
        transformers={"*lm_head.weight": Role.VOCABULARY, "*": Role.REPLICATED},
        stacked_experts=("*.experts.*",),
        num_experts=("num_local_experts",),
    ),
    "gemma4_text": _GEMMA4,
    "gemma4": replace(
        _GEMMA4,
        towers=("*vision_tower.*", "*audio_tower.*", "*embed_vision.*", "*embed_audio.*"),
        transformers=_GEMMA4_PLAN | _GEMMA4_TOWER_PLAN,
        text_config="text_config",
    ),
    "granitemoe": _GRANITE_MOE,
}
