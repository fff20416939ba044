"""Slices into the caller's strides leave every element at its index, as torch's own copies show; what cannot be said stays as it was."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split, SplitVocabulary
from ray_streamer.slices import Move, RankSlices, ResultSpec, Side
from ray_streamer.slices.given_strides import with_strides
from ray_streamer.slices.move import row_major
from ray_streamer.testing.layouts import TensorSpec
from ray_streamer.testing.oracle import landed
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint import CheckpointIndex

TENSORS = [
    TensorSpec("embed", "F32", (10, 6)),
    TensorSpec("q_proj", "F32", (8, 6)),
    TensorSpec("k_proj", "F32", (4, 6)),
    TensorSpec("o_proj", "BF16", (6, 8)),
    TensorSpec("experts", "F32", (4, 6, 2)),
    TensorSpec("norm", "F32", (6,)),
    TensorSpec("scale", "F32", ()),
]
RULES = ShardRules(
    {
        "embed": SplitVocabulary(pad_to=8),
        "q_proj": Split(0),
        "k_proj": Split(0),
        "o_proj": Split(1),
        "experts": Split(1, num_parts=3),
    }
)
INDEX = header_only_index(TENSORS, num_files=1)


@st.composite
def given_strides(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor of that shape whose dimensions lie in any order in a larger memory."""
    order, strides, step = draw(st.permutations(range(len(shape)))), [0] * len(shape), draw(st.integers(1, 3))
    for dim in order:
        strides[dim] = step
        step = step * shape[dim] + draw(st.integers(0, 3))
    return tuple(strides)


def elements_of(index: CheckpointIndex, tensor: int) -> torch.Tensor:
    count = prod(index.shape_of(tensor))
    dtype = getattr(torch, index.dtype_of(tensor).torch_name)
    return torch.arange(1 + 100 * tensor, 1 + 100 * tensor + count).to(dtype)


def results_of(slices: RankSlices) -> dict[str, torch.Tensor]:
    return landed(slices, lambda tensor: elements_of(INDEX, tensor))


@given(st.data(), st.sampled_from([0, 1]), st.booleans())
def test_elements_keep_their_index(data: st.DataObject, rank: int, fused: bool) -> None:
    fuse = {"qk": ("q_proj", "k_proj")} if fused else False
    said = RuleSlices(mesh=Mesh(tp=2), rules=RULES, fuse=fuse, dtype={"o_proj": "float32"})(INDEX, rank)
    chosen = data.draw(st.sets(st.sampled_from(said.results.names)))
    strides = {result.name: data.draw(given_strides(result.shape)) for result in said.results if result.name in chosen}
    restrided = with_strides(said, strides)
    assert {result.name: result.strides for result in restrided.results if result.strides is not None} == strides
    expected = results_of(said)
    for name, tensor in results_of(restrided).items():
        assert torch.equal(tensor, expected[name])


def test_results_that_are_alike_share_their_patterns() -> None:
    specs = [TensorSpec(f"layers.{layer}.up_proj", "F32", (8, 6)) for layer in range(50)]
    index = header_only_index(specs, num_files=1)
    said = RuleSlices(mesh=Mesh(tp=2), rules=ShardRules({"*": Split(0)}))(index, 1)
    restrided = with_strides(said, dict.fromkeys(said.results.names, (1, 9)))
    assert len(restrided.patterns) == len(said.patterns) + 1
    assert len(restrided.results.forms) == len(said.results.forms) + 1


def moved(shape: tuple[int, ...], move: Move, strides: tuple[int, ...]) -> RankSlices:
    spec = ResultSpec(name="r", dtype="F32", shape=shape)
    return with_strides(RankSlices.from_rows(INDEX, [spec], [("q_proj", "r", [move])]), {"r": strides})


@pytest.mark.parametrize(
    ("shape", "move"),
    [
        pytest.param((8, 6), Move((48,), Side(0, (1,)), Side(0, (1,))), id="one-run-over-all"),
        pytest.param((2, 4, 6), Move((48,), Side(0, (1,)), Side(0, (1,))), id="one-run-over-three-dimensions"),
        pytest.param((8, 6), Move((18,), Side(5, (1,)), Side(12, (1,))), id="whole-rows"),
        pytest.param((8, 6), Move((4, 3), Side(0, (6, 2)), Side(1, (12, 2))), id="every-other-index"),
        pytest.param((8, 6), Move((2, 3, 3), Side(0, (24, 6, 1)), Side(8, (18, 6, 1))), id="rows-of-rows"),
        pytest.param((6, 8), Move((6, 8), Side(0, (1, 6)), Side(0, (8, 1))), id="transposed"),
        pytest.param((8, 1, 6), Move((8, 6), Side(0, (6, 1)), Side(0, (6, 1))), id="a-dimension-of-one"),
    ],
)
def test_moves_of_other_sources_are_said_in_strides_too(shape: tuple[int, ...], move: Move) -> None:
    # A transposed tensor in a larger memory.
    strides = tuple(reversed(row_major(tuple(size + 1 for size in reversed(shape)))))
    restrided = moved(shape, move, strides)
    assert restrided.results[0].strides == strides
    plain = RankSlices.from_rows(INDEX, [ResultSpec(name="r", dtype="F32", shape=shape)], [("q_proj", "r", [move])])
    assert torch.equal(results_of(restrided)["r"], results_of(plain)["r"])


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(Move((6,), Side(0, (1,)), Side(0, (7,))), id="diagonal"),
        pytest.param(Move((4,), Side(0, (1,)), Side(4, (1,))), id="over-the-end-of-a-row"),
        pytest.param(Move((3, 3), Side(0, (3, 1)), Side(0, (3, 1))), id="two-dimensions-over-the-end-of-a-row"),
        pytest.param(Move((2,), Side(0, (1,)), Side(60, (1,))), id="outside"),
    ],
)
def test_what_steps_across_dimensions_is_left_as_it_was(move: Move) -> None:
    restrided = moved((8, 6), move, (1, 8))
    assert restrided.results[0].strides is None
    assert restrided.patterns[restrided.pattern_ids[0]] == (move,)
