"""Model types with the names of another one's tensors: what transformers itself writes of each has rules and is complete."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from family_support.tiny_models import _HEAD, _LATENT, _ROUTED, _SIZES, MODEL_TYPES, config_of, save_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from ray_streamer.errors import ShardingError
from ray_streamer.sharding import Mesh, Replicate, ShardRules
from ray_streamer.sharding.completeness import missing_parts
from ray_streamer.sharding.families import FAMILIES, RENAMED
from ray_streamer.sharding.source import RuleSlices

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ray_streamer.checkpoint.index import CheckpointIndex

EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v32": _LATENT | _ROUTED,
    "dots1": _HEAD | _ROUTED,
    "glm4_moe_lite": _LATENT | _ROUTED,
    "glm_moe_dsa": _LATENT | _ROUTED,
    "smollm3": {},
    "solar_open": _HEAD | _ROUTED,
    "stablelm": {},
    "nemotron": {},
    "hyperclovax": {},
}
REMOTE_CODE = {"kimi_k2"}


@pytest.fixture
def written(tmp_path: Path, index_of: Callable[..., CheckpointIndex]) -> Callable[[], CheckpointIndex]:
    """The index of what transformers wrote into `tmp_path`."""

    def read() -> CheckpointIndex:
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        return index_of(shapes, config=json.loads((tmp_path / "config.json").read_text()))

    return read


@pytest.mark.parametrize("model_type", sorted(RENAMED.keys() - REMOTE_CODE))
def test_a_renamed_family_has_rules_and_is_complete(
    model_type: str, tmp_path: Path, written: Callable[[], CheckpointIndex]
) -> None:
    config = AutoConfig.for_model(model_type, **(_SIZES | EXTRA.get(model_type, _HEAD)))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    index = written()
    rules = ShardRules.for_config(index.config)
    assert set(RuleSlices(mesh=Mesh(tp=2))(index, 1).results.names) == set(index.names)
    cut = {name for name in index.names if not isinstance(rules.placement_of(name) or Replicate(), Replicate)}
    assert {name.split(".")[-2] for name in cut} >= {"embed_tokens", "o_proj", "down_proj"}
    assert missing_parts(index) == []
    with pytest.raises(ShardingError, match=f"plan for {model_type} models"):
        ShardRules.for_config(index.config, layout="transformers")


def test_kimi_k2_is_deepseek_v3() -> None:
    config = config_of("deepseek_v3").to_dict()
    ours = ShardRules.for_config(config | {"model_type": "kimi_k2"})
    assert list(ours) == list(ShardRules.for_config(config))


def test_renamed_types_are_no_families_and_lead_to_one() -> None:
    assert RENAMED.keys().isdisjoint(FAMILIES)
    assert set(RENAMED.values()) <= FAMILIES.keys()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_transformers_writes_is_complete(
    model_type: str, tmp_path: Path, written: Callable[[], CheckpointIndex], index_of: Callable[..., CheckpointIndex]
) -> None:
    save_model(model_type, tmp_path, torch.float32)
    index = written()
    assert missing_parts(index) == []
    # Without one layer's tensors it is not.
    layers = FAMILIES[model_type].layers
    shapes = {name: index.shape_of(row) for row, name in enumerate(index.names)}
    towers = ("vision", "audio")
    kept = {
        name: shape for name, shape in shapes.items() if f"{layers}.1." not in name or any(t in name for t in towers)
    }
    (clause,) = missing_parts(index_of(kept, config=index.config))
    assert clause == "1 of the 2 layers of config.json is missing, such as layer 1"


@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - {"mistral3"}))
def test_heads_are_tied_where_transformers_ties_them(model_type: str) -> None:
    assert FAMILIES[model_type].is_tied == AutoConfig.for_model(model_type).tie_word_embeddings
