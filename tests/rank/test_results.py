"""Bytes are counted down to zero: each tensor completes once, at its last piece, whichever thread brings it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from ray_streamer.checkpoint.header import parse_header
from ray_streamer.checkpoint.index import CheckpointIndex, ShardFile
from ray_streamer.device import open_device
from ray_streamer.errors import DeviceError
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.rank_plan import BlockPieces, RankPlan  # noqa: TC001 - used by fixtures too
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.results import Results
from ray_streamer.slices import Move, RankSlices, ResultSpec, Side
from ray_streamer.testing.checkpoints import TensorSpec, serialize_header
from ray_streamer.testing.parts import TensorPart, slices_of_parts

SPECS = [TensorSpec("a", "F32", (100, 50)), TensorSpec("b", "U8", (30000,)), TensorSpec("empty", "I64", (0, 4))]


@pytest.fixture(scope="module")
def plan():
    head = serialize_header(SPECS)
    file = ShardFile("f", len(head) + sum(spec.num_bytes for spec in SPECS), "e")
    header = parse_header(head, file="f", size_bytes=file.size_bytes)
    index = CheckpointIndex.from_headers("memory://results", [file], [header])
    slices = {spec.name: (TensorPart.whole(spec.shape), None) for spec in SPECS}
    # Many runs in a piece: columns, read with what lies between them.
    slices["a"] = (TensorPart.along((100, 50), dim=1, start=10, stop=35), None)
    return plan_reads(
        index,
        slices_of_parts(index, slices),
        Topology.even(2),
        ReadLimits(block_bytes=4096, min_run_bytes=1 << 20, max_gap_bytes=1 << 20),
    )


def _results(plan, rank: int = 0, **given) -> tuple[Results, RankPlan]:
    mine = plan.rank_plan(rank)
    return Results(mine, open_device("cpu"), **given), mine


def _delivered(pieces: BlockPieces) -> list[tuple[int, int]]:
    """As if all pieces of a block had been copied; there are no strided ones here."""
    assert not pieces.strided
    return [(piece.result, piece.num_bytes) for piece in pieces.plain]


def test_tensors_complete_once_at_their_last_piece(plan):
    completed: list[str] = []
    results, mine = _results(plan, on_complete=lambda items: completed.extend(name for name, _ in items))
    results.complete_empty()
    assert completed == ["empty"]
    left = {"a": 100 * 25 * 4, "b": 30000}
    for block in np.random.default_rng(0).permutation(mine.taken).tolist():
        pieces = mine.pieces(block)
        results.copies(pieces.plain)
        results.count_delivered(_delivered(pieces))
        for number, num_bytes in _delivered(pieces):
            left[mine.results.names[number]] -= num_bytes
        assert set(completed) - {"empty"} == {name for name, num_bytes in left.items() if not num_bytes}
    assert sorted(completed) == ["a", "b", "empty"]
    assert list(results.tensors()) == list(plan.index.names)


def test_many_threads_count_and_allocate_once(plan):
    completed: list[tuple[str, int]] = []
    results, mine = _results(
        plan, on_complete=lambda items: completed.extend((name, tensor.data_ptr()) for name, tensor in items)
    )
    results.complete_empty()
    blocks, start = mine.taken.tolist(), threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for block in blocks[first::4]:
            pieces = mine.pieces(block)
            results.copies(pieces.plain)
            results.count_delivered(_delivered(pieces))

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
    results.count_delivered(_delivered(mine.pieces(int(mine.taken[0]))))
    with pytest.raises(AssertionError, match="tensors without all their bytes"):
        results.tensors()


def test_a_rank_that_holds_nothing(plan):
    results, _ = _results(plan, rank=1)
    results.complete_empty()
    assert results.tensors() == {}


def test_forgotten_tensors_belong_to_whoever_has_them(plan):
    results, mine = _results(plan, out={"empty": torch.empty(0, 4, dtype=torch.int64)})
    results.copies(mine.pieces(int(mine.taken[0])).plain)
    results.forget()


@pytest.mark.parametrize("given", [False, True], ids=["allocated", "out"])
@pytest.mark.parametrize("dtype", ["F32", "F4"])
def test_what_no_move_fills_is_zero(given, dtype):
    spec = TensorSpec("vocabulary", dtype, (9, 4))
    head = serialize_header([spec])
    file = ShardFile("f", len(head) + spec.num_bytes, "e")
    header = parse_header(head, file="f", size_bytes=file.size_bytes)
    index = CheckpointIndex.from_headers("memory://padded", [file], [header])
    limits = ReadLimits(block_bytes=4096, min_run_bytes=1 << 20, max_gap_bytes=1 << 20)
    row_bytes = 4 * spec.num_bytes // 36
    for first, num_rows in ((0, 4), (4, 4), (8, 1), (9, 0)):
        result = ResultSpec(name="vocabulary", dtype=dtype, shape=(4, 4))
        moves = [Move((num_rows, 4), Side(4 * first, (4, 1)), Side(0, (4, 1)))]
        said = RankSlices.from_rows(index, [result], [("vocabulary", "vocabulary", moves)])
        padded = plan_reads(index, [said], Topology.even(1), limits)
        memory = torch.full((4 * row_bytes,), 7, dtype=torch.uint8)
        stored = memory.view(getattr(torch, result.stored.torch_name)).view(result.stored.torch_shape((4, 4)))
        results, mine = _results(padded, out={"vocabulary": stored} if given else None)
        tensor = results.result(0).tensor
        raw = results.result(0).storage_view(torch.uint8 if dtype == "F4" else tensor.dtype).view(torch.uint8)
        assert tensor.shape == stored.shape
        assert int(mine.bytes_to_fill[0]) == num_rows * row_bytes
        assert not raw[num_rows * row_bytes :].any()
        assert not given or bool((memory[: num_rows * row_bytes] == 7).all())


def test_memory_with_strides_is_the_callers(plan):
    index = plan.index
    result = ResultSpec(name="a", dtype="F32", shape=(50, 100), strides=(1, 50), zeroes_holes=False)
    move = Move((100, 50), Side(0, (50, 1)), Side(0, (50, 1)))
    said = RankSlices.from_rows(index, [result], [("a", "a", [move])])
    strided = plan_reads(index, [said], Topology.even(1), plan.limits)
    memory = torch.empty(5000)
    for out in (memory, memory.view(100, 50).T, torch.nn.Parameter(memory.view(100, 50).T)):
        results, _ = _results(strided, out={"a": out})
        assert results.result(0).tensor is out
        assert results.result(0).num_bytes == 20000
    with pytest.raises(DeviceError, match="which only a tensor of the caller's has; give it in out"):
        _results(strided)
    with pytest.raises(DeviceError, match=r"must have strides \(1, 50\), got \(100, 1\)"):
        _results(strided, out={"a": memory.view(50, 100)})
    with pytest.raises(DeviceError, match=r"must have shape \(50, 100\)"):
        _results(strided, out={"a": memory.view(100, 50)})
    with pytest.raises(DeviceError, match=r"has strides \(2,\) for shape .* give a contiguous tensor"):
        _results(strided, out={"a": torch.empty(10000)[::2]})
