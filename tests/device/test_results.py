"""Bytes are counted down to zero: each tensor completes once, at its last piece, whichever thread brings it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from ray_streamer.checkpoint.header import parse_header
from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.device import open_device
from ray_streamer.device.results import Results
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.rank_plan import RankPlan
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import SplitVocabulary
from ray_streamer.sharding.slices import SliceTable, TensorSlice
from ray_streamer.testing.checkpoints import TensorSpec, serialize_header

SPECS = [TensorSpec("a", "F32", (100, 50)), TensorSpec("b", "U8", (30000,)), TensorSpec("empty", "I64", (0, 4))]


@pytest.fixture(scope="module")
def plan():
    head = serialize_header(SPECS)
    file = ShardFile("f", len(head) + sum(spec.num_bytes for spec in SPECS), "e")
    header = parse_header(head, file="f", size_bytes=file.size_bytes)
    index = CheckpointIndex.from_headers("memory://results", [file], [header])
    slices = {spec.name: (TensorSlice.whole(spec.shape), None) for spec in SPECS}
    # Many runs in a piece: columns, read with what lies between them.
    slices["a"] = (TensorSlice.along((100, 50), dim=1, start=10, stop=35), None)
    table = SliceTable.from_slices(index, slices, num_ranks=2)
    return plan_reads(
        index, table, Topology.even(2), ReadLimits(block_bytes=4096, min_run_bytes=1 << 20, max_gap_bytes=1 << 20)
    )


def _results(plan, rank: int = 0, **given) -> tuple[Results, RankPlan]:
    mine = RankPlan.of(plan, rank)
    return Results(plan, mine, open_device("cpu"), **given), mine


def test_tensors_complete_once_at_their_last_piece(plan):
    completed: list[str] = []
    results, mine = _results(plan, on_complete=lambda name, _: completed.append(name))
    results.complete_empty()
    assert completed == ["empty"]
    left = {"a": 100 * 25 * 4, "b": 30000}
    for block in np.random.default_rng(0).permutation(mine.taken).tolist():
        pieces = mine.pieces(block)
        results.copies(pieces)
        results.settle(pieces)
        for piece in pieces:
            left[plan.index.names[piece.tensor]] -= piece.num_bytes
        assert set(completed) - {"empty"} == {name for name, num_bytes in left.items() if not num_bytes}
    assert sorted(completed) == ["a", "b", "empty"]
    assert results.delivered_bytes == 100 * 25 * 4 + 30000
    assert list(results.tensors()) == list(plan.index.names)


def test_many_threads_settle_and_allocate_once(plan):
    completed: list[tuple[str, int]] = []
    results, mine = _results(plan, on_complete=lambda name, tensor: completed.append((name, tensor.data_ptr())))
    results.complete_empty()
    blocks, start = mine.taken.tolist(), threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for block in blocks[first::4]:
            pieces = mine.pieces(block)
            results.copies(pieces)
            results.settle(pieces)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tensors = results.tensors()
    assert sorted(completed) == sorted((name, tensor.data_ptr()) for name, tensor in tensors.items())


def test_unfinished_tensors_are_not_handed_out(plan):
    results, mine = _results(plan)
    results.complete_empty()
    results.settle(mine.pieces(int(mine.taken[0])))
    with pytest.raises(AssertionError, match="tensors without all their bytes"):
        results.tensors()


def test_a_rank_that_holds_nothing(plan):
    results, _ = _results(plan, rank=1)
    results.complete_empty()
    assert results.tensors() == {}


def test_forgotten_tensors_belong_to_whoever_has_them(plan):
    results, mine = _results(plan, out={"empty": torch.empty(0, 4, dtype=torch.int64)})
    results.copies(mine.pieces(int(mine.taken[0])))
    results.forget()
    assert results.delivered_bytes == 0


@pytest.mark.parametrize("given", [False, True], ids=["allocated", "out"])
def test_what_no_box_fills_is_zero(given):
    spec = TensorSpec("vocabulary", "F32", (9, 4))
    head = serialize_header([spec])
    file = ShardFile("f", len(head) + spec.num_bytes, "e")
    header = parse_header(head, file="f", size_bytes=file.size_bytes)
    index = CheckpointIndex.from_headers("memory://padded", [file], [header])
    placement = SplitVocabulary(pad_to=8)
    pattern = tuple(placement.slice_of(spec.shape, tp_index=at, tp=4) for at in range(4))
    table = SliceTable.from_slices(index, {"vocabulary": pattern}, num_ranks=4)
    limits = ReadLimits(block_bytes=4096, min_run_bytes=1 << 20, max_gap_bytes=1 << 20)
    padded = plan_reads(index, table, Topology.even(4), limits)
    for rank, num_rows in enumerate((4, 4, 1, 0)):
        out = {"vocabulary": torch.full((4, 4), 7.0)} if given else None
        results, mine = _results(padded, rank, out=out)
        tensor = results.result(0).tensor
        assert tensor.shape == (4, 4)
        assert int(mine.tensor_bytes[0]) == num_rows * 16
        assert not tensor[num_rows:].any()
        assert out is None or bool((tensor[:num_rows] == 7).all())
