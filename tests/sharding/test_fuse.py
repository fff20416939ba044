"""Fused and renamed results: what a rank gets is what concatenating its unfused slices gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ray_streamer.errors import ShardingError
from ray_streamer.sharding import Mesh, Replicate, ShardRules, SliceTable, Split, resolve_slices
from ray_streamer.sharding.slice_tables import fuse_slices, rename_results
from ray_streamer.testing.layouts import TensorSpec, llama_layout
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex

LLAMA = llama_layout(32, 2, 8, 2, 24, 11)


def _whole(index: CheckpointIndex, tensor: int) -> np.ndarray:
    shape = index.shape_of(tensor)
    return np.arange(int(np.prod(shape)), dtype=float).reshape(shape) + 1e6 * (tensor + 1)


def _results_of(index: CheckpointIndex, table: SliceTable, rank: int) -> dict[str, np.ndarray]:
    """The rank's results by name, box by box; what no box fills is NaN."""
    results: dict[str, np.ndarray] = {}
    for tensor, name in enumerate(index.names):
        part = table.slice_of(tensor, rank)
        if part is None:
            continue
        named = table.results.name_of(tensor) if table.results else name
        result = results.setdefault(named, np.full(part.shape, np.nan))
        assert result.shape == part.shape
        whole = _whole(index, tensor)
        for box in part.boxes:
            target = tuple(slice(land, land + size) for land, size in zip(box.lands, box.shape, strict=True))
            assert np.isnan(result[target]).all(), "two boxes land on one element"
            result[target] = whole[tuple(map(slice, box.starts, box.stops))] if whole.shape else whole
    return results


@pytest.mark.parametrize("mesh", [Mesh(tp=1), Mesh(tp=4), Mesh(tp=2, pp=2), Mesh(tp=2, dp=2)])
def test_a_fused_result_is_the_concatenation_of_its_parts(mesh: Mesh) -> None:
    index = header_only_index(LLAMA.tensors, num_files=1, config=LLAMA.config)
    plain = resolve_slices(index, ShardRules.for_config(LLAMA.config), mesh)
    fused = fuse_slices(index, plain, True)
    for rank in range(mesh.num_ranks):
        expected = _results_of(index, plain, rank)
        for layer in (f"model.layers.{number}." for number in range(2)):
            if f"{layer}mlp.up_proj.weight" in expected:
                parts = [expected.pop(f"{layer}self_attn.{part}_proj.weight") for part in "qkv"]
                expected[f"{layer}self_attn.qkv_proj.weight"] = np.concatenate(parts)
                parts = [expected.pop(f"{layer}mlp.{part}_proj.weight") for part in ("gate", "up")]
                expected[f"{layer}mlp.gate_up_proj.weight"] = np.concatenate(parts)
        found = _results_of(index, fused, rank)
        assert found.keys() == expected.keys()
        for name, result in found.items():
            np.testing.assert_array_equal(result, expected[name])


def _quantized(stored: dict[str, tuple[str, tuple[int, ...]]], **config: Any) -> CheckpointIndex:
    specs = [TensorSpec(f"{part}_proj.{name}", *spec) for part in ("gate", "up") for name, spec in stored.items()]
    return header_only_index(specs, num_files=1, config={"quantization_config": config})


def test_packed_words_are_fused_along_outputs_and_what_counts_none_stays_apart() -> None:
    stored = {
        "qweight": ("I32", (8, 32)),
        "qzeros": ("I32", (2, 4)),
        "scales": ("F16", (2, 32)),
        "g_idx": ("I32", (64,)),
    }
    index = _quantized(stored, bits=4, group_size=32)
    plain = resolve_slices(index, ShardRules({"*_proj.weight": Split(0)}), Mesh(tp=2))
    parts, fused = (_results_of(index, table, 1) for table in (plain, fuse_slices(index, plain, True)))
    assert fused.keys() == {*(f"gate_up_proj.{name}" for name in list(stored)[:3]), "gate_proj.g_idx", "up_proj.g_idx"}
    for name in list(stored)[:3]:
        joined = np.concatenate([parts[f"{part}_proj.{name}"] for part in ("gate", "up")], axis=1)
        np.testing.assert_array_equal(fused[f"gate_up_proj.{name}"], joined)


@pytest.mark.parametrize(("shape", "slots"), [((), (2,)), ((1,), (2,)), ((1, 1), (2, 1))])
def test_scales_of_whole_weights_become_slots(shape: tuple[int, ...], slots: tuple[int, ...]) -> None:
    index = _quantized({"weight": ("F8_E4M3", (32, 16)), "weight_scale": ("F32", shape)})
    table = fuse_slices(index, resolve_slices(index, ShardRules({"*.weight": Split(0)}), Mesh(tp=2)), True)
    result = _results_of(index, table, 1)["gate_up_proj.weight_scale"]
    assert result.shape == slots
    assert sorted(result.ravel().tolist()) == sorted(
        _whole(index, index.position(f"{part}_proj.weight_scale")).item() for part in ("gate", "up")
    )


def test_blocks_are_fused_when_they_are_whole() -> None:
    for rows, blocks in ((256, 2), (192, 2)):
        stored = {"weight": ("F8_E4M3", (rows, 128)), "weight_scale_inv": ("F32", (blocks, 1))}
        index = _quantized(stored, weight_block_size=[128, 128])
        plain = resolve_slices(index, ShardRules({"*.weight": Replicate()}), Mesh())
        if rows == 256:
            assert _results_of(index, fuse_slices(index, plain, True), 0)["gate_up_proj.weight_scale_inv"].shape == (
                4,
                1,
            )
        else:
            with pytest.raises(ShardingError, match="192 indices of one part are no whole blocks of 128"):
                fuse_slices(index, plain, True)


def _pair(first: tuple[str, tuple[int, ...]], second: tuple[str, tuple[int, ...]], **more: Any) -> CheckpointIndex:
    specs = [TensorSpec("m.gate_proj.weight", *first), TensorSpec("m.up_proj.weight", *second)]
    return header_only_index([*specs, *(TensorSpec(*spec) for spec in more.values())], num_files=1)


@pytest.mark.parametrize(
    ("index", "rules", "fuse", "message"),
    [
        pytest.param(
            _pair(("BF16", (8, 4)), ("F16", (8, 4))), None, True, r"up_proj.weight is F16 \[8, 4\]", id="dtypes"
        ),
        pytest.param(_pair(("BF16", (8, 4)), ("BF16", (8, 6))), None, True, "along dimension 0", id="shapes"),
        pytest.param(_pair(("BF16", (2, 8, 4)), ("BF16", (2, 8, 4))), None, True, "has 3 dimensions", id="stacked"),
        pytest.param(
            _pair(("BF16", (8, 4)), ("BF16", (8, 4)), bias=("m.up_proj.bias", "BF16", (8,))),
            None,
            True,
            "there is m.up_proj.bias, but no m.gate_proj.bias",
            id="one-has-a-bias",
        ),
        pytest.param(
            _pair(("BF16", (8, 4)), ("BF16", (8, 4))),
            {"*.gate_proj.weight": Split(0), "*": Split(1)},
            True,
            "the parts of rank 0 have the shapes",
            id="cut-differently",
        ),
        pytest.param(
            _pair(("BF16", (8, 4)), ("BF16", (8, 4))), None, {"x": ("q", "k")}, "none of the modules", id="no-modules"
        ),
        pytest.param(
            _pair(("BF16", (8, 4)), ("BF16", (8, 4))),
            None,
            {"x": ("gate_proj", "side_proj")},
            "there is no m.side_proj",
            id="module-absent",
        ),
        pytest.param(_pair(("BF16", (8, 4)), ("BF16", (8, 4))), None, {"x": "gate"}, "two or more modules", id="text"),
        pytest.param(_pair(("BF16", (8, 4)), ("BF16", (8, 4))), None, ["x"], "fuse is True, or a mapping", id="list"),
        pytest.param(
            _pair(("BF16", (8, 4)), ("BF16", (8, 4))), None, {"x": ("a", "b"), "y": ("b", "c")}, "twice", id="twice"
        ),
    ],
)
def test_what_cannot_be_fused_is_refused(index: CheckpointIndex, rules: Any, fuse: Any, message: str) -> None:
    table = resolve_slices(index, ShardRules(rules or {"*": Replicate()}), Mesh(tp=2))
    with pytest.raises(ShardingError, match=message):
        fuse_slices(index, table, fuse)


def test_projections_that_a_model_lacks_are_left_alone() -> None:
    index = header_only_index([TensorSpec("a.q_proj.weight", "BF16", (8, 4))], num_files=1)
    table = fuse_slices(index, resolve_slices(index, ShardRules({"*": Split(0)}), Mesh(tp=2)), True)
    assert _results_of(index, table, 0).keys() == {"a.q_proj.weight"}


def test_results_are_renamed_fused_or_not() -> None:
    index = header_only_index(LLAMA.tensors, num_files=1, config=LLAMA.config)
    table = fuse_slices(index, resolve_slices(index, ShardRules.for_config(LLAMA.config), Mesh()), True)
    renamed = rename_results(index, table, {r"^model\.": "", "qkv_proj": "Wqkv"})
    assert {"layers.1.self_attn.Wqkv.weight", "embed_tokens.weight", "lm_head.weight"} <= _results_of(
        index, renamed, 0
    ).keys()
    assert rename_results(index, table, str.upper).results.names[0] == table.results.names[0].upper()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        pytest.param(
            {r"layers\.\d+": "layers"}, r"rename makes model.layers.\S+ of both model.layers.0\S+ and", id="two"
        ),
        pytest.param(lambda name: None, "rename makes None of", id="nothing"),
        pytest.param({"(": ""}, "regular expression", id="no-expression"),
        pytest.param([("a", "b", "c")], "pairs", id="three"),
        pytest.param(["ab", 3], "pairs", id="no-pairs"),
    ],
)
def test_names_that_cannot_be_are_refused(rename: Any, message: str) -> None:
    index = header_only_index(LLAMA.tensors, num_files=1, config=LLAMA.config)
    table = resolve_slices(index, ShardRules.for_config(LLAMA.config), Mesh())
    with pytest.raises(ShardingError, match=message):
        rename_results(index, table, rename)
