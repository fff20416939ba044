"""Values of config.json that no model has: one typed error of one short line, with no work done for what is only claimed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from family_support.held import resolve

from ray_streamer.errors import RayStreamerError, ShardingError
from ray_streamer.sharding import Mesh, ShardRules
from ray_streamer.sharding.sizes import MAX_EXPERTS, MAX_LAYERS, MAX_MTP_LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.checkpoint.index import CheckpointIndex

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
DEEPSEEK = LLAMA | {"model_type": "deepseek_v3", "n_routed_experts": 4}
GEMMA4 = LLAMA | {"model_type": "gemma4_text"}
GLOBAL_HEADS = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
MESHES = {"tp": Mesh(tp=2), "pp": Mesh(pp=2), "ep": Mesh(tp=2, ep=2)}

NO_COUNTS = {
    "a-billion": 10**9,
    "2**70": 2**70,
    "4000-digits": 10**4000,
    "negative": -(10**9),
    "zero": 0,
    "float": 2.0,
    "infinity": float("inf"),
    "nan": float("nan"),
    "text": "2",
    "long-text": "2" * 10_000_000,
    "list": [2],
    "long-list": [2] * 1_000_000,
    "object": {"2": 2},
    "true": True,
}


def tensors(experts: int = 0) -> dict[str, tuple[int, ...]]:
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    for layer in range(2):
        names += [f"model.layers.{layer}.self_attn.{p}_proj.weight" for p in "qkvo"]
        names += [
            f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{w}.weight"
            for expert in range(experts)
            for w in (1, 2, 3)
        ]
    return dict.fromkeys(names, (64, 64))


@pytest.fixture
def refusal(index_of: Callable[..., CheckpointIndex]) -> Callable[..., str]:
    """Resolves every tensor; the text of the one error that this must end in."""

    def refuse(config: dict[str, Any], mesh: str = "tp", *, experts: int = 0) -> str:
        index = index_of(tensors(experts), config=config)
        with pytest.raises(RayStreamerError) as caught:
            resolve(index, ShardRules.for_config(config), MESHES[mesh])
        text = str(caught.value)
        assert "\n" not in text
        assert len(text) < 1000
        return text

    return refuse


@pytest.mark.parametrize("value", NO_COUNTS.values(), ids=NO_COUNTS)
@pytest.mark.parametrize(
    ("config", "key", "mesh"),
    [
        pytest.param(LLAMA, "num_hidden_layers", "pp", id="layers"),
        pytest.param(LLAMA, "num_attention_heads", "tp", id="heads"),
        pytest.param(MIXTRAL, "num_local_experts", "ep", id="experts"),
        pytest.param(DEEPSEEK | {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers", "tp", id="draft-layers"),
        pytest.param(GEMMA4 | GLOBAL_HEADS, "num_global_key_value_heads", "tp", id="global-heads"),
    ],
)
def test_what_is_no_count_is_refused_by_name(
    refusal: Callable[..., str], config: dict[str, Any], key: str, mesh: str, value: Any
) -> None:
    if key in ("num_nextn_predict_layers", "num_hidden_layers") and type(value) is int and value == 0:
        pytest.skip("no layers is a count")
    if value == 10**9 and key in ("num_attention_heads", "num_global_key_value_heads"):
        pytest.skip("is a count, and fits no tensor: see below")
    assert key in refusal(config | {key: value}, mesh, experts=4)


def test_heads_that_fit_no_tensor_are_refused_with_the_tensors(index_of: Callable[..., CheckpointIndex]) -> None:
    config = LLAMA | {"num_attention_heads": 10**9}
    with pytest.raises(ShardingError, match=r"cannot be split over tp=2:(.|\n)*self_attn") as caught:
        resolve(index_of(tensors(), config=config), ShardRules.for_config(config), Mesh(tp=2))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("value", "key"),
    [
        pytest.param({"layer_types": 5, **GLOBAL_HEADS}, "layer_types", id="kinds-number"),
        pytest.param({"layer_types": "full_attention", **GLOBAL_HEADS}, "layer_types", id="kinds-text"),
        pytest.param({"layer_types": ["full_attention"] * 1000, **GLOBAL_HEADS}, "layer_types", id="kinds-many"),
        pytest.param({"per_layer_config": [1]}, "per_layer_config", id="layers-list"),
        pytest.param({"per_layer_config": {"9" * 5000: {"num_key_value_heads": 2}}}, "per_layer_config", id="digits"),
        pytest.param({"per_layer_config": {"٣": {"num_key_value_heads": 2}}}, "per_layer_config", id="arabic"),
        pytest.param({"per_layer_config": {"²": {"num_key_value_heads": 2}}}, "per_layer_config", id="superscript"),
        pytest.param({"per_layer_config": {"2": {"num_key_value_heads": 2}}}, "per_layer_config", id="no-such-layer"),
        pytest.param({"per_layer_config": {"1": 7}}, "layer 1", id="layer-number"),
        pytest.param({"per_layer_config": {"1": {"num_key_value_heads": [2]}}}, "layer 1", id="heads-list"),
    ],
)
def test_values_by_layer_are_checked(refusal: Callable[..., str], value: dict[str, Any], key: str) -> None:
    assert key in refusal(GEMMA4 | value)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(None, id="null"),
        pytest.param(7, id="number"),
        pytest.param(["llama"] * 1000, id="list"),
        pytest.param({"llama": 1}, id="object"),
        pytest.param("x" * 10_000_000, id="long"),
        pytest.param("\x1b[31mllama", id="escape-sequence"),
        pytest.param("\ud800", id="half-a-surrogate-pair"),
    ],
)
def test_a_model_type_that_is_none_is_shown_short(refusal: Callable[..., str], model_type: Any) -> None:
    text = refusal(LLAMA | {"model_type": model_type})
    assert "no preset for model type" in text
    assert text.isprintable()


def test_names_with_numbers_without_end(index_of: Callable[..., CheckpointIndex]) -> None:
    shapes = tensors() | {f"model.layers.{'9' * 5000}.self_attn.q_proj.weight": (64, 64)}
    table = resolve(index_of(shapes, config=LLAMA), ShardRules.for_config(LLAMA), Mesh(tp=2, pp=2))
    assert len(table.groups.ids) == len(shapes)


def test_the_largest_counts_are_still_counts() -> None:
    most = DEEPSEEK | {"num_hidden_layers": MAX_LAYERS, "num_nextn_predict_layers": MAX_MTP_LAYERS}
    rules = ShardRules.for_config(most | {"n_routed_experts": MAX_EXPERTS})
    assert f"*layers.{MAX_LAYERS + MAX_MTP_LAYERS - 1}.*" in {rule.glob for rule in rules}
    with pytest.raises(ShardingError, match=f"1 to {MAX_MTP_LAYERS}"):
        ShardRules.for_config(most | {"num_nextn_predict_layers": MAX_MTP_LAYERS + 1})


def test_quantization_sizes_of_any_kind_and_depth(index_of: Callable[..., CheckpointIndex]) -> None:
    deep: Any = {"group_size": 64}
    for _ in range(5000):
        deep = {"inner": [deep]}
    for value in (
        deep,
        {"bits": 0, "group_size": -1},
        {"bits": 2**70, "group_size": [0, 2**70, None, "4", 1.5]},
        [],
        7,
    ):
        config = LLAMA | {"quantization_config": value}
        shapes = tensors() | {"model.layers.0.self_attn.q_proj.weight_scale": (64, 1)}
        table = resolve(index_of(shapes, config=config), ShardRules.for_config(config), Mesh(tp=2))
        assert len(table.groups.ids) == len(shapes)


def test_config_of_a_bomb_is_still_json() -> None:
    # What the cases above stand for can be written down, so that a config.json may hold it.
    assert all(json.loads(json.dumps(value)) == value or value != value for value in NO_COUNTS.values())
