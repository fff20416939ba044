"""The geometry of placements against torch: chunk for even and uneven splits, reshaping by heads for whole heads."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.errors import ShardingError
from ray_streamer.sharding import (
    Part,
    Placement,
    Replicate,
    Skip,
    Split,
    SplitGroups,
    SplitVocabulary,
    TensorSlice,
)

Cut = Callable[[torch.Tensor, TensorSlice], torch.Tensor]


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(prod(shape), dtype=torch.float64).reshape(shape)


def slices(placement: Placement, shape: tuple[int, ...], tp: int) -> list[TensorSlice]:
    assert placement.refusal(shape, tp) is None
    found = [placement.share_of(shape, tp_index=index, tp=tp) for index in range(tp)]
    return [part for part in found if part is not None]


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_split_is_torch_chunk_when_it_divides(cut: Cut, dim: int, tp: int) -> None:
    tensor = numbered(8, 12, 4)
    expected = torch.chunk(tensor, tp, dim)
    for part, chunk in zip(slices(Split(dim), tensor.shape, tp), expected, strict=True):
        assert torch.equal(cut(tensor, part), chunk)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(("size", "tp"), [(130, 4), (9, 8), (8, 8), (3, 8), (100, 8), (0, 4), (7, 1)])
def test_vocabulary_is_torch_chunk_with_empty_chunks_at_the_end(cut: Cut, dim: int, size: int, tp: int) -> None:
    tensor = numbered(size, 2) if dim == 0 else numbered(2, size)
    chunks = list(torch.chunk(tensor, tp, dim))[:tp]
    chunks += [tensor.narrow(dim, 0, 0)] * (tp - len(chunks))
    for part, chunk in zip(slices(SplitVocabulary(dim), tensor.shape, tp), chunks, strict=True):
        assert torch.equal(cut(tensor, part), chunk)


@pytest.mark.parametrize("tail", [(), (6,)], ids=["bias", "weight"])
def test_heads_are_cut_whole(cut: Cut, tail: tuple[int, ...]) -> None:
    tensor = numbered(12 * 5, *tail)
    by_head = tensor.reshape(12, 5, *tail)
    for rank, part in enumerate(slices(Split(0, heads=12), tensor.shape, 4)):
        assert torch.equal(cut(tensor, part), by_head[[3 * rank, 3 * rank + 1, 3 * rank + 2]].flatten(0, 1))


@pytest.mark.parametrize(
    ("kv_heads", "tp", "head_of_rank"),
    [
        pytest.param(1, 4, [0, 0, 0, 0], id="one-head-for-all"),
        pytest.param(2, 4, [0, 0, 1, 1], id="two-ranks-per-head"),
        pytest.param(2, 8, [0, 0, 0, 0, 1, 1, 1, 1], id="four-ranks-per-head"),
        pytest.param(4, 4, [0, 1, 2, 3], id="one-rank-per-head"),
        pytest.param(3, 6, [0, 0, 1, 1, 2, 2], id="not-a-power-of-two"),
    ],
)
@pytest.mark.parametrize("tail", [(), (3,)], ids=["bias", "weight"])
def test_fewer_kv_heads_than_ranks_are_shared(
    cut: Cut, kv_heads: int, tp: int, head_of_rank: list[int], tail: tuple[int, ...]
) -> None:
    tensor = numbered(kv_heads * 5, *tail)
    by_head = tensor.reshape(kv_heads, 5, *tail)
    for part, head in zip(slices(Split(0, kv_heads=kv_heads), tensor.shape, tp), head_of_rank, strict=True):
        assert torch.equal(cut(tensor, part), by_head[head])


def test_more_kv_heads_than_ranks_are_split(cut: Cut) -> None:
    tensor = numbered(8 * 2, 3)
    for rank, part in enumerate(slices(Split(0, kv_heads=8), tensor.shape, 4)):
        assert torch.equal(cut(tensor, part), tensor.reshape(8, 2, 3)[2 * rank : 2 * rank + 2].flatten(0, 1))


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("dim", [0, -1])
def test_fused_qkv_gives_each_rank_its_own_q_k_and_v(cut: Cut, tp: int, dim: int) -> None:
    q, kv, width = 8, 2, 3
    fused = numbered((q + 2 * kv) * width, 4) if dim == 0 else numbered(4, (q + 2 * kv) * width)
    rows = fused if dim == 0 else fused.T
    heads = rows.reshape(q + 2 * kv, width, 4)
    placement = Split(
        dim, parts=(Part(q * width, heads=q), Part(kv * width, kv_heads=kv), Part(kv * width, kv_heads=kv))
    )
    for rank, part in enumerate(slices(placement, tuple(fused.shape), tp)):
        queries = list(range(rank * q // tp, (rank + 1) * q // tp))
        # Each group of q / kv query heads attends to one key-value head: those that a rank's queries need.
        keys = sorted({query // (q // kv) for query in queries})
        mine = queries + [q + key for key in keys] + [q + kv + key for key in keys]
        expected = heads[mine].flatten(0, 1)
        assert torch.equal(cut(fused, part), expected if dim == 0 else expected.T)


def test_fused_gate_up_is_halved_in_each_half(cut: Cut) -> None:
    gate, up = numbered(8, 3), numbered(8, 3) + 100
    fused = torch.cat([gate, up])
    for rank, part in enumerate(slices(Split(0, parts=(8, 8)), tuple(fused.shape), 4)):
        assert torch.equal(cut(fused, part), torch.cat([gate.chunk(4)[rank], up.chunk(4)[rank]]))


@pytest.mark.parametrize(("size", "unit"), [(100, 1), (96, 32), (90 * 32, 32), (64, 64), (12, 4), (0, 4)])
@pytest.mark.parametrize("tp", [1, 3, 4, 8])
def test_units_stay_together_and_are_dealt_as_torch_chunk_deals(cut: Cut, size: int, unit: int, tp: int) -> None:
    tensor = numbered(size, 2)
    chunks = [chunk.flatten(0, 1) for chunk in torch.chunk(tensor.reshape(-1, unit, 2), tp)] if size else []
    chunks += [tensor[:0]] * (tp - len(chunks))
    for part, chunk in zip(slices(Split(0, unit=unit), tuple(tensor.shape), tp), chunks, strict=True):
        assert torch.equal(cut(tensor, part), chunk)


@pytest.mark.parametrize("tp", [2, 4])
def test_parts_of_units_are_chunks_of_each_part(cut: Cut, tp: int) -> None:
    gate, up = numbered(10, 3), numbered(10, 3) + 100
    for placement in (Split(0, parts=(Part(10, unit=1), Part(10, unit=1))), Split(0, num_parts=2, unit=1)):
        for rank, part in enumerate(slices(placement, (20, 3), tp)):
            expected = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
            assert torch.equal(cut(torch.cat([gate, up]), part), expected)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("tail", [(), (3,)], ids=["bias", "weight"])
def test_heads_that_take_turns(cut: Cut, tp: int, apart: bool, tail: tuple[int, ...]) -> None:
    groups, queries, width = 4, 2, 5
    tensor = numbered(groups * (queries + 2) * width, *tail)
    by_group = tensor.reshape(groups, queries + 2, width, *tail)
    parts = (Part(queries * width, heads=queries), Part(width, kv_heads=1), Part(width, kv_heads=1))
    placement = SplitGroups(0, groups=groups, parts=parts, apart=apart)
    for rank, part in enumerate(slices(placement, tuple(tensor.shape), tp)):
        if tp > groups:
            group = by_group[rank // 2]
            expected = torch.cat([group[rank % 2], group[queries], group[queries + 1]])
        else:
            mine = by_group.chunk(tp)[rank]
            sorted_out = [mine[:, :queries], mine[:, queries : queries + 1], mine[:, queries + 1 :]]
            pieces = [piece.flatten(0, 2) for piece in sorted_out] if apart else [mine.flatten(0, 2)]
            expected = torch.cat(pieces)
        assert torch.equal(cut(tensor, part), expected)


@pytest.mark.parametrize(("size", "tp"), [(130, 2), (130, 4), (64, 8), (1, 64), (0, 4)])
def test_a_padded_vocabulary_has_rows_of_zeros_at_the_end(cut: Cut, size: int, tp: int) -> None:
    tensor = numbered(size, 3) + 1
    padded = torch.cat([tensor, tensor.new_zeros(-size % 64, 3)])
    for rank, part in enumerate(slices(SplitVocabulary(pad_to=64), (size, 3), tp)):
        assert torch.equal(cut(tensor, part), padded.reshape(tp, -1, 3)[rank])


@pytest.mark.parametrize("shape", [(), (3,), (4, 0), (2, 3, 4)])
def test_replicate_is_whole_and_skip_is_nothing(cut: Cut, shape: tuple[int, ...]) -> None:
    tensor = numbered(*shape)
    assert all(torch.equal(cut(tensor, part), tensor) for part in slices(Replicate(), shape, 3))
    assert Skip().share_of(shape, tp_index=0, tp=3) is None


@st.composite
def placed(draw: st.DrawFn) -> tuple[Placement, tuple[int, ...], int, int]:
    """A placement, a shape that it can place, tp, and how many ranks hold each element."""
    tp = draw(st.integers(1, 6))
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    signed = draw(st.sampled_from([dim, dim - len(shape)]))
    kind = draw(st.sampled_from(["even", "vocabulary", "heads", "kv_heads", "shared", "parts", "units", "groups"]))
    times = draw(st.integers(1, 3))
    if kind == "vocabulary":
        return SplitVocabulary(signed), tuple(shape), tp, 1
    if kind == "units":
        unit = draw(st.integers(1, 3))
        shape[dim] *= unit
        return Split(signed, unit=unit), tuple(shape), tp, 1
    if kind == "groups":
        sizes = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
        shape[dim] = tp * times * sum(sizes)
        return SplitGroups(signed, tp * times, sizes, draw(st.booleans())), tuple(shape), tp, 1
    if kind == "parts":
        sizes = [tp * size for size in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))]
        shape[dim] = sum(sizes)
        return Split(signed, parts=tuple(sizes)), tuple(shape), tp, 1
    if kind == "shared":
        shape[dim] = times * draw(st.integers(1, 3))
        return Split(signed, kv_heads=times), tuple(shape), times * tp, tp
    shape[dim] = tp * times * draw(st.integers(0, 3))
    options = {"even": {}, "heads": {"heads": tp * times}, "kv_heads": {"kv_heads": tp * times}}
    return Split(signed, **options[kind]), tuple(shape), tp, 1


@given(placed())
def test_ranks_cover_every_element_equally_often(cut: Cut, case: tuple[Placement, tuple[int, ...], int, int]) -> None:
    placement, shape, tp, copies = case
    tensor = numbered(*shape)
    held = [cut(tensor, part).flatten() for part in slices(placement, shape, tp)]
    assert torch.cat(held).sort().values.tolist() == tensor.flatten().repeat_interleave(copies).tolist()


@pytest.mark.parametrize(
    ("placement", "shape", "tp", "reason"),
    [
        pytest.param(Split(0), (10, 4), 4, "dimension 0: 10 indices do not divide among tp=4", id="uneven"),
        pytest.param(Split(-1), (4, 10), 4, "dimension 1: 10 indices", id="uneven-negative-dim"),
        pytest.param(Split(2), (4, 4), 2, "it has 2 dimensions, none is number 2", id="no-such-dim"),
        pytest.param(Split(-3), (4, 4), 2, "none is number -3", id="no-such-negative-dim"),
        pytest.param(Split(0), (), 1, "it has 0 dimensions", id="scalar"),
        pytest.param(SplitVocabulary(1), (4,), 1, "it has 1 dimension,", id="vocabulary-no-such-dim"),
        pytest.param(Split(0, heads=6), (24, 2), 4, "6 heads do not divide among tp=4", id="half-a-head"),
        pytest.param(Split(0, heads=2), (24, 2), 4, "2 heads do not divide among tp=4", id="queries-are-not-shared"),
        pytest.param(Split(0, heads=5), (24, 2), 1, "24 indices are not 5 heads", id="heads-of-unequal-size"),
        pytest.param(Split(0, kv_heads=5), (24, 2), 1, "24 indices are not 5 heads", id="kv-heads-of-unequal-size"),
        pytest.param(Split(0, kv_heads=6), (24, 2), 4, "6 key-value heads neither", id="kv-heads-do-not-divide"),
        pytest.param(Split(0, kv_heads=4), (24, 2), 6, "4 key-value heads neither", id="kv-heads-do-not-share-out"),
        pytest.param(Split(0, parts=(4, 4)), (9, 2), 2, "has 9 indices, but its parts make 8", id="parts-too-short"),
        pytest.param(Split(0, num_parts=2), (9, 2), 2, "9 indices, but its parts make 8", id="unequal-parts"),
        pytest.param(Split(0, unit=4), (10, 2), 2, "10 indices are not whole units of 4", id="half-a-unit"),
        pytest.param(SplitVocabulary(pad_to=4), (9, 2), 8, "12 indices with padding do not", id="padding-uneven"),
        pytest.param(SplitGroups(0, 4, (2, 1)), (10, 2), 2, "10 indices, but its parts make 12", id="groups-too-short"),
        pytest.param(SplitGroups(0, 4, (2, 1)), (12, 2), 6, "4 groups of heads neither", id="groups-do-not-share-out"),
        pytest.param(SplitGroups(0, 4, (2, 1)), (12, 2), 8, "1 index does not divide", id="shared-group-uneven"),
        pytest.param(SplitGroups(2, 4, (2, 1)), (12, 2), 8, "it has 2 dimensions", id="groups-no-such-dim"),
        pytest.param(Split(0, parts=(3, 5)), (8, 2), 2, "3 indices do not divide", id="part-uneven-though-sum-is-even"),
    ],
)
def test_refusals_say_why(placement: Placement, shape: tuple[int, ...], tp: int, reason: str) -> None:
    refusal = placement.refusal(shape, tp)
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Split("0"), "a dimension is a whole number", id="dim-is-text"),
        pytest.param(lambda: Split(True), "a dimension is a whole number", id="dim-is-a-bool"),
        pytest.param(lambda: SplitVocabulary(1.0), "a dimension is a whole number", id="vocabulary-dim-is-a-float"),
        pytest.param(lambda: Split(0, heads=0), "at least 1", id="no-heads"),
        pytest.param(lambda: Split(0, kv_heads="8"), "at least 1", id="heads-are-text"),
        pytest.param(lambda: Split(0, num_parts=0), "num_parts is at least 1", id="no-parts"),
        pytest.param(lambda: Split(0, num_parts=2, parts=(4, 4)), "goes without parts", id="parts-in-two-ways"),
        pytest.param(lambda: Split(0, unit=0), "at least 1", id="empty-unit"),
        pytest.param(lambda: Split(0, unit=4, heads=4), "exclude each other", id="unit-and-heads"),
        pytest.param(lambda: SplitVocabulary(pad_to=0), "multiple of at least 1", id="no-padding"),
        pytest.param(lambda: SplitGroups(0, 0, (1,)), "at least one group", id="no-groups"),
        pytest.param(lambda: SplitGroups(0, 1, ()), "one part are needed", id="groups-of-nothing"),
        pytest.param(lambda: Split(0, heads=4, kv_heads=4), "exclude each other", id="heads-of-both-kinds"),
        pytest.param(lambda: Split(0, heads=4, parts=(4, 4)), "in its parts, not beside", id="heads-beside-parts"),
        pytest.param(lambda: Split(0, parts=2), "tuple of sizes", id="parts-are-a-number"),
        pytest.param(lambda: Split(0, parts=(4, -4)), "size of at least 0", id="negative-part"),
        pytest.param(lambda: Part(4, heads=2, kv_heads=2), "exclude each other", id="part-of-both-kinds"),
    ],
)
def test_placements_that_mean_nothing_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        make()


@pytest.mark.parametrize(
    "placement",
    [Split(0, parts=(4, Part(2, kv_heads=1))), SplitGroups(0, 2, (4, 2)), SplitVocabulary(), Replicate(), Skip()],
)
def test_placements_are_values(placement: Placement) -> None:
    assert pickle.loads(pickle.dumps(placement)) == placement
    assert len({placement, pickle.loads(pickle.dumps(placement))}) == 1
