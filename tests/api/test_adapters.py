"""A folder with an adapter (LoRA) loads by its uri: two ranks hold factors whose product is each one's part of the base's weight."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

import pytest
import torch
from api_support import adapter_tasks
from safetensors.torch import load_file, save_file

import ray_streamer
from ray_streamer.api.arguments import Sharding
from ray_streamer.errors import ShardingError

if TYPE_CHECKING:
    from pathlib import Path

    from api_support.processes import RankProcesses

PREFIX = adapter_tasks.PREFIX
RANK = 4
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 161,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 160}
LAYERS = {
    "llama": {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    },
    "gpt2": {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64), "mlp.c_fc": (256, 64), "mlp.c_proj": (64, 256)},
}
"""Outputs and inputs of the modules of a layer."""


def random(*shape: int) -> torch.Tensor:
    """Small whole numbers, of which products are exact."""
    return torch.randint(-8, 9, shape).float()


def factors_of(modules: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    factors = {}
    for module, (outputs, inputs) in modules.items():
        factors[f"{PREFIX}{module}.lora_A.weight"] = random(RANK, inputs)
        factors[f"{PREFIX}{module}.lora_B.weight"] = random(outputs, RANK)
    return factors


def saved(place: Path, config: dict[str, Any], factors: dict[str, torch.Tensor], **words: Any) -> tuple[str, str]:
    """An adapter as PEFT saves it, and a base model whose weights are the whole products; both uris."""
    adapter, base = place / "adapter", place / "base"
    adapter.mkdir()
    base.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "fan_in_fan_out": False, **words}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    (adapter / "README.md").write_text("mine")
    save_file(factors, adapter / "adapter_model.safetensors")
    (base / "config.json").write_text(json.dumps(config))
    whole = {}
    for name, tensor in factors.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if part == "A.weight":
            product = factors[name.replace("lora_A", "lora_B")] @ tensor
            whole[f"{module}.weight"] = product.T.contiguous() if said["fan_in_fan_out"] else product
        elif part == "embedding_A":
            whole[f"{module}.weight"] = (factors[name.replace("_A", "_B")] @ tensor).T.contiguous()
        elif ".lora_" not in name:
            whole[name.removeprefix(PREFIX)] = tensor
    save_file(whole, base / "deltas.safetensors")
    return str(adapter), str(base / "deltas.safetensors")


def on_two_ranks(pair: RankProcesses, uris: tuple[str, str], **arguments: Any) -> list[Any]:
    words = {"adapter": uris[0], "deltas": uris[1], "world_size": 2, "session": secrets.token_hex(8), **arguments}
    return pair.run(adapter_tasks.load, [{**words, "rank": rank} for rank in range(2)])


@pytest.mark.parametrize("layout", ["generic", "vllm"])
def test_factors_are_cut_as_the_modules_that_they_sit_on(pair: RankProcesses, tmp_path: Path, layout: str) -> None:
    modules = {f"model.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in LAYERS["llama"].items()}
    # Layer 1 has no up_proj: an adapter need not have all.
    del modules["model.layers.1.mlp.up_proj"]
    factors = factors_of(modules)
    factors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = random(RANK, 161)
    factors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = random(64, RANK)
    factors[f"{PREFIX}lm_head.weight"] = random(161, 64)
    answers = on_two_ranks(pair, saved(tmp_path, LLAMA, factors), is_transposed=False, layout=layout)
    padded = 192 if layout == "vllm" else 161
    assert [len(answer) for answer in answers] == [11, 11]
    for rank, answer in enumerate(answers):
        assert {name for name, (is_right, _) in answer.items() if not is_right} == set()
        shapes = {name: shape for name, (_, shape) in answer.items()}
        assert shapes["model.layers.0.self_attn.k_proj.weight"] == (16, 64)
        assert shapes["model.layers.1.mlp.down_proj.weight"] == (64, 48)
        assert shapes["model.embed_tokens.weight"][0] == (padded + 1 - rank) // 2


def test_weights_that_have_their_inputs_first(pair: RankProcesses, tmp_path: Path) -> None:
    modules = {f"transformer.h.{layer}.{name}": shape for layer in (0, 1) for name, shape in LAYERS["gpt2"].items()}
    uris = saved(tmp_path, GPT2, factors_of(modules), fan_in_fan_out=True)
    for answer in on_two_ranks(pair, uris, is_transposed=True):
        assert [name for name, (is_right, _) in answer.items() if not is_right] == []
        assert answer["transformer.h.0.attn.c_attn.weight"][1] == (64, 96)
        assert answer["transformer.h.1.mlp.c_proj.weight"][1] == (128, 64)


# One rank


def shapes_of(uri: Path | str, rank: int = 0, **arguments: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of what a rank of two would hold, from the headers alone."""
    request = Sharding(**{"tp": 2, **arguments}).request(uri, settings=ray_streamer.Settings(), device="cpu")
    results = request.slices(request.open_index(), rank).results
    return {result.name.removeprefix(PREFIX): result.shape for result in results[:]}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    factors = factors_of({"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)})
    factors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = random(64)
    factors[f"{PREFIX}model.layers.1.mlp.down_proj.lora_magnitude_vector"] = random(64)
    factors[f"{PREFIX}model.embed_tokens.base_layer.weight"] = random(161, 64)
    saved(tmp_path, LLAMA, factors)
    return tmp_path / "adapter"


def change(adapter: Path, **words: Any) -> str:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | words))
    return str(adapter)


def test_alone_a_rank_holds_all_of_it_whatever_its_base_is(adapter: Path) -> None:
    held = ray_streamer.load_rank(change(adapter, base_model_name_or_path="/nowhere", peft_type="LOHA"))
    stored = load_file(adapter / "adapter_model.safetensors")
    assert held.keys() == stored.keys()
    assert all(held[name].equal(tensor) for name, tensor in stored.items())


def test_bias_magnitude_and_whole_weights_lie_as_the_weight_does(adapter: Path) -> None:
    shapes = shapes_of(adapter)
    assert shapes["model.layers.0.self_attn.q_proj.lora_magnitude_vector"] == (32,)
    assert shapes["model.layers.1.mlp.down_proj.lora_magnitude_vector"] == (64,)
    assert shapes["model.embed_tokens.base_layer.weight"] == (81, 64)
    assert shapes["model.layers.0.self_attn.q_proj.lora_A.weight"] == (4, 64)


def test_the_magnitude_of_an_embedding_is_that_of_its_columns(tmp_path: Path) -> None:
    """PEFT's DoraEmbeddingLayer has one for each of the hidden dimensions, which a divided vocabulary leaves whole."""
    embedding = f"{PREFIX}model.embed_tokens"
    factors = factors_of({"model.layers.0.self_attn.q_proj": (64, 64)})
    factors |= {f"{embedding}.lora_embedding_A": random(RANK, 161), f"{embedding}.lora_embedding_B": random(64, RANK)}
    adapter, _ = saved(tmp_path, LLAMA, factors | {f"{embedding}.lora_magnitude_vector": random(64)})
    shapes = shapes_of(adapter)
    assert shapes["model.embed_tokens.lora_magnitude_vector"] == (64,)
    assert shapes["model.embed_tokens.lora_embedding_A"] == (4, 81)


def test_stages_hold_the_factors_of_their_layers(adapter: Path) -> None:
    first, second = (shapes_of(adapter, rank, tp=1, pp=2) for rank in range(2))
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0"}
    assert {name.split(".")[2] for name in second if ".layers." in name} == {"1"}
    assert "model.embed_tokens.base_layer.weight" in first


def test_layers_that_lie_differently_have_rules_of_their_own(adapter: Path) -> None:
    rules = {"*.0.self_attn.q_proj.lora_B.weight": ray_streamer.Replicate()}
    assert shapes_of(adapter, rules=rules)["model.layers.0.self_attn.q_proj.lora_B.weight"] == (64, 4)


def test_the_bases_config_may_lie_beside_the_adapter(adapter: Path) -> None:
    expected = shapes_of(adapter)
    change(adapter, base_model_name_or_path="nobody/there")
    (adapter / "config.json").write_text(json.dumps(LLAMA))
    assert shapes_of(adapter) == shapes_of(adapter / "adapter_model.safetensors") == expected


@pytest.mark.parametrize(
    "named", ["/nowhere", "s3://bucket/base", "http://127.0.0.1:1/base", "", None, 7, "../nowhere/../here"]
)
def test_a_base_that_is_not_there_or_not_followed_is_named(
    adapter: Path, named: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ShardingError, match=r"an adapter of .*put the base model's config\.json beside"):
        ray_streamer.plan(change(adapter, base_model_name_or_path=named), tp=2)
    assert "the config of its base model" in caplog.text


def test_rules_of_the_caller_place_an_adapter_of_an_unknown_base(adapter: Path) -> None:
    change(adapter, base_model_name_or_path="/nowhere")
    rules = {"*.lora_B.weight": ray_streamer.Split(0), "*": ray_streamer.Replicate()}
    assert shapes_of(adapter, rules=rules)["model.layers.1.mlp.down_proj.lora_B.weight"] == (32, 4)


@pytest.mark.parametrize(
    ("words", "arguments", "said"),
    [
        pytest.param({"peft_type": "LOHA"}, {}, "peft_type 'LOHA'; only LORA has rules", id="other-kind"),
        pytest.param({"peft_type": None}, {}, "peft_type None; only LORA has rules", id="no-kind"),
        pytest.param({}, {"fuse": True}, "not the factors of an adapter", id="fused"),
        pytest.param({}, {"tp": 3}, "cannot be split over tp=3", id="heads"),
    ],
)
def test_what_has_no_rule_says_so(adapter: Path, words: dict[str, Any], arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ShardingError, match=said):
        ray_streamer.plan(change(adapter, **words), **{"tp": 2, **arguments})


def test_a_module_that_the_base_has_no_rule_for_is_named(adapter: Path) -> None:
    save_file(factors_of({"model.layers.0.strange": (8, 8)}), adapter / "adapter_model.safetensors")
    with pytest.raises(ShardingError, match=r"2 tensors of .* no rule: .*strange\.lora_A"):
        ray_streamer.plan(adapter, tp=2)


def test_a_models_own_files_come_before_an_adapter_beside_them(adapter: Path) -> None:
    (adapter / "config.json").write_text(json.dumps(LLAMA))
    save_file({"model.norm.weight": random(64)}, adapter / "model-extra.safetensors")
    assert list(ray_streamer.load_rank(adapter / "model-extra.safetensors")) == ["model.norm.weight"]
    assert list(ray_streamer.load_rank(str(adapter / "adapter_model.safetensors"), unmatched="replicate"))


@pytest.mark.parametrize("said", [True, False])
def test_the_family_tells_which_weights_have_their_inputs_first(tmp_path: Path, said: bool) -> None:
    # PEFT saves what it found at the last module: false where a linear head follows Conv1D, true where Conv1D follows it.
    modules = {f"transformer.h.0.{name}": shape for name, shape in LAYERS["gpt2"].items()} | {"lm_head": (160, 64)}
    adapter, _ = saved(tmp_path, GPT2, factors_of(modules), fan_in_fan_out=said)
    shapes = shapes_of(adapter)
    assert {name: shape for name, shape in shapes.items() if "_A" in name} == {
        "transformer.h.0.attn.c_attn.lora_A.weight": (4, 64),
        "transformer.h.0.attn.c_proj.lora_A.weight": (4, 32),
        "transformer.h.0.mlp.c_fc.lora_A.weight": (4, 64),
        "transformer.h.0.mlp.c_proj.lora_A.weight": (4, 128),
        "lm_head.lora_A.weight": (4, 64),
    }
    assert {name: shape for name, shape in shapes.items() if "_B" in name} == {
        "transformer.h.0.attn.c_attn.lora_B.weight": (96, 4),
        "transformer.h.0.attn.c_proj.lora_B.weight": (64, 4),
        "transformer.h.0.mlp.c_fc.lora_B.weight": (128, 4),
        "transformer.h.0.mlp.c_proj.lora_B.weight": (64, 4),
        "lm_head.lora_B.weight": (80, 4),
    }
