"""An index comes out of its bytes as it went in; bytes that are none are refused by type."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.checkpoint import CheckpointIndex, open_checkpoint
from ray_streamer.checkpoint.index_bytes import index_from_bytes, index_to_bytes
from ray_streamer.errors import CheckpointError
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.testing.checkpoints import write_checkpoint

TENSORS = [
    ("a.weight", "BF16", (6, 4)),
    ("b.scalar", "F32", ()),
    ("c.empty", "I64", (0, 3)),
    ("d.模型.weight", "F8_E4M3", (2, 3, 4)),
]


def _open(folder) -> CheckpointIndex:
    storage = open_storage(str(folder), Settings())
    try:
        return open_checkpoint(str(folder), storage)
    finally:
        storage.close()


@pytest.fixture(scope="module", params=[None, {"model_type": "x", "nested": {"a": [1, 2.5, None, True]}, "big": 2**70}])
def index(request, tmp_path_factory) -> CheckpointIndex:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, TENSORS, num_files=2, config=request.param)
    return _open(folder)


def _assert_same(left: CheckpointIndex, right: CheckpointIndex) -> None:
    for spec in fields(CheckpointIndex):
        ours, theirs = getattr(left, spec.name), getattr(right, spec.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype, spec.name
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs, spec.name
            assert type(ours) is type(theirs), spec.name


def test_an_index_comes_out_as_it_went_in(index):
    data = index_to_bytes(index)
    for view in (data, memoryview(data), memoryview(bytearray(data)).toreadonly()):
        again = index_from_bytes(view)
        _assert_same(index, again)
        assert again.fingerprint() == index.fingerprint()
        assert not again.shapes.flags.writeable


def test_an_index_without_tensors(index):
    empty = CheckpointIndex.from_headers("/nowhere", [], [])
    _assert_same(empty, index_from_bytes(index_to_bytes(empty)))


@given(st.data())
def test_bytes_that_were_cut_or_changed_are_an_index_or_refused(index, data):
    whole = bytearray(index_to_bytes(index))
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        index_from_bytes(bytes(whole))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format": 2}',
        b'{"format": 1, "text": [], "shapes": {}}',
        b'{"format": 1, "text": {}, "shapes": {"dtype_codes": [1e400]}}',
        b'{"format": 1, "text": {}, "shapes": {"dtype_codes": [-1]}}',
        json.dumps({"format": 1, "text": {}, "shapes": {"dtype_codes": [2**70]}}).encode(),
    ],
    ids=lambda head: repr(head[:60]),
)
def test_a_head_that_is_none(head):
    with pytest.raises(CheckpointError, match="no index of a checkpoint"):
        index_from_bytes(len(head).to_bytes(8, "little") + head)
