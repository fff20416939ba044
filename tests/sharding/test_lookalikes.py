"""Advice for a model_type without a preset: the old architecture that its tensors show, by an argument that then works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import ray_streamer
from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding import Mesh, RuleSlices
from ray_streamer.sharding.families import FAMILIES, RENAMED
from ray_streamer.sharding.lookalikes import lookalikes
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import (
    TensorSpec,
    llama_layout,
    mixtral_layout,
    phi3_layout,
    qwen3_layout,
    qwen3_moe_layout,
)
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.testing.layouts import ModelLayout

LLAMA = llama_layout(64, 2, 4, 2, 128, 100)
MIXTRAL = mixtral_layout(64, 2, 4, 2, 32, 100, experts=4)
STRANGER = [TensorSpec("decoder.stack.0.in_proj.weight", "F32", (8, 8))]


@pytest.mark.parametrize("layout", ["generic", "vllm", "transformers"])
@pytest.mark.parametrize(
    ("model", "first"),
    [
        pytest.param(LLAMA, "llama", id="llama"),
        # Heads with norms are Llama's but for vectors that every rank holds whole.
        pytest.param(qwen3_layout(64, 2, 4, 2, 128, 100), "llama", id="qwen3"),
        pytest.param(phi3_layout(64, 2, 4, 2, 128, 100), "phi3", id="phi3"),
        pytest.param(MIXTRAL, "mixtral", id="mixtral"),
        pytest.param(qwen3_moe_layout(64, 2, 4, 2, 32, 100, experts=4), "qwen3_moe", id="qwen3-moe"),
    ],
)
def test_tensors_show_which_family_it_is(model: ModelLayout, first: str, layout: Any) -> None:
    index = header_only_index(model.tensors, num_files=1, config={**model.config, "model_type": "brand_new"})
    assert lookalikes(index, layout=layout)[0] == first


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        pytest.param(STRANGER, LLAMA.config, id="other-names"),
        pytest.param([*LLAMA.tensors, *STRANGER], LLAMA.config, id="a-weight-of-its-own"),
        pytest.param(LLAMA.tensors, {}, id="no-sizes"),
        pytest.param(LLAMA.tensors, {**LLAMA.config, "num_attention_heads": 5}, id="sizes-of-another-model"),
        pytest.param([TensorSpec("model.norm.weight", "F32", (64,))], LLAMA.config, id="nothing-that-is-cut"),
        # DiffLlama takes the difference of heads that are half of all heads apart.
        pytest.param(
            [*LLAMA.tensors, TensorSpec("model.layers.0.self_attn.lambda_q1", "F32", (16,))],
            LLAMA.config,
            id="attention-of-its-own",
        ),
    ],
)
def test_no_advice_where_nothing_fits(tensors: list[TensorSpec], config: dict[str, Any]) -> None:
    index = header_only_index(tensors, num_files=1, config={**config, "model_type": "brand_new"})
    assert lookalikes(index, layout="generic") == []
    with pytest.raises(ShardingError, match=r"no preset for model type 'brand_new' of config\.json; known are"):
        RuleSlices(mesh=Mesh(tp=2))(index, 0)


def test_norms_that_all_heads_share_do_not_look_like_a_norm_for_each() -> None:
    """Apertus has no gate, and would look more like Cohere than like Llama; its norms have as many indices as one head."""
    tensors = [spec for spec in qwen3_layout(64, 2, 4, 2, 128, 100).tensors if "gate_proj" not in spec.name]
    assert ("model.layers.0.self_attn.q_norm.weight", (128,)) in [(spec.name, spec.shape) for spec in tensors]
    index = header_only_index(tensors, num_files=1, config={**LLAMA.config, "model_type": "brand_new"})
    assert lookalikes(index, layout="generic") == ["llama"]
    with pytest.raises(ShardingError, match=r"q_norm.weight \[128\] and 1 alike: it has 1 dimension"):
        RuleSlices(mesh=Mesh(tp=2))(
            header_only_index(tensors, num_files=1, config={**LLAMA.config, "model_type": "cohere"}), 0
        )


@pytest.fixture
def brand_new(tmp_path: Path) -> Path:
    config = {**MIXTRAL.config, "model_type": "brand_new"}
    return write_checkpoint(tmp_path / "new", MIXTRAL.tensors, config=config)


def test_the_argument_that_the_advice_names_works(brand_new: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ShardingError, match=r"'brand_new' .* names and sizes of mixtral models: .* model_type='mixtral'"
    ):
        ray_streamer.plan(brand_new, tp=2)
    known = write_checkpoint(tmp_path / "known", MIXTRAL.tensors, config=MIXTRAL.config)
    ways: list[dict[str, Any]] = [{"tp": 2}, {"tp": 2, "pp": 2}, {"tp": 2, "ep": True, "layout": "vllm"}]
    for arguments in ways:
        told: Any = {**arguments, "model_type": "mixtral"}
        held = [
            plan.slices[0].fingerprint()
            for plan in (ray_streamer.plan(brand_new, **told), ray_streamer.plan(known, **arguments))
        ]
        assert held[0] == held[1]
    ranks: Any = {"rank": 1, "world_size": 2, "local_world_size": 1}
    loaded = ray_streamer.load_rank(brand_new, model_type="mixtral", **ranks)
    assert {name: tensor.shape for name, tensor in loaded.items()} == {
        name: tensor.shape for name, tensor in ray_streamer.load_rank(known, **ranks).items()
    }


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("lama", "did you mean .*llama"),
        ("", f"known are {min([*FAMILIES, *RENAMED])}, "),
        (7, f"known are {min([*FAMILIES, *RENAMED])}, "),
        ("brand_new", "known are|did you mean"),
    ],
)
def test_a_model_type_that_is_none_is_refused_before_anything_is_read(model_type: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=f"is none that has a preset; ({said})"):
        ray_streamer.plan("s3://no-such-bucket-of-anybody/model", model_type=model_type)
