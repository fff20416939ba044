"""Columns cross to another process as they are, short or long, and nothing else is taken for them."""

from __future__ import annotations

import numpy as np
import pytest

from ray_streamer.column_bytes import columns_from_bytes, columns_to_bytes, refused


class Refused(Exception):
    """What these tests ask for."""


@pytest.mark.parametrize("length", [0, 1, 1000, 400_000], ids=["none", "one", "sent-as-they-are", "compressed"])
def test_columns_cross_whole(length):
    numbers = np.arange(length, dtype=np.int64)
    columns = {
        "numbers": numbers,
        "strided": np.repeat(numbers, 2)[::2],
        "bits": numbers % 3 == 0,
        "halves": numbers / 2,
    }
    read, said = columns_from_bytes(memoryview(columns_to_bytes(columns, {"shape": [2, None], "name": "ä"})))
    assert said == {"shape": [2, None], "name": "ä"}
    assert read.keys() == columns.keys()
    for name, column in columns.items():
        assert read[name].dtype == column.dtype
        assert np.array_equal(read[name], column)


SHORT = columns_to_bytes({"numbers": np.arange(9)}, None)
LONG = columns_to_bytes({"numbers": np.arange(200_000)}, None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"12",
        bytes(99),
        b"\xff" * 99,
        SHORT[:-1],
        LONG[:-5],
        (1 << 60).to_bytes(8, "little") + LONG[8:],
        LONG[:8] + SHORT[8:],
    ],
    ids=["nothing", "too-short", "zeros", "ones", "cut-short", "compressed-cut-short", "absurd-size", "not-compressed"],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(Refused), refused(lambda error: Refused(str(error))):
        columns_from_bytes(data)


def test_columns_of_different_lengths_are_refused():
    data = columns_to_bytes({"numbers": np.arange(9), "others": np.arange(8)}, None)
    with pytest.raises(Refused, match="differ in length"), refused(lambda error: Refused(str(error))):
        columns_from_bytes(data)
