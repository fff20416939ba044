"""Names taken apart: nothing of a name is lost, however its neighbours look, and what is asked of kinds is true of names."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_streamer.rows import distinct_rows
from ray_streamer.sharding.name_kinds import MOST_NUMBERS, NameKinds

COMPONENTS = st.sampled_from(
    ["layers", "a", "", "0", "7", "12", "007", "1" * 9, "1" * 10, "٣", "²", "é", "3x", "\0", "w"]
) | st.integers(0, 99).map(str)
NAMES = st.lists(COMPONENTS, min_size=1, max_size=9).map(".".join)


def _neighbours(names: list[str]) -> list[str]:
    """Each name with the like of it that real checkpoints have beside it."""
    found = [re.sub(r"[0-9]", digit, name) for name in names for digit in ("1", "2")]
    return [*names, *found, *(f"{name}.w" for name in found), *names]


@given(st.lists(NAMES, max_size=6).map(_neighbours))
@example(["a.3", "a.31.w", "a.3.w", "a.4", "a.4.w"])
@example(["a.3.a.b", "a.b", "a.5", "a.5.a.b"])
@example(["3.w", "4.w", ".3.w", "w"])
@example(["", "\0"])
@example(["a\nb.3", "a.3", "a.4"])
@example(["a.b"] * 2)
@example(["a.3", "\0", "\0w", "a.3.w"])
@example(["1.2.3.4.5.6.7.8", "1.2.3.4.5.6.7.9", "1.2.3.4.5.7.7.8"])
def test_a_name_is_its_kind_and_its_numbers(names: list[str]) -> None:
    kinds = NameKinds.of(names)
    assert len(set(kinds.kinds)) == len(kinds.kinds)
    for name, kind_id, numbers in zip(names, kinds.kind_ids, kinds.numbers.tolist(), strict=True):
        kind = kinds.kinds[kind_id]
        rest = iter(numbers)
        assert ".".join(str(next(rest)) if component is None else component for component in kind) == name
        assert all(number == -1 for number in rest)
        texts = [text for text in name.split(".") if re.fullmatch("0|[1-9][0-9]{0,8}", text)]
        assert kind.count(None) == min(len(texts), MOST_NUMBERS)


@given(st.lists(NAMES, max_size=6).map(_neighbours))
def test_names_are_taken_apart_alike_beside_one_that_holds_a_mark(names: list[str]) -> None:
    alone, beside = NameKinds.of(names), NameKinds.of([*names, "\n"])
    assert alone.kinds == beside.kinds[:-1]
    assert alone.kind_ids.tolist() == beside.kind_ids[:-1].tolist()
    assert alone.numbers.tolist() == beside.numbers[:-1].tolist()


@given(st.lists(NAMES, min_size=1, max_size=20), st.sampled_from(["layers", "a", "layers.a"]))
@example(["layers.007.w", "layers.w.layers.3", "layers.1111111111.layers.2", "my_layers.3"], "layers")
def test_the_number_after_a_component_is_the_first_that_follows_it(names: list[str], component: str) -> None:
    found = [re.search(rf"(?:^|\.){re.escape(component)}\.([0-9]{{1,9}})(?:\.|$)", name) for name in names]
    assert NameKinds.of(names).number_after(component).tolist() == [int(at[1]) if at else -1 for at in found]


def test_names_that_are_each_a_kind_keep_their_numbers() -> None:
    kinds = NameKinds.each_its_own(["a.1", "a.2"])
    assert kinds.kinds == (("a", "1"), ("a", "2"))
    assert kinds.number(0).tolist() == [-1, -1]
    assert kinds.number_after("a").tolist() == [1, 2]


@pytest.mark.parametrize("num_rows", [0, 1, 50])
@pytest.mark.parametrize("is_hashed", [True, False], ids=["", "all-hashes-equal"])
def test_rows_are_alike_when_all_their_columns_are(
    num_rows: int, is_hashed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_hashed:
        monkeypatch.setattr("ray_streamer.rows.MOST_KEYS", 0)
        monkeypatch.setattr("ray_streamer.rows._MIX", np.uint64(0))
    random = np.random.default_rng(0)
    columns = [random.integers(-2, 3, num_rows), random.integers(0, 2, num_rows).astype(np.uint8)]
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    found = distinct_rows(columns)
    assert found.values() == list(dict.fromkeys(rows))
    assert [found.values()[at] for at in found.ids.tolist()] == rows
