"""A tiny model of every family: transformers' own class, its names on disk, and sizes with which every rule has work.

Two layers, grouped-query attention, a vocabulary that no tp divides, experts where the family has them, and both kinds of
layers where it has two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 130
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LLAMA4 = _HEAD | {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 80,
    "interleave_moe_layer_step": 2,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_LLAMA4_VISION = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
_GEMMA4 = _HEAD | {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_global_key_value_heads": 8,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}

EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "llama4_text": _LLAMA4,
    "mistral": _HEAD,
    "ministral": _HEAD,
    "ministral3": _HEAD,
    "qwen2": {},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3": _HEAD | {"attention_bias": False},
    "qwen3_moe": _HEAD | _EXPERTS | {"mlp_only_layers": [1]},
    "qwen3_next": _HEAD
    | _EXPERTS
    | {
        "shared_expert_intermediate_size": 48,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "gemma": _HEAD,
    "gemma2": _HEAD | {"query_pre_attn_scalar": 8},
    "gemma3_text": _HEAD | {"query_pre_attn_scalar": 8},
    "gemma4_text": _GEMMA4,
    "phi": {},
    "phi3": {},
    "phimoe": _LOCAL_EXPERTS,
    "mixtral": _LOCAL_EXPERTS,
    "deepseek_v2": _LATENT | _ROUTED,
    "deepseek_v3": _LATENT | _ROUTED,
    "glm": _HEAD,
    "glm4": _HEAD,
    "glm4_moe": _HEAD | _ROUTED,
    "gpt_oss": _HEAD | _LOCAL_EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granite": {},
    "granitemoe": _LOCAL_EXPERTS,
    "cohere": {"use_qk_norm": True},
    "cohere2": _HEAD,
    "starcoder2": {},
}
"""Families whose sizes have the usual names: what each needs beside them."""

_WITH_TOWERS: dict[str, dict[str, Any]] = {
    "mistral3": {
        "text_config": _SIZES | _HEAD | {"model_type": "mistral"},
        "vision_config": _VISION | {"model_type": "pixtral"},
    },
    "gemma3": {"text_config": _SIZES | EXTRA["gemma3_text"], "vision_config": _VISION, "mm_tokens_per_image": 1},
    "llama4": {"text_config": _SIZES | _LLAMA4, "vision_config": _VISION | _LLAMA4_VISION},
    "gemma4": {
        "text_config": _SIZES | _GEMMA4,
        "vision_config": _VISION | {"head_dim": 8, "num_key_value_heads": 2, "global_head_dim": 8},
    },
}
_OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_inner": 96, "vocab_size": VOCABULARY, "n_positions": 32},
    "falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "new_decoder_architecture": True,
        "vocab_size": VOCABULARY,
        "ffn_hidden_size": 96,
        "bias": True,
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 8, "vocab_size": VOCABULARY},
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "vocab_size": VOCABULARY,
    },
}

MODEL_TYPES = tuple(sorted({*EXTRA, *_WITH_TOWERS, *_OWN_SIZES}))


def config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A config of `model_type`; `changes` are of the language model's sizes."""
    if model_type in _WITH_TOWERS:
        parts = _WITH_TOWERS[model_type]
        return AutoConfig.for_model(model_type, **(parts | {"text_config": parts["text_config"] | changes}))
    own = _OWN_SIZES.get(model_type)
    return AutoConfig.for_model(model_type, **((_SIZES | EXTRA[model_type] if own is None else own) | changes))


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class of models of `model_type` with a head for text."""
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if model_type in _WITH_TOWERS else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[type(AutoConfig.for_model(model_type))]


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this config, with a head for text."""
    return model_class(config.model_type)._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )


def random_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this config; the same weights for the same config."""
    torch.manual_seed(0)
    model = model_of(config).eval()
    for parameter in model.parameters():
        parameter.data = nn.init.normal_(parameter.data.to(dtype), std=0.2)
    return model


def save_model(model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Writes the checkpoint of a random model as transformers does; gives the model."""
    model = random_model(config_of(model_type, **changes), dtype)
    model.save_pretrained(folder)
    return model
