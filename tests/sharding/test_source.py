"""Rules as a slice source: each rank's results, element by element, and what is kept between ranks."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
from family_support.held import cut_numbers, numbers, resolve, results_of
from family_support.tiny_models import MODEL_TYPES

from ray_streamer.errors import SettingsError, ShardingError
from ray_streamer.sharding import Mesh, Replicate, ShardRules, Skip, Split
from ray_streamer.sharding.families import FAMILIES
from ray_streamer.sharding.presets import Layout
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.testing.layouts import (
    ModelLayout,
    TensorSpec,
    llama_layout,
    mixtral_layout,
    phi3_layout,
    qwen3_moe_layout,
)
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from collections.abc import Callable

    from family_support.saved import Saved

    from ray_streamer.checkpoint.index import CheckpointIndex

LLAMA = llama_layout(32, 2, 8, 2, 24, 11)
MIXTRAL = mixtral_layout(32, 3, 8, 2, 16, 101, experts=5)
LAYOUTS = {
    "llama": LLAMA,
    "phi3": phi3_layout(32, 2, 8, 2, 24, 11),
    "mixtral": MIXTRAL,
    "qwen3_moe": qwen3_moe_layout(32, 2, 8, 2, 16, 101, experts=5),
}
MESHES = {
    "tp1": Mesh(),
    "tp4": Mesh(tp=4),
    "tp2-pp2": Mesh(tp=2, pp=2),
    "dp2": Mesh(tp=2, dp=2),
}
EXPERT_MESHES = MESHES | {"ep": Mesh(tp=4, ep=4), "ep2": Mesh(tp=4, ep=2), "ep-dp": Mesh(tp=2, dp=2, ep=4, pp=2)}


def _check(index: CheckpointIndex, source: RuleSlices) -> None:
    """Every rank's results are the slices of its tensors, cut out box by box."""
    rules = ShardRules.for_config(index.config, first=source.rules, layout=source.layout, mtp=source.mtp)
    held = resolve(index, rules, source.mesh)
    for rank in range(source.mesh.num_ranks):
        parts = [held.slice_of(tensor, rank) for tensor in range(len(index))]
        slices = source(index, rank)
        found = results_of(index, slices)
        assert list(found) == [name for name, part in zip(index.names, parts, strict=True) if part is not None]
        for tensor, (name, part) in enumerate(zip(index.names, parts, strict=True)):
            if part is not None:
                assert torch.equal(found[name], cut_numbers(index, tensor, part)), f"{name} on rank {rank}"
                assert slices.results[slices.results.names.index(name)].stored == index.dtype_of(tensor)


def _index(layout: ModelLayout) -> CheckpointIndex:
    return header_only_index(layout.tensors, num_files=2, config=layout.config)


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_family_on_every_rank(model_type: str, layout: Layout, saved: Callable[[str], Saved]) -> None:
    if layout == "transformers" and FAMILIES[model_type].transformers is None:
        pytest.skip("transformers has no plan for these")
    index = saved(model_type).index
    for mesh in (Mesh(tp=2), Mesh(tp=4), Mesh(tp=2, pp=2)):
        source = RuleSlices(mesh=mesh, layout=layout)
        _check(index, source)


@pytest.mark.parametrize("mesh", EXPERT_MESHES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_meshes(name: str, mesh: str) -> None:
    if mesh not in MESHES and not name.endswith(("moe", "mixtral")):
        pytest.skip("has no experts")
    _check(_index(LAYOUTS[name]), RuleSlices(mesh=EXPERT_MESHES[mesh], layout="vllm"))


def test_ranks_that_hold_the_same_get_the_same_object_as_long_as_the_index_lives() -> None:
    index = _index(LLAMA)
    source = RuleSlices(mesh=Mesh(tp=2, dp=3))
    slices = [source(index, rank) for rank in range(6)]
    assert len({id(held) for held in slices}) == 2
    assert slices[0] is slices[2] is slices[4]
    assert slices[0].tensor_ids is slices[1].tensor_ids
    assert slices[0].results.names is index.names
    watched = weakref.ref(index)
    del index, slices
    gc.collect()
    assert watched() is None


def test_a_source_crosses_to_other_processes_without_what_it_worked_out() -> None:
    index = _index(LLAMA)
    source = RuleSlices(mesh=Mesh(tp=2), rules=ShardRules({"*.down_proj.weight": Replicate()}), fuse=True)
    small = len(pickle.dumps(source))
    here = source(index, 1)
    assert len(pickle.dumps(source)) == small < 2000
    there = pickle.loads(pickle.dumps(source))
    assert there == source
    again = there(index, 1)
    assert (again.results, again.patterns) == (here.results, here.patterns)


def test_what_no_rank_holds_is_no_result() -> None:
    index = _index(LLAMA)
    rules = ShardRules({"*.layers.1.*": Split(0)}, optional=True)
    skipped = ShardRules.for_config(LLAMA.config)
    source = RuleSlices(rules=ShardRules({"lm_head.weight": Skip()}) + rules + skipped, rename={"lm_head": "model"})
    assert "model.weight" not in source(index, 0).results.names


def test_tensors_that_share_a_result_say_so_in_rows() -> None:
    index = _index(LLAMA)
    slices = RuleSlices(mesh=Mesh(tp=4), fuse=True)(index, 3)
    result = slices.results.names.index("model.layers.1.self_attn.qkv_proj.weight")
    assert slices.results[result].shape == (16, 32)
    rows = slices.result_ids == result
    offsets = {
        index.names[tensor].split(".")[-2]: offset
        for tensor, offset in zip(slices.tensor_ids[rows].tolist(), slices.target_offsets[rows].tolist(), strict=True)
    }
    assert offsets == {"q_proj": 0, "k_proj": 8 * 32, "v_proj": 12 * 32}


def test_modules_that_are_called_by_numbers_are_fused() -> None:
    index = header_only_index([TensorSpec(f"mlp.{module}.weight", "BF16", (8, 4)) for module in (0, 1, 2)], num_files=1)
    fuse = {"gate_up": ("2", "0")}
    slices = RuleSlices(mesh=Mesh(tp=2), rules=ShardRules({"*": Split(0)}), fuse=fuse)(index, 1)
    assert sorted(slices.results.names) == ["mlp.1.weight", "mlp.gate_up.weight"]
    parts = {name: numbers(index, tensor)[4:] for tensor, name in enumerate(index.names)}
    expected = torch.cat([parts["mlp.2.weight"], parts["mlp.0.weight"]])
    assert torch.equal(results_of(index, slices)["mlp.gate_up.weight"], expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"unmatched": "eror"}, SettingsError, "unmatched is one of error, replicate", id="unmatched"),
        pytest.param({"layout": "megatron"}, SettingsError, "layout is one of generic", id="layout"),
        pytest.param({"mesh": 8}, SettingsError, r"mesh is a ray_streamer\.Mesh, .* got int", id="mesh"),
        pytest.param({"rules": {"*": 0}}, ShardingError, "needs a placement", id="rules"),
        pytest.param({"fuse": ["x"]}, ShardingError, "fuse is True, or a mapping", id="fuse"),
        pytest.param({"rename": {"(": ""}}, ShardingError, "regular expression", id="rename"),
        pytest.param({"rename": {"(a)": r"\2"}}, ShardingError, "invalid group reference", id="replacement"),
        pytest.param({"rename": {"a": r"\g<b>"}}, ShardingError, "unknown group name", id="group-name"),
        pytest.param({"rename": {"a": b"b"}}, ShardingError, "pairs of a regular expression", id="bytes"),
        pytest.param({"experts": [[0], [1]]}, SettingsError, "give ep=True, too", id="experts-without-ep"),
        pytest.param(
            {"experts": {0: []}, "mesh": Mesh(tp=2)}, SettingsError, "give ep=True, too", id="layers-without-ep"
        ),
        pytest.param({"dtype": "int8"}, ShardingError, "dtype is one of", id="dtype"),
    ],
)
def test_arguments_that_cannot_mean_anything_are_refused_where_they_are_given(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RuleSlices(**arguments)


@pytest.mark.parametrize(
    "rules", [{"*": Split(0)}, [("*", Split(0))], iter([("*", Split(0))])], ids=lambda it: type(it).__name__
)
def test_rules_are_what_the_functions_take(rules: Any) -> None:
    assert RuleSlices(rules=rules) == RuleSlices(rules=ShardRules({"*": Split(0)}))


def test_a_rank_beyond_the_mesh_is_refused() -> None:
    with pytest.raises(SettingsError, match="rank 2 is outside the 2 ranks"):
        RuleSlices(mesh=Mesh(tp=2))(_index(LLAMA), 2)


def test_what_cannot_be_fused_on_one_rank_is_refused_on_all() -> None:
    # Five rows over two ranks: the second rank's parts are shorter, and one of them is padded.
    specs = [TensorSpec(f"m.{part}_proj.weight", "BF16", (8, 4)) for part in ("gate", "up")]
    index = header_only_index(specs, num_files=1)
    rules = ShardRules([("*.gate_proj.weight", Split(0, unit=3)), ("*", Split(0))])
    source = RuleSlices(mesh=Mesh(tp=2), rules=rules, fuse=True)
    for rank in range(2):
        with pytest.raises(ShardingError, match=r"have the shapes|are not whole units"):
            source(index, rank)


def test_a_fused_name_that_the_checkpoint_has_already_is_refused() -> None:
    specs = [TensorSpec(f"m.{part}_proj.weight", "BF16", (8, 4)) for part in ("gate", "up", "gate_up")]
    index = header_only_index(specs, num_files=1)
    with pytest.raises(ShardingError, match=r"gate_up_proj\.weight cannot be fused: the checkpoint has such a tensor"):
        RuleSlices(rules=ShardRules({"*": Split(0)}), fuse=True)(index, 0)


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(dp=2)])
def test_where_nothing_is_cut_a_model_of_no_known_family_is_held_whole(mesh: Mesh) -> None:
    index = header_only_index(
        [TensorSpec("blocks.0.mix.weight", "F32", (4, 6)), TensorSpec("norm", "F32", (6,))], num_files=1
    )
    for rank in range(mesh.num_ranks):
        results = RuleSlices(mesh=mesh, dtype="bfloat16")(index, rank).results
        assert {(results[at].name, results[at].shape) for at in range(2)} == {
            ("blocks.0.mix.weight", (4, 6)),
            ("norm", (6,)),
        }
    with pytest.raises(ShardingError, match="no preset for model type None"):
        RuleSlices(mesh=mesh, layout="vllm")(index, 0)
