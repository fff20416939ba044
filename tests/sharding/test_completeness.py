"""Folders that lack parts of their model are refused by what is missing; what was meant to be a part is not."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

import ray_streamer
from ray_streamer import Replicate, Settings, Skip
from ray_streamer.errors import CheckpointError, IndexMismatchError, ShardingError
from ray_streamer.sharding.completeness import missing_parts
from ray_streamer.testing.checkpoints import write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ray_streamer.checkpoint.index import CheckpointIndex

Shapes = dict[str, tuple[int, ...]]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}
QWEN3_NEXT = LLAMA | {
    "model_type": "qwen3_next",
    "num_experts": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 2,
}
SETTINGS = Settings.resolve(memory_limit="1MiB", block_bytes="64KiB")
INDEX = "model.safetensors.index.json"


def layer(number: int, *, mlp: str = "mlp") -> Shapes:
    prefix = f"model.layers.{number}."
    return {
        f"{prefix}input_layernorm.weight": (8,),
        **{f"{prefix}self_attn.{part}_proj.weight": (8, 8) for part in "qkvo"},
        **{f"{prefix}{mlp}.{part}_proj.weight": (8, 8) for part in ("gate", "up", "down")},
    }


def llama(num_layers: int = 3) -> Shapes:
    ends: Shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,), "lm_head.weight": (16, 8)}
    for number in range(num_layers):
        ends |= layer(number)
    return ends


def mixtral() -> Shapes:
    experts = {
        f"model.layers.{number}.block_sparse_moe.experts.{expert}.{w}.weight": (8, 8)
        for number in range(3)
        for expert in range(4)
        for w in ("w1", "w2", "w3")
    }
    return {name: shape for name, shape in llama().items() if ".mlp." not in name} | experts


def without(shapes: Shapes, *parts: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not any(part in name for part in parts)}


def write(folder: Path, shapes: Shapes, config: dict[str, Any], *, num_files: int = 1) -> str:
    """A folder without an index json; several files have names that count nothing."""
    names = list(shapes)
    (folder / "config.json").write_text(json.dumps(config))
    for number in range(num_files):
        part = [(name, "F32", shapes[name]) for name in names[number::num_files]]
        single = write_checkpoint(folder / "parts" / str(number), part) / "model.safetensors"
        single.rename(folder / ("model.safetensors" if num_files == 1 else f"{number}.safetensors"))
    return str(folder)


def index_of_some(folder: Path, shapes: Shapes, file: str = "model.safetensors", name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"weight_map": dict.fromkeys(shapes, file)}))


def loaded(uri: str, **arguments: Any) -> set[str]:
    return set(ray_streamer.load_rank(uri, settings=SETTINGS, **arguments))


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        pytest.param(LLAMA, llama(), id="llama"),
        pytest.param(LLAMA | {"model_type": "mixtral", "num_local_experts": 4}, mixtral(), id="mixtral"),
        pytest.param(LLAMA, without(llama(), "lm_head"), id="tied-head"),
        pytest.param(LLAMA | {"num_hidden_layers": 2}, llama(), id="more-layers-than-config"),
        pytest.param(LLAMA | {"model_type": "olmo"}, without(llama(), "norm"), id="norms-without-weights"),
        pytest.param(LLAMA | {"model_type": "olmo"}, without(llama(), "norm", "lm_head"), id="no-norms-and-a-tied-head"),
        pytest.param({"model_type": "gemma4_text", **{k: LLAMA[k] for k in list(LLAMA)[1:]}}, without(llama(), "layers.2.self_attn.k", "layers.2.self_attn.v"), id="shared-keys"),
        pytest.param({"model_type": "unheard-of", "num_hidden_layers": 9}, llama(), id="unknown-family"),
        pytest.param({key: value for key, value in LLAMA.items() if "layers" not in key}, llama(2), id="no-number"),
    ],
)  # fmt: skip
def test_whole_models_load(tmp_path: Path, config: dict[str, Any], shapes: Shapes, num_files: int) -> None:
    uri = write(tmp_path, shapes, config, num_files=num_files)
    rules = {"*": Replicate()} if config["model_type"] == "unheard-of" else None
    assert loaded(uri, rules=rules) == set(shapes)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        pytest.param(llama(2), "1 of the 3 layers of config.json is missing, such as layer 2", id="last-layer"),
        pytest.param(without(llama(), "layers.0."), "such as layer 0", id="first-layer"),
        pytest.param(without(llama(), "layers.1.mlp.up_proj"), "layer 1 has no 'mlp.up_proj'", id="module"),
        pytest.param(without(llama(), "layers.2.input_layernorm"), "layer 2 has no 'input_layernorm'", id="norm"),
        pytest.param(without(llama(), "0.self_attn.o", "2.self_attn.o"), "layer 0 and 1 more has no", id="two-layers"),
    ],
)
@pytest.mark.parametrize("num_files", [1, 3])
def test_layers_and_modules(tmp_path: Path, shapes: Shapes, told: str, num_files: int) -> None:
    uri = write(tmp_path, shapes, LLAMA, num_files=num_files)
    with pytest.raises(CheckpointError, match=f"^{uri} is incomplete: .*{told}.*give the uri of"):
        loaded(uri)
    with pytest.raises(CheckpointError, match=told):
        ray_streamer.plan(uri, tp=2, settings=SETTINGS)
    # What was asked for by name is what was wanted.
    name = "model.safetensors" if num_files == 1 else "1.safetensors"
    assert loaded(f"{uri}/{name}") <= set(shapes)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        pytest.param(without(llama(), "embed_tokens"), "the embeddings .* are missing", id="embeddings"),
        pytest.param(without(llama(), "model.norm", "lm_head"), "what follows the last layer .* is missing", id="end"),
        pytest.param(without(llama(), "lm_head"), "the head is missing, which config.json does not tie", id="head"),
    ],
)
def test_ends_of_several_files(tmp_path: Path, shapes: Shapes, told: str) -> None:
    config = LLAMA | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    with pytest.raises(CheckpointError, match=told):
        loaded(write(tmp_path, shapes, config, num_files=3))


def test_the_head_of_a_model_whose_norms_have_no_weights(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "olmo", "architectures": ["OlmoForCausalLM"], "tie_word_embeddings": False}
    with pytest.raises(CheckpointError, match="the head is missing"):
        loaded(write(tmp_path, without(llama(), "norm", "lm_head"), config, num_files=3))


def test_experts(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 4}
    uri = write(tmp_path, without(mixtral(), "1.block_sparse_moe.experts.2.w3"), config, num_files=2)
    with pytest.raises(CheckpointError, match=r"layer 1 has 'block_sparse_moe\.experts\.\*\.w3' of 3 of the 4 experts"):
        loaded(uri)


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        pytest.param(
            {"model_type": "deepseek_v3", "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "n_routed_experts": 4,
             "num_attention_heads": 4},
            {"model.layers.61.eh_proj.weight": (8, 16), "model.layers.61.enorm.weight": (8,)},
            id="layers-for-multi-token-prediction",
        ),
        pytest.param(
            QWEN3_NEXT,
            {"mtp.fc.weight": (8, 16), **{n.replace("model", "mtp"): s for n, s in layer(0).items()}},
            id="layers-counted-from-0-again",
        ),
        pytest.param(
            LLAMA | {"num_hidden_layers": 1},
            {"fc.weight": (8, 24), "midlayer.self_attn.q_proj.weight": (8, 8), "norm.weight": (8,), "d2t": (16,)},
            id="eagle-3",
        ),
        pytest.param(
            LLAMA | {"num_hidden_layers": 1},
            {"fc.weight": (8, 16), **{n.removeprefix("model."): s for n, s in layer(0).items()}},
            id="eagle-1-without-embeddings",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_files", [1, 2])
def test_drafts_stand_alone(tmp_path: Path, config: dict[str, Any], shapes: Shapes, num_files: int) -> None:
    uri = write(tmp_path, shapes, config, num_files=num_files)
    assert loaded(uri, rules={"fc.weight": Replicate()} if "fc.weight" in shapes else None, mtp=True) == set(shapes)


@pytest.mark.parametrize(
    ("absent", "told"),
    [
        pytest.param("model.layers.0.", "1 of the 3 layers .* such as layer 0", id="layer"),
        pytest.param("model.layers.0.mlp.experts.2.", "layer 0 has .* of 3 of the 4 experts", id="expert"),
        pytest.param("model.norm.", r"the last norm .* is missing", id="norm"),
    ],
)
def test_layers_for_multi_token_prediction_hide_nothing(tmp_path: Path, absent: str, told: str) -> None:
    """Qwen3-Next's are counted from 0 again."""
    own = {
        name.replace("block_sparse_moe", "mlp")
        .replace("w1", "gate_proj")
        .replace("w2", "down_proj")
        .replace("w3", "up_proj"): shape
        for name, shape in mixtral().items()
    }
    mtp: Shapes = {f"mtp.{n.removeprefix('model.')}": s for n, s in own.items() if ".layers.0." in n}
    mtp |= {"mtp.fc.weight": (8, 16), "mtp.norm.weight": (8,)}
    (whole := tmp_path / "whole").mkdir()
    assert loaded(write(whole, own | mtp, QWEN3_NEXT, num_files=2), mtp=True) == {*own, *mtp}
    uri = write(tmp_path, without(own, absent) | mtp, QWEN3_NEXT, num_files=2)
    with pytest.raises(CheckpointError, match=told):
        loaded(uri)


def test_parts_that_an_index_json_leaves_out_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shapes = llama(2)
    uri = write(tmp_path, shapes, LLAMA)
    index_of_some(tmp_path, shapes)
    with caplog.at_level(logging.WARNING):
        assert loaded(uri) == set(shapes)
    (record,) = caplog.records
    assert "1 of the 3 layers of config.json is missing" in record.getMessage()


@pytest.mark.parametrize(
    "absent",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_names_of_the_index_json_that_ranks_need(tmp_path: Path, absent: str) -> None:
    uri = write(tmp_path, without(llama(), absent), LLAMA)
    index_of_some(tmp_path, llama())
    with pytest.raises(
        IndexMismatchError, match=f"1 tensor that its index json names is in none of its files.*'{absent}'"
    ):
        loaded(uri)
    # Nobody needs it where a rule leaves it out.
    assert loaded(uri, rules=[ray_streamer.Rule(absent, Skip(), optional=True)]) == set(without(llama(), absent))


@pytest.mark.parametrize(
    ("absent", "config"),
    [
        pytest.param("lm_head.weight", LLAMA | {"tie_word_embeddings": True}, id="tied-head"),
        pytest.param("lm_head.weight", LLAMA | {"model_type": "gemma"}, id="tied-by-family"),
        pytest.param("model.layers.0.self_attn.rotary_emb.inv_freq", LLAMA, id="buffer-of-old-models"),
        pytest.param("model.layers.0.self_attn.masked_bias", LLAMA, id="mask"),
    ],
)
def test_names_of_the_index_json_that_nobody_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, absent: str, config: dict[str, Any]
) -> None:
    shapes = without(llama(), absent)
    uri = write(tmp_path, shapes, config)
    index_of_some(tmp_path, shapes | {absent: (1,)})
    assert loaded(uri) == set(shapes)
    assert caplog.text.count("in no header") == 1


def test_drafts_that_the_index_json_names_are_needed_only_when_asked_for(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "glm4_moe", "n_routed_experts": 4, "num_nextn_predict_layers": 1}
    uri = write(tmp_path, llama(), config)
    index_of_some(tmp_path, llama() | {"model.layers.3.eh_proj.weight": (8, 16)})
    assert loaded(uri) == set(llama())
    with pytest.raises(IndexMismatchError, match="eh_proj"):
        loaded(uri, mtp=True)


def test_matrices_that_neither_index_nor_rules_know_are_left_out(tmp_path: Path) -> None:
    shapes = llama() | {"leftover.weight": (3, 3), "leftover.bias": (3,)}
    uri = write(tmp_path, shapes, LLAMA)
    index_of_some(tmp_path, without(shapes, "leftover", "model.norm"))
    assert loaded(uri) == set(without(shapes, "leftover.weight"))
    assert loaded(uri, rules={"leftover.weight": Replicate()}) == set(shapes)
    assert loaded(uri, unmatched="replicate") == set(shapes)
    # Without an index json nothing says that they are left over.
    (tmp_path / INDEX).unlink()
    with pytest.raises(ShardingError, match=r"1 tensor of .* has two or more dimensions and no rule: leftover\.weight"):
        loaded(uri)


def test_a_number_of_layers_that_is_none_is_told(tmp_path: Path) -> None:
    uri = write(tmp_path, llama(), LLAMA | {"num_hidden_layers": 10**9})
    with pytest.raises(ShardingError, match="num_hidden_layers, got 1000000000; a model has 0 to 4096"):
        loaded(uri)
    assert loaded(f"{uri}/model.safetensors") == set(llama())


def test_every_layer_of_many_is_found_missing(index_of: Callable[..., CheckpointIndex]) -> None:
    for gone in range(0, 60, 7):
        shapes: Shapes = without(llama(60), f"layers.{gone}.mlp.down")
        (clause,) = missing_parts(index_of(shapes, config=LLAMA | {"num_hidden_layers": 60}))
        assert clause == f"layer {gone} has no 'mlp.down_proj'"


def quantized(num_layers: int = 3) -> Shapes:
    """With a bias and a scale for each output beside each projection, but for those of the first layer, which were left alone."""
    beside = {
        f"{name.removesuffix('weight')}{part}": shape[:1]
        for name, shape in llama(num_layers).items()
        for part in ("bias", "weight_scale")
        if "_proj." in name and not (part == "weight_scale" and ".layers.0." in name)
    }
    return llama(num_layers) | beside


def dtype_of(name: str) -> str:
    return "F8_E4M3" if name.endswith("_proj.weight") and ".layers.0." not in name else "F32"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("", ""),
        ("model.norm.weight", r"the last norm \(\*norm\.\*\) is missing"),
        ("model.layers.1.mlp.up_proj.weight_scale", "'model.layers.1.mlp.up_proj' has no weight_scale"),
        ("model.layers.2.mlp.up_proj.weight", "'model.layers.2.mlp.up_proj' has no weight"),
        ("model.layers.0.self_attn.q_proj.bias", "'model.layers.0.self_attn.q_proj' has no bias"),
    ],
)
def test_a_tensor_that_most_modules_like_it_have(tmp_path: Path, lost: str, message: str) -> None:
    shapes = {name: shape for name, shape in quantized(4).items() if name != lost}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4}))
    names = list(shapes)
    for number in range(2):
        part = [(name, dtype_of(name), shapes[name]) for name in names[number::2]]
        single = write_checkpoint(tmp_path / "parts" / str(number), part) / "model.safetensors"
        single.rename(tmp_path / f"{number}.safetensors")
    if lost:
        with pytest.raises(CheckpointError, match=f"is incomplete: {message}"):
            loaded(str(tmp_path))
    else:
        assert loaded(str(tmp_path)) == shapes.keys()
