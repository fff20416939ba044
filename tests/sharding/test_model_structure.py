from __future__ import annotations

from typing import Any

import pytest

from ray_streamer.errors import ShardingError
from ray_streamer.sharding.families import FAMILIES
from ray_streamer.sharding.globs import is_numbered
from ray_streamer.sharding.model_structure import Locations, ModelStructure
from ray_streamer.sharding.name_kinds import NameKinds

MIXTRAL = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 8}
GEMMA3 = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 34}}


def _locate(config: dict[str, Any], *names: str) -> Locations:
    return ModelStructure.of(config).locate(NameKinds.of(names))


@pytest.mark.parametrize(
    ("config", "name", "layer"),
    [
        pytest.param(MIXTRAL, "model.layers.1.self_attn.q_proj.weight", 1, id="in-a-layer"),
        pytest.param(MIXTRAL, "layers.1.self_attn.q_proj.weight", 1, id="without-prefix"),
        pytest.param(MIXTRAL, "model.embed_tokens.weight", None, id="outside"),
        pytest.param(MIXTRAL, "model.my_layers.1.weight", None, id="another-word"),
        pytest.param(GEMMA3, "language_model.model.layers.33.mlp.up_proj.weight", 33, id="language-model"),
        pytest.param(GEMMA3, "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", None, id="tower"),
    ],
)
def test_layers(config: dict[str, Any], name: str, layer: int | None) -> None:
    assert _locate(config, name).layers.item() == (-1 if layer is None else layer)


@pytest.mark.parametrize(
    ("config", "name", "layer"),
    [
        pytest.param({"model_type": "qwen3_next", "num_hidden_layers": 2}, "mtp.layers.0.a.weight", -1, id="from-0"),
        pytest.param(
            {"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_nextn_predict_layers": 1},
            "model.layers.2.a.weight",
            2,
            id="after-the-last",
        ),
    ],
)
def test_layers_of_multi_token_prediction_are_none_of_the_models(config: dict[str, Any], name: str, layer: int) -> None:
    located = _locate(config, name)
    assert (located.is_mtp.item(), located.layers.item()) == (True, layer)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("model.embed_tokens.weight", True, False),
        ("model.norm.weight", False, True),
        ("lm_head.weight", False, True),
        ("model.layers.0.input_layernorm.weight", False, False),
        ("model.layers.0.post_attention_layernorm.weight", False, False),
    ],
)
def test_what_lies_before_the_layers_and_after_them(name: str, before: bool, after: bool) -> None:
    located = _locate(MIXTRAL, name)
    assert (located.is_before_layers.item(), located.is_after_layers.item()) == (before, after)


def test_experts_have_numbers_where_a_model_has_experts() -> None:
    names = ("model.layers.1.block_sparse_moe.experts.7.w1.weight", "model.layers.1.block_sparse_moe.gate.weight")
    assert ModelStructure.of(MIXTRAL).num_experts == 8
    assert _locate(MIXTRAL, *names).experts.tolist() == [7, -1]
    llama = {"model_type": "llama", "num_hidden_layers": 2}
    assert ModelStructure.of(llama).num_experts == 0
    assert _locate(llama, *names).experts.tolist() == [-1, -1]


def test_families_ask_for_no_particular_number() -> None:
    # Kinds of names are asked, in place of the 92,000 names that a model may have.
    for family in FAMILIES.values():
        globs = (*family.towers, *family.mtp, *family.first_stage, *family.last_stage, *family.stacked_experts)
        assert not any(map(is_numbered, globs))


@pytest.mark.parametrize("num_layers", [None, -1, "2", True])
def test_a_number_of_layers_is_needed(num_layers: object) -> None:
    with pytest.raises(ShardingError, match=r"llama model needs a number for num_hidden_layers"):
        ModelStructure.of({"model_type": "llama", "num_hidden_layers": num_layers})


def test_an_unknown_family_has_no_anatomy() -> None:
    with pytest.raises(ShardingError, match=r"no preset for model type 'nobody'"):
        ModelStructure.of({"model_type": "nobody"})
