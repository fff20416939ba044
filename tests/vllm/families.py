"""Which model families does vLLM load, and how is a checkpoint of each made so small that it loads in a second?

A configuration of transformers with few and small layers, random values in every parameter, saved as transformers saves it.
Sizes are such that tp=2 divides them, that key and value heads are fewer than query heads, and that the vocabulary needs padding.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Where a configuration has a field of this name, it gets this value."""

TIED = {"tie_word_embeddings": True}
MOE = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 128}
DEEPSEEK = {
    **MOE,
    **MLA,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {**TIED, "n_layer": 2, "n_head": 4},
    "cohere": TIED,
    "cohere2": TIED,
    "deepseek_v2": {**DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**DEEPSEEK, "topk_method": "noaux_tc"},
    "dots1": {**MOE, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5": {},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "exaone4": {"sliding_window": 32, "sliding_window_pattern": 2},
    "falcon": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "alibi": False,
        "multi_query": False,
        "bias": False,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16},
    "flex_olmo": {**MOE, "moe_intermediate_size": 128},
    "gemma": TIED,
    "gemma2": {**TIED, "query_pre_attn_scalar": 16},
    "gemma3_text": {**TIED, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "glm": {},
    "glm4": {},
    "glm4_moe": {
        **MOE,
        "head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gpt2": {**GPT, **TIED},
    "gpt_bigcode": {**GPT, **TIED},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": {**MOE, "sliding_window": 32, "num_local_experts": 4, "intermediate_size": 64},
    "gptj": {**GPT, "rotary_dim": 8},
    "granite": {},
    "granitemoe": MOE,
    "granitemoeshared": {**MOE, "shared_intermediate_size": 64},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {**MOE, "moe_topk": 2, "moe_intermediate_size": 128},
    "jamba": {
        **MOE,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "use_mamba_kernels": False,
    },
    "llama": {},
    "llama4_text": {
        **MOE,
        "intermediate_size_mlp": 128,
        "interleave_moe_layer_step": 2,
        "moe_layers": [1],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "mamba": {"state_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "mistral": {},
    "mixtral": MOE,
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": MOE,
    "opt": {**TIED, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "persimmon": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "phimoe": {**MOE, "moe_intermediate_size": 128},
    "qwen2": TIED,
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 64},
    "qwen3": {},
    "qwen3_moe": MOE,
    "qwen3_next": {
        **MOE,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": {**MOE, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "stablelm": {},
    "starcoder2": {},
}
"""transformers' `model_type`, and where a small configuration needs other values than `SMALL`."""


def save_checkpoint(family: str, folder: Path, *, seed: int = 0, **sizes: int) -> None:
    """A checkpoint of `family` in `folder`: config.json and safetensors files of bfloat16; `sizes` are other than `SMALL`'s."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config_class = type(AutoConfig.for_model(family))
    known = vars(AutoConfig.for_model(family)) | vars(config_class).get("attribute_map", {})
    wished = SMALL | FAMILIES[family] | sizes
    config = config_class(
        **{name: value for name, value in wished.items() if name in known or name in FAMILIES[family]}
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                buffer.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size="100KB")


def save_with_head(folder: Path, make_head: Callable[[torch.Tensor], torch.Tensor], **sizes: int) -> Path:
    """A tied Qwen2 in `folder` whose file has a head of its own, which `make_head` makes of the embedding."""
    from safetensors.torch import save_file

    save_checkpoint("qwen2", folder, **sizes)
    tensors = _taken_out(folder)
    tensors["lm_head.weight"] = make_head(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_classifier(folder: Path) -> None:
    """A Llama whose file has a classifier with a bias, which vLLM's model is built without."""
    import torch
    from safetensors.torch import save_file

    save_checkpoint("llama", folder)
    tensors = _taken_out(folder)
    del tensors["lm_head.weight"]
    for name, shape in (("score.weight", (2, SMALL["hidden_size"])), ("score.bias", (2,))):
        tensors[name] = torch.randn(shape).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    _say_in_config(folder, architectures=["LlamaForSequenceClassification"], id2label={"0": "no", "1": "yes"})


def save_eagle3(folder: Path, *, draft_vocab_size: int = 128) -> None:
    """An EAGLE-3 draft for a Llama: one layer, no embedding, and a head over a part of the vocabulary."""
    import torch
    from safetensors.torch import save_file

    save_checkpoint("llama", folder, seed=1, num_hidden_layers=1)
    tensors = {name.removeprefix("model.").replace("layers.0", "midlayer"): x for name, x in _taken_out(folder).items()}
    del tensors["embed_tokens.weight"]
    hidden = SMALL["hidden_size"]
    for letter in "qkv":
        rows = len(tensors[f"midlayer.self_attn.{letter}_proj.weight"])
        tensors[f"midlayer.self_attn.{letter}_proj.weight"] = torch.randn(rows, 2 * hidden).bfloat16()
    tensors["midlayer.hidden_norm.weight"] = torch.randn(hidden).bfloat16()
    tensors["fc.weight"] = torch.randn(hidden, 3 * hidden).bfloat16()
    tensors["lm_head.weight"] = torch.randn(draft_vocab_size, hidden).bfloat16()
    tensors["d2t"] = torch.randint(0, 100, (draft_vocab_size,))
    tensors["t2d"] = torch.rand(SMALL["vocab_size"]) > 0.5
    save_file(tensors, folder / "model.safetensors")
    _say_in_config(folder, architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=draft_vocab_size)


def save_with_mtp(folder: Path) -> None:
    """A DeepSeek-V3 whose file has a layer more, which predicts the token after the next one."""
    import torch
    from safetensors.torch import save_file

    save_checkpoint("deepseek_v3", folder)
    tensors = _taken_out(folder)
    last, added = "model.layers.1.", "model.layers.2."
    tensors |= {name.replace(last, added): x.flip(0) for name, x in tensors.items() if name.startswith(last)}
    hidden = SMALL["hidden_size"]
    for name, shape in (
        ("eh_proj", (hidden, 2 * hidden)),
        ("enorm", (hidden,)),
        ("hnorm", (hidden,)),
        ("shared_head.norm", (hidden,)),
        ("shared_head.head", (SMALL["vocab_size"], hidden)),
        ("embed_tokens", (SMALL["vocab_size"], hidden)),
    ):
        tensors[f"{added}{name}.weight"] = torch.randn(shape).bfloat16()
    save_file(tensors, folder / "model.safetensors")
    _say_in_config(folder, num_nextn_predict_layers=1)


def save_bge_m3(folder: Path) -> None:
    """An encoder whose two small heads lie beside its checkpoint, as torch saves them."""
    import torch
    from transformers import AutoModel, XLMRobertaConfig

    small = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    config = XLMRobertaConfig(**small, num_attention_heads=4, max_position_embeddings=256, pad_token_id=1)
    torch.manual_seed(0)
    AutoModel.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    _say_in_config(
        folder,
        architectures=["BgeM3EmbeddingModel"],
        position_embedding_type="absolute",
        bos_token_id=0,
        eos_token_id=2,
    )
    for name, rows in (("sparse_linear", 1), ("colbert_linear", 64)):
        torch.save({"weight": torch.randn(rows, 64), "bias": torch.randn(rows)}, folder / f"{name}.pt")


def save_in_mistrals_format(folder: Path, *, is_sharded: bool) -> None:
    """A Mistral as Mistral publishes it: params.json, and files whose tensors have names of its own."""
    from safetensors.torch import save_file

    save_checkpoint("mistral", folder)
    tensors = {_name_of_mistral(name): tensor for name, tensor in _taken_out(folder).items()}
    for path in folder.glob("*.json"):
        path.unlink()
    sizes = {"dim": "hidden_size", "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers"}
    sizes |= {
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "max_seq_len": "max_position_embeddings",
    }
    params = {name: SMALL[same] for name, same in sizes.items()} | {"norm_eps": 1e-6, "rope_theta": 10000.0}
    params |= {name: SMALL[name] for name in ("head_dim", "vocab_size")}
    (folder / "params.json").write_text(json.dumps(params))
    if not is_sharded:
        save_file(tensors, folder / "consolidated.safetensors")
        return
    weight_map = {name: f"consolidated-0000{1 + ('layers.0' in name)}-of-00002.safetensors" for name in tensors}
    for path in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == path}, folder / path)
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _name_of_mistral(name: str) -> str:
    others = {"model.": "", "embed_tokens": "tok_embeddings", "self_attn": "attention", "mlp": "feed_forward"}
    others |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "lm_head": "output"}
    others |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    others |= {f"{letter}_proj": f"w{letter}" for letter in "qkvo"}
    for same, other in others.items():
        name = name.replace(same, other)
    return name


def _say_in_config(folder: Path, **said: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))


def save_broken(good: Path, folder: Path) -> None:
    """The same Llama, but for a tensor of its last layer that has another shape."""
    from safetensors.torch import save_file

    shutil.copytree(good, folder)
    tensors = _taken_out(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-2].contiguous()
    save_file(tensors, folder / "model.safetensors")


def _taken_out(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, whose files are gone then."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of as many words as the small vocabulary has, for what asks for one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(SMALL["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        folder
    )
