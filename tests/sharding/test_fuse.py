"""Fused and renamed results: what a rank gets is what concatenating its unfused slices gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from family_support.held import numbers, results_of

from ray_streamer.errors import ShardingError
from ray_streamer.sharding import Mesh, Replicate, RuleSlices, ShardRules, Split
from ray_streamer.testing.layouts import TensorSpec, llama_layout
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex

LLAMA = llama_layout(32, 2, 8, 2, 24, 11)


def _results(index: CheckpointIndex, rank: int, **arguments: Any) -> dict[str, torch.Tensor]:
    """The rank's results; every element of the checkpoint is another number."""
    return results_of(index, RuleSlices(**arguments)(index, rank))


@pytest.mark.parametrize("mesh", [Mesh(tp=1), Mesh(tp=4), Mesh(tp=2, pp=2), Mesh(tp=2, dp=2)])
def test_a_fused_result_is_the_concatenation_of_its_parts(mesh: Mesh) -> None:
    index = header_only_index(LLAMA.tensors, num_files=1, config=LLAMA.config)
    for rank in range(mesh.num_ranks):
        expected = _results(index, rank, mesh=mesh)
        for layer in (f"model.layers.{number}." for number in range(2)):
            if f"{layer}mlp.up_proj.weight" in expected:
                parts = [expected.pop(f"{layer}self_attn.{part}_proj.weight") for part in "qkv"]
                expected[f"{layer}self_attn.qkv_proj.weight"] = torch.cat(parts)
                parts = [expected.pop(f"{layer}mlp.{part}_proj.weight") for part in ("gate", "up")]
                expected[f"{layer}mlp.gate_up_proj.weight"] = torch.cat(parts)
        found = _results(index, rank, mesh=mesh, fuse=True)
        assert found.keys() == expected.keys()
        for name, result in found.items():
            assert torch.equal(result, expected[name])


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
    rules = ShardRules({"*_proj.weight": Split(0)})
    parts, fused = (_results(index, 1, mesh=Mesh(tp=2), rules=rules, fuse=fuse) for fuse in (False, True))
    assert fused.keys() == {*(f"gate_up_proj.{name}" for name in list(stored)[:3]), "gate_proj.g_idx", "up_proj.g_idx"}
    for name in list(stored)[:3]:
        joined = torch.cat([parts[f"{part}_proj.{name}"] for part in ("gate", "up")], dim=1)
        assert torch.equal(fused[f"gate_up_proj.{name}"], joined)


@pytest.mark.parametrize(("shape", "slots"), [((), (2,)), ((1,), (2,)), ((1, 1), (2, 1))])
def test_scales_of_whole_weights_become_slots(shape: tuple[int, ...], slots: tuple[int, ...]) -> None:
    index = _quantized({"weight": ("F8_E4M3", (32, 16)), "weight_scale": ("F32", shape)})
    rules = ShardRules({"*.weight": Split(0)})
    result = _results(index, 1, mesh=Mesh(tp=2), rules=rules, fuse=True)["gate_up_proj.weight_scale"]
    assert result.shape == slots
    assert result.ravel().tolist() == [
        numbers(index, index.position(f"{part}_proj.weight_scale")).item() for part in ("gate", "up")
    ]


def test_blocks_are_fused_when_they_are_whole() -> None:
    for rows, blocks in ((256, 2), (192, 2)):
        stored = {"weight": ("F8_E4M3", (rows, 128)), "weight_scale_inv": ("F32", (blocks, 1))}
        index = _quantized(stored, weight_block_size=[128, 128])
        rules = ShardRules({"*.weight": Replicate()})
        if rows == 256:
            assert _results(index, 0, rules=rules, fuse=True)["gate_up_proj.weight_scale_inv"].shape == (4, 1)
        else:
            with pytest.raises(ShardingError, match="192 indices of one part are no whole blocks of 128"):
                _results(index, 0, rules=rules, fuse=True)


@pytest.mark.parametrize(("rows", "tp", "fits"), [(64, 1, False), (128, 1, True), (128, 2, False), (256, 2, True)])
def test_a_block_that_a_part_does_not_fill_has_no_other_part_behind_it(rows: int, tp: int, *, fits: bool) -> None:
    """One row of scales for each part, which an engine would look up for the wrong outputs."""
    index = _quantized(
        {"weight": ("F8_E4M3", (rows, 128)), "weight_scale_inv": ("F32", (-(-rows // 128), 1))},
        weight_block_size=[128, 128],
    )
    arguments: dict[str, Any] = {"mesh": Mesh(tp=tp), "rules": ShardRules({"*.weight": Split(0)})}
    apart = _results(index, tp - 1, **arguments)
    if fits:
        fused = _results(index, tp - 1, fuse=True, **arguments)
        expected = torch.cat([apart[f"{part}_proj.weight_scale_inv"] for part in ("gate", "up")])
        assert torch.equal(fused["gate_up_proj.weight_scale_inv"], expected)
        assert expected.shape == (2 * rows // tp // 128, 1)
    else:
        with pytest.raises(ShardingError, match=r"hold 64 outputs of a part, which do not fill its one block of 128"):
            _results(index, tp - 1, fuse=True, **arguments)


@pytest.mark.parametrize("hints", [{"weight_block_size": [32, 32]}, {}])
def test_scales_of_parts_of_one_block_follow_their_weights(hints: dict[str, Any]) -> None:
    index = _quantized({"weight": ("F8_E4M3", (32, 64)), "weight_scale_inv": ("F32", (1, 2))}, **hints)
    arguments: dict[str, Any] = {"rules": ShardRules({"*.weight": Replicate()})}
    apart, fused = _results(index, 0, **arguments), _results(index, 0, fuse=True, **arguments)
    assert fused.keys() == {"gate_up_proj.weight", "gate_up_proj.weight_scale_inv"}
    expected = torch.cat([apart[f"{part}_proj.weight_scale_inv"] for part in ("gate", "up")])
    assert torch.equal(fused["gate_up_proj.weight_scale_inv"], expected)


@pytest.mark.parametrize(("rows", "tp"), [(24, 1), (32, 2)])
def test_scales_of_parts_that_do_not_fill_their_one_block_are_refused(rows: int, tp: int) -> None:
    stored = {"weight": ("F8_E4M3", (rows, 64)), "weight_scale_inv": ("F32", (1, 2))}
    index = _quantized(stored, weight_block_size=[32, 32])
    with pytest.raises(ShardingError, match=f"hold {rows // tp} outputs of a part, which do not fill its one block"):
        _results(index, 0, mesh=Mesh(tp=tp), rules=ShardRules({"*.weight": Split(0)}), fuse=True)


def test_a_part_of_one_block_before_one_of_several() -> None:
    rows = {"k": 32, "q": 64}
    specs = [TensorSpec(f"m.{part}.weight", "F8_E4M3", (count, 64)) for part, count in rows.items()]
    specs += [TensorSpec(f"m.{part}.weight_scale_inv", "F32", (count // 32, 2)) for part, count in rows.items()]
    index = header_only_index(specs, num_files=1)
    found = _results(index, 0, rules=ShardRules({"*.weight": Replicate()}), fuse={"kq": ("k", "q")})
    assert found["m.kq.weight_scale_inv"].shape == (3, 2)


def test_a_number_for_each_input_stays_apart_in_two_dimensions() -> None:
    index = _quantized({"weight": ("F8_E4M3", (32, 64)), "pre_quant_scale": ("F32", (1, 64))})
    found = _results(index, 0, rules=ShardRules({"*.weight": Replicate()}), fuse=True)
    assert found.keys() == {"gate_up_proj.weight", "gate_proj.pre_quant_scale", "up_proj.pre_quant_scale"}


def test_a_short_part_among_parts_of_several_blocks() -> None:
    """As where queries have many heads and there is one head of keys; nothing but the shapes tells of blocks."""
    rows = {"q": 512, "k": 64, "v": 64}
    stored = [TensorSpec(f"m.{part}_proj.weight", "F8_E4M3", (count, 128)) for part, count in rows.items()]
    scales = [
        TensorSpec(f"m.{part}_proj.weight_scale_inv", "F32", (-(-count // 128), 1)) for part, count in rows.items()
    ]
    index = header_only_index([*stored, *scales], num_files=1)
    with pytest.raises(ShardingError, match="do not fill its one block of 128"):
        _results(index, 0, rules=ShardRules({"*.weight": Replicate()}), fuse=True)


@pytest.mark.parametrize(("name", "length"), [("pre_quant_scale", 128), ("input_scale", 128), ("curious", 96)])
def test_vectors_that_do_not_count_outputs_stay_apart(name: str, length: int) -> None:
    index = _quantized({"weight": ("F8_E4M3", (128, 128)), "weight_scale": ("F32", (1,)), name: ("F32", (length,))})
    found = _results(index, 0, rules=ShardRules({"*.weight": Replicate()}), fuse=True)
    assert {held for held in found if held.endswith(name)} == {f"{part}_proj.{name}" for part in ("gate", "up")}
    assert "gate_up_proj.weight" in found


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
            "the parts of the ranks with tp index 0 have the shapes",
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
    with pytest.raises(ShardingError, match=message):
        _results(index, 0, mesh=Mesh(tp=2), rules=ShardRules(rules or {"*": Replicate()}), fuse=fuse)


def test_projections_that_a_model_lacks_are_left_alone() -> None:
    index = header_only_index([TensorSpec("a.q_proj.weight", "BF16", (8, 4))], num_files=1)
    found = _results(index, 0, mesh=Mesh(tp=2), rules=ShardRules({"*": Split(0)}), fuse=True)
    assert found.keys() == {"a.q_proj.weight"}


def test_results_are_renamed_fused_or_not() -> None:
    index = header_only_index(LLAMA.tensors, num_files=1, config=LLAMA.config)
    renamed = _results(index, 0, fuse=True, rename={r"^model\.": "", "qkv_proj": "Wqkv"})
    assert {"layers.1.self_attn.Wqkv.weight", "embed_tokens.weight", "lm_head.weight"} <= renamed.keys()
    plain = _results(index, 0, fuse=True)
    assert list(_results(index, 0, fuse=True, rename=str.upper)) == [name.upper() for name in plain]


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
    with pytest.raises(ShardingError, match=message):
        _results(index, 0, rename=rename)
