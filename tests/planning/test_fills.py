"""What moves leave open of a result, and what they would write twice: told before anything is read, by name and index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.errors import PlanError
from ray_streamer.planning.coverage import cover, num_covered
from ray_streamer.planning.fills import check_fills
from ray_streamer.planning.views import Dim, nested_views, steps_of
from ray_streamer.slices import Move, RankSlices, ResultSpec, Side
from ray_streamer.slices.move import row_major

DIVIDING = [1, 4, 12, 24]
STRIDES = [DIVIDING, [1, 2, 6], [1, 5, 6, 7], [1, 6, 10], [2, 8]]
"""Whose steps divide each other, and whose do not."""


@st.composite
def memories(draw):
    strides = draw(st.sampled_from(STRIDES))
    own = draw(st.lists(st.sampled_from(strides), unique=True, max_size=4))
    whole = nested_views(0, 0, [Dim(draw(st.integers(1, 6)), stride, 0) for stride in own])
    views = []
    for _ in range(draw(st.integers(0, 4))):
        dims = [Dim(draw(st.integers(1, 5)), draw(st.sampled_from(strides)), 0) for _ in range(draw(st.integers(0, 3)))]
        views += nested_views(draw(st.integers(0, 20)), 0, dims)
    return whole, views


def elements(views):
    return [view.offset + step for view in views for step, _ in steps_of(view.dims)]


@given(memory=memories(), window=st.sampled_from([7, 1 << 24]), cells=st.sampled_from([0, 1 << 22]))
def test_coverage_is_what_counting_elements_finds(memory, window, cells):
    whole, views = memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_streamer.planning.coverage.WINDOW_ELEMENTS", window)
        patch.setattr("ray_streamer.planning.coverage.MAX_CELLS", cells)
        found, count = cover(whole, views), num_covered(views)
    own, written = elements(whole), elements(views)
    if len(set(own)) < len(own):
        return
    twice = {element for element in written if written.count(element) > 1}
    outside = set(written) - set(own)
    assert found.num_covered == count == len(set(written))
    assert (found.twice in twice) if twice else found.twice is None
    assert (found.outside in outside) if outside else found.outside is None
    holes = [
        hole.offset + step
        for hole in found.holes
        for step, _ in steps_of([Dim(size, stride, 0) for size, stride in zip(hole.shape, hole.strides, strict=True)])
    ]
    # What is counted knows only that there is a hole, and names all of the memory.
    open_elements = set(own) - set(written)
    assert len(holes) == len(set(holes))
    assert set(holes) in (open_elements, set(own) if open_elements else set())


@pytest.fixture
def slices_of(make_checkpoint):
    """Index and slices of one result, filled by moves from tensors "a" and "b" of 1,000 bytes."""
    index = make_checkpoint([[("a", "U8", (1000,)), ("b", "U8", (1000,))]]).index

    def make(shape, moves, **form):
        spec = ResultSpec(name="r", dtype="U8", shape=shape, **form)
        rows = [(tensor, "r", [move]) for tensor, move in moves]
        return index, RankSlices.from_rows(index, [spec], rows)

    return make


def rows_of(first, count, width=4, every=1, start=0):
    """Rows of a result that is `width` wide."""
    return Move((count, width), Side(start, (width, 1)), Side(first * width, (width * every, 1)))


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        pytest.param(
            [("a", rows_of(0, 3)), ("b", rows_of(2, 2))], r"index \(2, 0\) of result 'r' twice: 'a' and 'b'", id="rows"
        ),
        pytest.param(
            [("a", rows_of(0, 2, every=2)), ("b", rows_of(2, 2))], r"\(2, 0\).*'a' and 'b'", id="every-other-row"
        ),
        pytest.param(
            [("a", rows_of(0, 4)), ("b", Move((4, 1), Side(0, (4, 1)), Side(3, (4, 1))))],
            r"\(0, 3\)",
            id="a-column-of-all",
        ),
        pytest.param([("a", Move((2, 3), Side(0, (3, 1)), Side(0, (1, 1))))], r"\(0, 1\).*twice: 'a'", id="itself"),
        pytest.param(
            [("a", Move((3, 2), Side(0, (2, 1)), Side(0, (5, 3)))), ("b", rows_of(2, 1))],
            r"\(2, 0\)|\(2, 1\)|\(2, 2\)",
            id="diagonals",
        ),
    ],
)
def test_what_is_written_twice_is_refused(slices_of, moves, message):
    with pytest.raises(PlanError, match=message):
        check_fills(*slices_of((4, 4), moves))


@pytest.mark.parametrize(
    ("move", "form"),
    [
        pytest.param(rows_of(3, 2), {}, id="behind-the-last-row"),
        pytest.param(Move((4, 5), Side(0, (5, 1)), Side(0, (5, 1))), {}, id="wider"),
        pytest.param(rows_of(0, 4, width=5), {"strides": (5, 1)}, id="between-the-rows"),
    ],
)
def test_what_lies_outside_of_its_result_is_refused(slices_of, move, form):
    with pytest.raises(
        PlanError, match=r"send 'a' to element .* of the memory of result 'r', which is none of its shape"
    ):
        check_fills(*slices_of((4, 4), [("a", move)], **form))


def test_a_result_that_overlaps_itself_is_refused(slices_of):
    for strides in ((0, 1), (2, 1)):
        with pytest.raises(PlanError, match="overlaps itself"):
            check_fills(*slices_of((4, 4), [], strides=strides))


def test_holes_are_told_where_they_are_to_be_zeroed(slices_of):
    moves = [("a", rows_of(0, 2, every=2)), ("b", rows_of(1, 1))]
    (found,) = check_fills(*slices_of((4, 4), moves))
    assert found.results.tolist() == [0]
    assert [(hole.offset, [size for size in hole.shape if size > 1]) for hole in found.holes] == [(12, [4])]
    assert not check_fills(*slices_of((4, 4), moves, zeroes_holes=False))
    assert not check_fills(*slices_of((0, 4), []))
    (found,) = check_fills(*slices_of((2, 3), []))
    assert sum(int(np.prod(hole.shape)) for hole in found.holes) == 6


def test_narrow_elements_are_covered_by_the_byte(make_checkpoint):
    index = make_checkpoint([[("a", "F4", (4, 6))]]).index
    spec = ResultSpec(name="r", dtype="F4", shape=(4, 6))
    move = Move((4, 2), Side(2, (6, 1)), Side(4, (6, 1)))
    (found,) = check_fills(index, RankSlices.from_rows(index, [spec], [("a", "r", [move])]))
    assert sum(int(np.prod(hole.shape)) for hole in found.holes) == 8
    with pytest.raises(PlanError, match=r"index \(0, 4\) of result 'r' twice"):
        check_fills(index, RankSlices.from_rows(index, [spec], [("a", "r", [move, move])]))


def test_stacked_experts_are_a_few_cells_and_one_answer_for_all_layers(make_checkpoint, monkeypatch):
    """256 experts x gate, up and down of 58 layers: what differs is looked at once."""
    experts, rows = 256, 8
    shape = (experts, 3 * rows, 16)
    index = make_checkpoint([[(f"{layer}.{expert}.{part}", "U8", (rows, 16)) for layer in range(3)
                              for expert in range(experts) for part in range(3)]]).index  # fmt: skip
    specs = [ResultSpec(name=str(layer), dtype="U8", shape=shape) for layer in range(3)]
    pattern = (Move((rows, 16), Side(0, (16, 1)), Side(0, (16, 1))),)
    tensors = np.array([index.position(f"{layer}.{expert}.{part}") for layer in range(3) for expert in range(experts)
                        for part in range(3)], dtype=np.int32)  # fmt: skip
    results = np.repeat(np.arange(3, dtype=np.int32), 3 * experts)
    offsets = np.tile(np.arange(3 * experts, dtype=np.int64) * rows * 16, 3)
    said = RankSlices(specs, (pattern,), tensors, results, np.zeros_like(tensors), offsets)
    calls = []
    monkeypatch.setattr("ray_streamer.planning.fills.cover", lambda *given: calls.append(given) or cover(*given))
    assert not check_fills(index, said)
    assert len(calls) == 1
    offsets[-1] -= row_major(shape)[1]
    with pytest.raises(PlanError, match=r"index \(255, 15, 0\) of result '2' twice: '2.255.1' and '2.255.2'"):
        check_fills(index, said)
