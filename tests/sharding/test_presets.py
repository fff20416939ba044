"""Presets against transformers 5.23: the files that it writes, and for fused tensors and experts its modules run on our slices.

How slices compare with those of other loaders is in `test_oracles`, how the generic layout computes in `test_generic_layout`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
from family_support.held import resolve
from family_support.tiny_models import MODEL_TYPES, VOCABULARY, config_of
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from ray_streamer.checkpoint.index import CheckpointIndex
from ray_streamer.errors import ShardingError
from ray_streamer.sharding import (
    Mesh,
    Replicate,
    ShardRules,
    Split,
    SplitGroups,
    SplitVocabulary,
    TensorSlice,
    legal_tp,
)
from ray_streamer.sharding.families import FAMILIES
from ray_streamer.sharding.name_kinds import NameKinds
from ray_streamer.sharding.presets import Layout
from ray_streamer.testing import layouts

if TYPE_CHECKING:
    from pathlib import Path

    from family_support.saved import Saved
    from transformers import PreTrainedModel

IndexOf = Callable[..., CheckpointIndex]
Cut = Callable[[torch.Tensor, TensorSlice], torch.Tensor]

ADD_UP = ("phi3", "mixtral", "qwen3_moe")


OLD_NAMES: dict[str, dict[str, tuple[int, ...]]] = {
    "bloom": {"word_embeddings.weight": (VOCABULARY, 64), "h.0.self_attention.query_key_value.weight": (192, 64)},
    "deepseek_v3": {
        "model.layers.0.self_attn.indexer.wq_b.weight": (128, 16),
        "model.layers.0.self_attn.indexer.wk.weight": (16, 64),
        "model.layers.0.self_attn.indexer.weights_proj.weight": (8, 64),
    },
    "deepseek_v2": {"model.layers.0.self_attn.q_proj.weight": (128, 64)},
    "gemma4": {
        "model.audio_tower.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.embed_audio.embedding_projection.weight": (64, 16),
        "model.language_model.layers.1.self_attn.v_proj.weight": (128, 64),
    },
    "gpt2": {"wte.weight": (VOCABULARY, 64), "h.0.attn.bias": (1, 1, 32, 32), "h.0.attn.masked_bias": ()},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": (1, 1, 32, 32),
        "gpt_neox.layers.0.attention.masked_bias": (),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,),
    },
    "gpt_oss": {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (4, 192, 2, 16),
        "model.layers.0.mlp.experts.gate_up_proj_scales": (4, 192, 2),
        "model.layers.0.mlp.experts.down_proj_blocks": (4, 64, 3, 16),
        "model.layers.0.mlp.experts.down_proj_scales": (4, 64, 3),
    },
}
"""What published checkpoints hold that transformers does not write any more."""
DRAFTS: dict[str, dict[str, tuple[int, ...]]] = {
    "deepseek_v3": {
        "model.layers.2.embed_tokens.weight": (VOCABULARY, 64),
        "model.layers.2.eh_proj.weight": (64, 128),
        "model.layers.2.shared_head.head.weight": (VOCABULARY, 64),
        "model.layers.2.shared_head.norm.weight": (64,),
        "model.layers.2.self_attn.kv_b_proj.weight": (128, 16),
        "model.layers.2.mlp.experts.1.down_proj.weight": (64, 32),
    },
    "qwen3_next": {
        "mtp.fc.weight": (64, 128),
        "mtp.norm.weight": (64,),
        "mtp.layers.0.self_attn.o_proj.weight": (64, 64),
    },
}
DRAFTS["glm4_moe"] = {name: shape for name, shape in DRAFTS["deepseek_v3"].items() if "kv_b_proj" not in name}
"""What published checkpoints hold for multi-token prediction."""


def test_there_is_a_tiny_model_of_every_family() -> None:
    assert set(MODEL_TYPES) == set(FAMILIES)


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_tensor_that_transformers_writes_has_a_rule(
    model_type: str, layout: Layout, saved: Callable[[str], Saved]
) -> None:
    index = saved(model_type).index
    if layout == "transformers" and FAMILIES[model_type].transformers is None:
        with pytest.raises(ShardingError, match=f"transformers has no tensor-parallel plan for {model_type} models"):
            ShardRules.for_config(index.config, layout=layout)
        return
    table = resolve(index, ShardRules.for_config(index.config, layout=layout), Mesh(tp=2))
    assert not any(part is None for held in table.distinct() for part in held)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_tensor_lies_on_the_stage_of_its_layer_or_beside_the_layers(
    model_type: str, saved: Callable[[str], Saved]
) -> None:
    index = saved(model_type).index
    table = resolve(index, ShardRules.for_config(index.config), Mesh(pp=2))
    stages = {
        name: {rank for rank in range(2) if table.slice_of(tensor, rank)} for tensor, name in enumerate(index.names)
    }
    layer = re.compile(r"^(?!.*(?:vision|projector)).*\b(?:layers|h)\.([01])\.")
    in_layers = {name: int(found[1]) for name in index.names if (found := layer.match(name))}
    assert {name: stages[name] for name in in_layers} == {name: {stage} for name, stage in in_layers.items()}
    embeddings = [name for name in index.names if re.search(r"embed_tokens\.|wte|word_embeddings\.|embed_in", name)]
    heads = [name for name in index.names if re.search(r"lm_head|embed_out", name)]
    assert embeddings
    assert all(0 in stages[name] for name in embeddings)
    # Without a head of its own the last stage needs the embedding.
    assert all(1 in stages[name] for name in heads or embeddings)
    assert all(stages.values())


def test_every_glob_of_every_family_names_a_tensor_of_some_model(saved: Callable[[str], Saved]) -> None:
    used: set[str] = set()
    known: set[str] = set()
    for model_type in MODEL_TYPES:
        index = saved(model_type).index
        names = (*index.names, *OLD_NAMES.get(model_type, ()), *DRAFTS.get(model_type, ()))
        for layout in ("generic", "transformers") if FAMILIES[model_type].transformers is not None else ("generic",):
            rules = ShardRules.for_config(index.config, layout=layout, mtp=layout == "generic")
            known |= {rule.glob for rule in rules if not rule.glob.endswith(".bias")}
            used |= {
                rules.rules[position].glob for position in rules.first_matches(NameKinds.of(names)) if position >= 0
            }
    assert known - used == set()


@pytest.mark.parametrize("model_type", sorted({**OLD_NAMES, **DRAFTS}))
def test_published_names_have_rules(
    model_type: str, saved: Callable[[str], Saved], index_of: IndexOf, cut: Cut
) -> None:
    config = saved(model_type).index.config
    names = OLD_NAMES.get(model_type, {}) | DRAFTS.get(model_type, {})
    index = index_of(names, config=config)
    for mtp in (False, True):
        table = resolve(index, ShardRules.for_config(config, mtp=mtp), Mesh(tp=2))
        held = {name for tensor, name in enumerate(index.names) if table.slice_of(tensor, 0) is not None}
        masks = {name for name in names if name.endswith((".attn.bias", ".attention.bias", ".masked_bias"))}
        assert held == names.keys() - masks - (set() if mtp else DRAFTS.get(model_type, {}).keys())


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_names_with_either_prefix_are_split_and_towers_are_not(prefix: str, index_of: IndexOf) -> None:
    names = {
        f"{prefix}layers.0.self_attn.k_proj.weight": (32, 16),
        f"{prefix}embed_tokens.weight": (9, 16),
        "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight": (15, 15),
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight": (15, 3, 5, 5),
        "multi_modal_projector.mm_input_projection_weight": (15, 16),
    }
    # What gemma-3-4b-it's config.json leaves out are the class' defaults: 8 heads, 4 key-value heads.
    rules = ShardRules.for_config({"model_type": "gemma3", "text_config": {"hidden_size": 2560}})
    table = resolve(index_of(names), rules, Mesh(tp=8))
    shapes = [table.slice_of(tensor, 7).shape for tensor in range(len(names))]
    assert shapes == [(8, 16), (0, 16), *list(names.values())[2:]]


def test_a_base_model_of_gemma4_has_names_without_prefix() -> None:
    config = {
        "model_type": "gemma4_text",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    rules = ShardRules.for_config(config)
    for prefix in ("", "model.", "model.language_model."):
        assert rules.placement_of(f"{prefix}per_layer_model_projection.weight") == Replicate()


@pytest.mark.parametrize("published", [False, True], ids=["written-by-transformers", "published"])
def test_gemma4_has_layers_with_other_key_value_heads(published: bool, saved: Callable[[str], Saved]) -> None:
    config = dict(saved("gemma4_text").index.config or {})
    if published:
        del config["per_layer_config"]
        config |= {"num_global_key_value_heads": 8, "global_head_dim": 16}
    rules = ShardRules.for_config(config)
    placements = [rules.placement_of(f"model.layers.{layer}.self_attn.k_proj.weight") for layer in range(2)]
    assert placements == [Split(0, kv_heads=4), Split(0, kv_heads=8)]


def test_gpt_oss_experts_are_cut_in_blocks_of_32(index_of: IndexOf) -> None:
    """2880 indices are 90 blocks: at tp 8 seven ranks hold 12 and the last one 6, in both ways to store them."""
    prefix = "model.layers.0.mlp.experts."
    local = {
        "gate_up_proj_blocks": ((128, 5760, 90, 16), (128, 768, 90, 16), (128, 384, 90, 16)),
        "gate_up_proj_scales": ((128, 5760, 90), (128, 768, 90), (128, 384, 90)),
        "gate_up_proj_bias": ((128, 5760), (128, 768), (128, 384)),
        "down_proj_blocks": ((128, 2880, 90, 16), (128, 2880, 12, 16), (128, 2880, 6, 16)),
        "down_proj_scales": ((128, 2880, 90), (128, 2880, 12), (128, 2880, 6)),
        "down_proj_bias": ((128, 2880), (128, 2880), (128, 2880)),
        "gate_up_proj": ((128, 2880, 5760), (128, 2880, 768), (128, 2880, 384)),
        "down_proj": ((128, 2880, 2880), (128, 384, 2880), (128, 192, 2880)),
    }
    config = {"model_type": "gpt_oss", "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 128}
    index = index_of({prefix + name: shapes[0] for name, shapes in local.items()}, dtype="U8", config=config)
    table = resolve(index, ShardRules.for_config(config), Mesh(tp=8))
    for tensor, name in enumerate(index.names):
        held = [table.slice_of(tensor, rank) for rank in (0, 7)]
        assert tuple(part.shape for part in held if part) == local[name.removeprefix(prefix)][1:], name


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        pytest.param({"new_decoder_architecture": True, "num_kv_heads": 8}, 8, id="falcon-40b"),
        pytest.param({"new_decoder_architecture": True, "n_head_kv": 8}, 8, id="falcon-40b-first-names"),
        pytest.param({"num_kv_heads": 16, "multi_query": True}, 1, id="falcon-7b"),
        pytest.param({}, 1, id="falcon-7b-defaults"),
        pytest.param({"multi_query": False}, 16, id="falcon-rw"),
    ],
)
def test_falcons_have_three_ways_to_fuse(sizes: dict[str, Any], groups: int) -> None:
    config = {"model_type": "falcon", "num_attention_heads": 16, "hidden_size": 64, "num_hidden_layers": 2} | sizes
    placement = ShardRules.for_config(config).placement_of("transformer.h.0.self_attention.query_key_value.weight")
    assert isinstance(placement, SplitGroups)
    assert placement.groups == groups
    assert placement.refusal(((16 + 2 * groups) * 4, 64), groups) is None


def test_sizes_that_gemma3_leaves_out_are_those_of_transformers() -> None:
    text = AutoConfig.for_model("gemma3_text")
    assert FAMILIES["gemma3"].defaults == {key: getattr(text, key) for key in FAMILIES["gemma3"].defaults}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_rule_cuts_scales_of_quantized_checkpoints(model_type: str, saved: Callable[[str], Saved]) -> None:
    """They are cut with their weights; a rule may only say that they are whole, as those of towers are."""
    index = saved(model_type).index
    scales = [f"{name}_scale_inv" for name in index.names] + [f"{name}.absmax" for name in index.names]
    for layout in ("generic", "transformers") if FAMILIES[model_type].transformers is not None else ("generic",):
        rules = ShardRules.for_config(index.config, layout=layout)
        assert {rules.placement_of(name) for name in scales} <= {None, Replicate()}


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("model_type", ADD_UP)
def test_ranks_modules_add_up_to_the_whole_models(
    model_type: str, tp: int, saved: Callable[[str], Saved], cut: Cut, tmp_path: Path
) -> None:
    """Each rank's slices are loaded by transformers as a smaller model, whose attention and MLP outputs are summed.

    This is what tensor parallelism relies on, for shared key-value heads, fused projections and experts alike.
    """
    whole = saved(model_type)
    calls = _record_calls(whole.model)
    rules = ShardRules.for_config(whole.index.config)
    table = resolve(whole.index, rules, Mesh(tp=tp))
    sums = {name: torch.zeros_like(output) for name, (_, _, output) in calls.items()}
    for rank in range(tp):
        slices: dict[str, torch.Tensor] = {}
        for tensor, name in enumerate(whole.index.names):
            part = table.slice_of(tensor, rank)
            assert part is not None
            # An uneven vocabulary is no smaller model, so the embedding is left whole; others test how it is split.
            is_vocabulary = rules.placement_of(name) == SplitVocabulary()
            slices[name] = whole.tensors[name] if is_vocabulary else cut(whole.tensors[name], part)
        modules = dict(_load_as_smaller_model(slices, whole.model, tp, tmp_path / str(rank)).named_modules())
        for name, (arguments, keywords, _) in calls.items():
            with torch.no_grad():
                sums[name] += _first(modules[name](*arguments, **keywords))
    assert len(calls) == 2 * 2
    for name, (_, _, output) in calls.items():
        torch.testing.assert_close(sums[name], output, rtol=1e-9, atol=1e-9, msg=name)


def _record_calls(model: PreTrainedModel) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]:
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = {}
    handles: list[Any] = []
    for name, module in model.named_modules():
        if name.endswith((".self_attn", ".mlp")):

            def record(_: nn.Module, arguments: Any, keywords: Any, output: Any, name: str = name) -> None:
                calls[name] = (arguments, keywords, _first(output))

            handles.append(module.register_forward_hook(record, with_kwargs=True))
    with torch.no_grad():
        model(torch.arange(1, 7)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def _load_as_smaller_model(
    slices: dict[str, torch.Tensor], model: PreTrainedModel, tp: int, folder: Path
) -> PreTrainedModel:
    config = model.config.to_dict()
    smaller = {
        "num_attention_heads": config["num_attention_heads"] // tp,
        "num_key_value_heads": max(1, config["num_key_value_heads"] // tp),
        "intermediate_size": config["intermediate_size"] // tp,
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    }
    if "moe_intermediate_size" in config:
        smaller["moe_intermediate_size"] = config["moe_intermediate_size"] // tp
    folder.mkdir()
    type(model.config)(**(config | smaller)).save_pretrained(folder)
    save_file(slices, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, report = type(model).from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(itertools.chain(*report.values())), report
    return loaded.eval()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("model_type", ["llama", "phi3", "mixtral"])
def test_attention_outputs_are_cut_between_heads(model_type: str) -> None:
    rules = ShardRules.for_config(config_of(model_type).to_dict())
    assert rules.placement_of("model.layers.0.self_attn.o_proj.weight") == Split(1, heads=8)


@pytest.mark.parametrize(
    ("layout", "num_tensors", "legal"),
    [
        pytest.param(
            layouts.llama_layout(8192, 80, 64, 8, 28672, 128256), 723, (1, 2, 4, 8, 16, 32, 64), id="llama-70b"
        ),
        pytest.param(layouts.phi3_layout(5120, 40, 40, 10, 17920, 100352), 243, (1, 2, 5, 10, 20, 40), id="phi-4"),
        pytest.param(
            layouts.mixtral_layout(4096, 32, 32, 8, 14336, 32000), 995, (1, 2, 4, 8, 16, 32), id="mixtral-8x7b"
        ),
        pytest.param(
            layouts.qwen3_moe_layout(2048, 48, 32, 4, 768, 151936), 18867, (1, 2, 4, 8, 16, 32), id="qwen3-30b-a3b"
        ),
    ],
)
def test_published_sizes(
    layout: layouts.ModelLayout, num_tensors: int, legal: tuple[int, ...], index_of: IndexOf
) -> None:
    index = index_of({tensor.name: tensor.shape for tensor in layout.tensors}, dtype="BF16", config=layout.config)
    assert len(index) == num_tensors
    assert legal_tp(index, ShardRules.for_config(layout.config)) == legal
