"""The values that slice sources give: what is refused where it is made, and that they cross between processes unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.errors import PlanError
from ray_streamer.slices import Move, RankSlices, RankSources, ResultSpec, ResultSpecs, Side
from ray_streamer.slices.move import row_major

NUMBERS = st.integers(0, 1 << 40)


def a_side(num_dims, *, least_stride):
    return st.builds(Side, NUMBERS, st.tuples(*[st.integers(least_stride, 1 << 40)] * num_dims))


MOVES = st.integers(0, 4).flatmap(
    lambda num_dims: st.builds(
        Move,
        st.tuples(*[st.integers(0, 1 << 20)] * num_dims),
        a_side(num_dims, least_stride=0),
        a_side(num_dims, least_stride=1),
    )
)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Side(-1, ()), id="offset-below-zero"),
        pytest.param(lambda: Side(0, (-1,)), id="stride-below-zero"),
        pytest.param(lambda: Move((2,), Side(0, ()), Side(0, (1,))), id="source-strides-missing"),
        pytest.param(lambda: Move((-1,), Side(0, (1,)), Side(0, (1,))), id="size-below-zero"),
        pytest.param(lambda: Move((2,), Side(0, (1,)), Side(0, (0,))), id="target-repeats"),
        pytest.param(lambda: ResultSpec(name="a", dtype="F33", shape=()), id="no-such-dtype"),
        pytest.param(lambda: ResultSpec(name="a", dtype="F32", shape=(-1,)), id="shape-below-zero"),
        pytest.param(lambda: ResultSpec(name="a", dtype="F32", shape=(1,), strides=()), id="strides-missing"),
        pytest.param(lambda: ResultSpec(name="a", dtype="F32", shape=(1,), strides=(-1,)), id="stride-below-zero"),
    ],
)
def test_values_that_cannot_mean_anything_are_refused(make):
    with pytest.raises(PlanError):
        make()


def test_a_box_beyond_its_tensor_is_refused():
    with pytest.raises(PlanError, match="does not fit"):
        Move.box((2, 2), source_shape=(4, 3), source_starts=(0, 2), target_shape=(2, 2), target_starts=(0, 0))


@given(st.lists(st.integers(0, 5), max_size=5))
def test_row_major_strides_are_those_of_numpy(shape):
    assert row_major(tuple(shape)) == tuple(stride // 8 for stride in np.empty([max(n, 1) for n in shape]).strides)


@given(st.data())
def test_what_a_rank_reads_crosses_between_processes_unchanged(data):
    patterns = data.draw(st.lists(st.lists(MOVES, max_size=3).map(tuple), min_size=1, max_size=3))
    num_rows = data.draw(st.integers(0, 5))
    rows = [data.draw(st.lists(st.integers(0, room - 1), min_size=num_rows, max_size=num_rows))
            for room in (100, 1, len(patterns), 1 << 40)]  # fmt: skip
    columns = (np.array(column, dtype=dtype) for column, dtype in zip(rows, ("i4", "i4", "i4", "i8"), strict=True))
    said = RankSlices([ResultSpec(name="r", dtype="BF16", shape=(2, 3))], tuple(patterns), *columns)
    heard = RankSources.from_bytes(RankSources.of(said).to_bytes())
    assert heard.tensor_ids.tolist() == rows[0]
    assert [
        [(view.shape, view.side) for view in heard.patterns[pattern]] for pattern in heard.pattern_ids.tolist()
    ] == [[(move.shape, move.source) for move in patterns[pattern]] for pattern in rows[2]]


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 64])
def test_bytes_that_are_no_sources_are_refused(data):
    with pytest.raises(PlanError, match="cannot be parsed"):
        RankSources.from_bytes(data)


def test_results_are_kept_as_columns_and_read_as_specs():
    specs = [
        ResultSpec(name="a", dtype="BF16", shape=(2, 3)),
        ResultSpec(name="b", dtype="BF16", shape=(2, 3)),
        ResultSpec(name="c", dtype="BF16", shape=(2, 3), strides=(1, 2), zeroes_holes=False),
    ]
    kept = ResultSpecs.of(specs)
    assert list(kept) == specs
    assert kept[1:] == tuple(specs[1:])
    assert len(kept.forms) == 2
    assert kept.form_of(2).memory_strides == (1, 2)


@pytest.mark.parametrize(
    "made_of", [list, lambda column: np.array(column, "u1"), lambda column: np.array(column, "i8")]
)
def test_columns_of_any_whole_numbers_say_the_same(made_of):
    spec = ResultSpec(name="a", dtype="F32", shape=(8,))
    rows = [[3, 5], [0, 0], [0, 0], [4, 0]]
    expected = RankSlices((spec,), ((),), *(np.array(row, "i4") for row in rows[:3]), np.array(rows[3], "i8"))
    said = RankSlices((spec,), ((),), *map(made_of, rows))
    assert said.fingerprint() == expected.fingerprint()
    assert len(said) == 2


def test_columns_that_point_nowhere_are_refused():
    spec = ResultSpec(name="a", dtype="F32", shape=(1,))
    one, two = np.zeros(1, dtype=np.int32), np.zeros(2, dtype=np.int32)
    offsets = np.zeros(1, dtype=np.int64)
    with pytest.raises(PlanError, match="differ in length"):
        RankSlices((spec,), ((),), one, two, one, offsets)
    with pytest.raises(PlanError, match="result_ids"):
        RankSlices((spec,), ((),), one, one + 1, one, offsets)
    with pytest.raises(PlanError, match="pattern_ids"):
        RankSlices((spec,), (), one, one, one, offsets)
    with pytest.raises(PlanError, match="one name: a"):
        RankSlices((spec, spec), ((),), one, one, one, offsets)
    with pytest.raises(PlanError, match="form_ids"):
        ResultSpecs(("a",), (spec.form,), one + 1)
    with pytest.raises(PlanError, match="names of results"):
        ResultSpecs(("a",), (spec.form,), two)
    with pytest.raises(PlanError, match="pattern_ids"):
        RankSources((), one, one)
    with pytest.raises(PlanError, match="negative"):
        RankSources(((),), one - 1, one)
    with pytest.raises(PlanError, match="have 2 patterns"):
        RankSources(((),), one, two)
