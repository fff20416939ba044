"""Do the answers about strided views agree with counting their elements one by one?"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_streamer.capture.strided import Loop, Strided, holds, loops_of, may_meet, merged, seen_through
from ray_streamer.slices.move import row_major


def positions(view: Strided) -> list[int]:
    indices = itertools.product(*(range(size) for size in view.shape))
    return [view.offset + sum(at * step for at, step in zip(index, view.strides, strict=True)) for index in indices]


def copied_elements(parts: list[tuple[list[Loop], int, int]]) -> list[tuple[int, int]]:
    """Pairs of element on the other side and element of the first memory; each once."""
    pairs: list[tuple[int, int]] = []
    for loops, offset, other_offset in parts:
        shape = tuple(loop.size for loop in loops)
        here = positions(Strided(shape, tuple(loop.step for loop in loops), offset))
        there = positions(Strided(shape, tuple(loop.other_step for loop in loops), other_offset))
        pairs += zip(there, here, strict=True)
    return sorted(pairs)


def copied_by_hand(copied: Strided, view: Strided) -> list[tuple[int, int]]:
    memory = positions(copied)
    return list(enumerate(memory[at] for at in positions(view)))


@st.composite
def views(draw: st.DrawFn) -> Strided:
    dims = draw(st.integers(0, 3))
    shape = tuple(draw(st.integers(0, 5)) for _ in range(dims))
    strides = tuple(draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 48])) for _ in range(dims))
    return Strided(shape, strides, draw(st.integers(0, 60)))


@settings(max_examples=500)
@given(views(), views())
def test_views_that_share_an_element_may_meet(one, other):
    if set(positions(one)) & set(positions(other)):
        assert may_meet(one, other)
        assert may_meet(other, one)


@settings(max_examples=500)
@given(views(), views())
def test_what_is_held_is_held_entirely(whole, part):
    if holds(whole, part):
        assert set(positions(part)) <= set(positions(whole))


@settings(max_examples=500)
@given(views())
def test_extent_and_repetition_of_a_view(view):
    found = positions(view)
    assert (view.start, view.stop) == ((min(found), max(found) + 1) if found else (view.offset, view.offset))
    if len(set(found)) < len(found):
        assert view.repeats
    assert positions(merged(view)) == found if found else True
    assert view.num_elements == len(found)
    if view.is_dense:
        assert sorted(found) == list(range(view.start, view.stop))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(Strided((4, 3), (8, 1), 0), Strided((4, 3), (8, 1), 3), id="columns-of-one-matrix"),
        pytest.param(Strided((4, 8), (16, 1), 0), Strided((4, 8), (16, 1), 8), id="even-and-odd-rows"),
        pytest.param(Strided((2, 3, 4), (40, 8, 1), 0), Strided((2, 3, 4), (40, 8, 1), 4), id="columns-in-three-dims"),
        pytest.param(Strided((3, 8), (8, 1), 0), Strided((8,), (1,), 24), id="rows-before-and-after"),
        pytest.param(Strided((5, 1), (8, 1), 7), Strided((5, 7), (8, 1), 0), id="last-column-and-the-others"),
        pytest.param(Strided((3, 4), (1, 8), 0), Strided((5, 4), (1, 8), 3), id="transposed-columns"),
    ],
)
def test_views_of_a_fused_parameter_do_not_meet(one, other):
    assert not may_meet(one, other)
    assert not may_meet(one.in_bytes(2), other.in_bytes(2))


@st.composite
def copies_and_views(draw: st.DrawFn):
    """A view, the contiguous copy of it, and a view of that copy."""
    shape = tuple(draw(st.integers(1, 6)) for _ in range(draw(st.integers(1, 3))))
    order = draw(st.permutations(range(len(shape))))
    in_memory = tuple(shape[dim] for dim in order)
    strides = row_major(in_memory)
    copied = Strided(shape, tuple(strides[order.index(dim)] for dim in range(len(shape))), draw(st.integers(0, 5)))
    total = copied.num_elements
    size = draw(st.integers(1, total))
    step = draw(st.integers(1, 6))
    offset = draw(st.integers(0, total - 1))
    assume(offset + (size - 1) * step < total)
    return copied, Strided((size,), (step,), offset)


@settings(max_examples=500)
@given(copies_and_views())
def test_a_view_of_a_copy_is_seen_through_it_or_not_at_all(given_views):
    copied, view = given_views
    found = seen_through(copied, loops_of(view, row_major(view.shape)), view.offset)
    if found is None:
        return
    assert copied_elements(found) == copied_by_hand(copied, view)


@pytest.mark.parametrize(
    ("copied", "shape", "strides", "offset"),
    [
        pytest.param(Strided((4, 4, 2), (2, 8, 1), 0), (8, 2), (4, 1), 0, id="every-other-pair"),
        pytest.param(Strided((3, 4, 8), (8, 24, 1), 0), (7, 8), (8, 1), 8 * 3, id="heads-across-groups"),
        pytest.param(Strided((3, 4, 8), (8, 24, 1), 0), (4, 8), (8, 1), 32, id="one-head-group-of-fused-qkv"),
        pytest.param(Strided((3, 4, 8), (8, 24, 1), 0), (12, 4), (8, 1), 4, id="columns-of-all-heads"),
        pytest.param(Strided((6, 10), (1, 6), 0), (3, 10), (10, 1), 30, id="rows-of-a-transposed-matrix"),
    ],
)
def test_what_models_do_with_copies_is_seen_through(copied, shape, strides, offset):
    view = Strided(shape, strides, offset)
    found = seen_through(copied, loops_of(view, row_major(shape)), offset)
    assert found is not None
    assert copied_elements(found) == copied_by_hand(copied, view)
