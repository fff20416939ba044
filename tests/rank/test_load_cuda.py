"""Loads to a CUDA device on a runtime without a GPU: order, failures and aborts, with nothing left page-locked."""

from __future__ import annotations

import secrets
import threading
from random import Random
from typing import TYPE_CHECKING

import pytest
import torch

from ray_streamer.errors import DeviceError, LoadAbortedError, RankFailedError, ShortReadError
from ray_streamer.planning.topology import Topology
from ray_streamer.testing.fake_cuda import FakeCuda, open_fake_cuda
from ray_streamer.testing.parts import TensorPart

if TYPE_CHECKING:
    from ray_streamer.planning.read_plan import ReadPlan

GATE_SECONDS = 30.0
NUM_BLOCKS = 24
SHAPE = (NUM_BLOCKS * 16, 256)


@pytest.fixture
def halves_plan(ranks, split, tmp_path) -> ReadPlan:
    """Two ranks that each take half of every row of a tensor of 24 blocks, and all of a small one."""
    folder = ranks.write(tmp_path / "checkpoint", [[("columns", "U8", SHAPE), ("small", "F32", (3,))]])
    slices = {"columns": split(SHAPE, 2, dim=1), "small": (TensorPart.whole((3,)),) * 2}
    return ranks.plan(str(folder), slices, topology=Topology.even(2), min_run_bytes=4096, max_gap_bytes=4096)


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left
    )


def _check_given_back(*libraries: FakeCuda) -> None:
    for library in libraries:
        assert not library.locked, "memory stayed page-locked"
        assert not library.faults
        assert not library.num_pending
        names = [call.name for call in library.calls]
        if "MemcpyAsync" in names or "Memcpy2DAsync" in names:
            last_copy = max(number for number, name in enumerate(names) if name.startswith("Memcpy"))
            first_unlock = names.index("HostUnregister")
            assert last_copy < names.index("StreamSynchronize") < first_unlock


def test_no_block_is_read_into_a_slot_whose_event_has_not_fired(ranks, halves_plan):
    """Three slots, copies that are made only when they are waited for: reads stay at most three ahead of events."""
    expected = ranks.prepare(halves_plan).start().tensors()
    lock, seen = threading.Lock(), []

    class Watch:
        num_read = num_fired = 0

    def before_read(path, extent, count) -> None:
        with lock:
            Watch.num_read = count
            seen.append(Watch.num_read - Watch.num_fired)

    def on_wait() -> None:
        with lock:
            Watch.num_fired += 1

    alone = ranks.plan(
        halves_plan.index.uri,
        {"columns": (TensorPart.along(SHAPE, dim=1, start=0, stop=128),), "small": (TensorPart.whole((3,)),)},
        topology=Topology.even(1),
        min_run_bytes=4096,
        max_gap_bytes=4096,
    )
    library = FakeCuda(before={"EventSynchronize": on_wait})
    device = open_fake_cuda(library, short_run_bytes=0)
    running = ranks.prepare(
        alone, memory_limit=3 * 4096, concurrency=8, devices={0: device}, before_read={0: before_read}
    )
    (tensors,) = running.start().tensors()
    assert _equal(tensors, expected[0])
    assert len(seen) >= NUM_BLOCKS
    # An event counts as fired here when its wait begins, so a read that is the fourth ahead has taken a slot too early.
    assert max(seen) <= 3
    _check_given_back(library)


def test_every_arena_is_locked_once_on_each_rank(ranks, halves_plan):
    expected = ranks.prepare(halves_plan).start().tensors()
    libraries = [FakeCuda(random=Random(rank)) for rank in range(2)]
    with ranks.nothing_left():
        devices = {rank: open_fake_cuda(library, short_run_bytes=0) for rank, library in enumerate(libraries)}
        tensors = ranks.prepare(halves_plan, memory_limit=4 * 4096, devices=devices).start().tensors()
    assert all(_equal(mine, theirs) for mine, theirs in zip(tensors, expected, strict=True))
    for library in libraries:
        locked = [call.arguments[1:] for call in library.calls if call.name == "HostRegister"]
        assert locked == [(4 * 4096, 1), (4 * 4096, 1 | 8)], "its own, and the neighbour's, which is mapped read-only"
    _check_given_back(*libraries)


def test_reads_begin_while_memory_is_being_locked(ranks, halves_plan):
    """Locking ends only when a read has begun: one that waited for it would wait for ever."""
    expected = ranks.prepare(halves_plan).start().tensors()
    reading = threading.Event()
    waited: list[bool] = []
    library = FakeCuda(before={"HostRegister": lambda: waited.append(reading.wait(GATE_SECONDS))})
    tensors = (
        ranks.prepare(
            halves_plan,
            devices={0: open_fake_cuda(library)},
            before_read={0: lambda path, extent, count: reading.set()},
        )
        .start()
        .tensors()
    )
    assert all(waited)
    assert _equal(tensors[0], expected[0])


def test_given_tensors_are_filled_where_they_are(ranks, halves_plan):
    expected = ranks.prepare(halves_plan).start().tensors()
    library, session = FakeCuda(), secrets.token_hex(8)
    out = {"columns": torch.zeros(SHAPE[0], SHAPE[1] // 2, dtype=torch.uint8)}
    address = out["columns"].data_ptr()
    running = ranks.prepare(halves_plan, ranks=[0], devices={0: open_fake_cuda(library)}, out=out, session=session)
    other = ranks.prepare(halves_plan, ranks=[1], session=session)
    running.start()
    other.start()
    (tensors,) = running.tensors()
    other.tensors()
    assert tensors["columns"] is out["columns"]
    assert tensors["columns"].data_ptr() == address
    assert _equal(tensors, expected[0])
    # Whatever the caller has queued on its own stream, such as the zeros above, comes first.
    names = [call.name for call in library.calls]
    assert names.index("StreamWaitEvent") < min(
        number for number, name in enumerate(names) if name.startswith("Memcpy")
    )


def test_on_complete_sees_whole_tensors(ranks, halves_plan):
    expected = ranks.prepare(halves_plan).start().tensors()
    seen: dict[str, torch.Tensor] = {}
    session = secrets.token_hex(8)
    devices = {rank: open_fake_cuda(FakeCuda()) for rank in range(2)}
    running = ranks.prepare(halves_plan, ranks=[1], devices=devices, session=session)
    watched = ranks.prepare(
        halves_plan,
        ranks=[0],
        devices=devices,
        session=session,
        on_complete=lambda items: seen.update({name: tensor.clone() for name, tensor in items}),
    )
    running.start()
    watched.start()
    running.tensors()
    watched.tensors()
    assert _equal(dict(sorted(seen.items())), expected[0])


@pytest.mark.parametrize("call", ["MemcpyAsync", "Memcpy2DAsync", "EventRecord", "EventSynchronize"])
@pytest.mark.parametrize("count", [2, 7])
def test_a_call_that_fails_ends_the_load_and_leaves_nothing(ranks, halves_plan, call, count):
    libraries = [FakeCuda(failures={(call, count): 700}), FakeCuda()]
    with ranks.nothing_left():
        devices = {
            # Packed rows are contiguous copies, cut rows are strided ones.
            rank: open_fake_cuda(library, device_scratch_bytes=8192 if call == "Memcpy2DAsync" else 0)
            for rank, library in enumerate(libraries)
        }
        outcomes = ranks.prepare(halves_plan, memory_limit=8192, devices=devices).start().join()
    assert isinstance(outcomes[0], DeviceError)
    assert f"cuda{call} on cuda:0 failed: an illegal memory access was encountered" in str(outcomes[0])
    assert isinstance(outcomes[1], RankFailedError)
    assert outcomes[1].rank == 0
    _check_given_back(*libraries)


def test_memory_that_cannot_be_given_back_fails_the_load(ranks, halves_plan):
    libraries = [FakeCuda(failures={("HostUnregister", 1): 700}), FakeCuda()]
    devices = {rank: open_fake_cuda(library) for rank, library in enumerate(libraries)}
    outcomes = ranks.prepare(halves_plan, devices=devices).start().join()
    assert isinstance(outcomes[0], DeviceError)
    assert "cudaHostUnregister on cuda:0 failed" in str(outcomes[0])


def test_a_read_that_fails_while_copies_are_under_way(ranks, halves_plan):
    """The copies end first, then memory is unlocked, then the load raises what the read raised."""
    error = ShortReadError("too short")
    failed = threading.Event()

    def before_read(path, extent, count) -> None:
        if count == 2:
            failed.set()
            raise error

    libraries = [FakeCuda(before={"EventSynchronize": lambda: failed.wait(GATE_SECONDS)}), FakeCuda()]
    with ranks.nothing_left():
        devices = {rank: open_fake_cuda(library) for rank, library in enumerate(libraries)}
        running = ranks.prepare(
            halves_plan, memory_limit=1 << 20, devices=devices, before_read={0: before_read}, concurrency=2
        )
        outcomes = running.start().join()
    assert outcomes[0] is error
    assert isinstance(outcomes[1], RankFailedError)
    _check_given_back(*libraries)


def test_abort_in_the_middle_leaves_nothing(ranks, halves_plan):
    copying, aborted = threading.Event(), threading.Event()

    def on_wait() -> None:
        copying.set()
        assert aborted.wait(GATE_SECONDS)

    libraries = [FakeCuda(before={"EventSynchronize": on_wait}), FakeCuda(random=Random(1))]
    error = LoadAbortedError("rank 7 failed")
    with ranks.nothing_left():
        devices = {rank: open_fake_cuda(library) for rank, library in enumerate(libraries)}
        running = ranks.prepare(halves_plan, memory_limit=4 * 4096, devices=devices).start()
        assert copying.wait(GATE_SECONDS)
        running.loads[0].abort(error)
        aborted.set()
        outcomes = running.join()
    assert outcomes[0] is error
    assert isinstance(outcomes[1], RankFailedError)
    _check_given_back(*libraries)


def test_a_device_that_cannot_start_is_told_before_anything_is_read(ranks, halves_plan):
    device = open_fake_cuda(FakeCuda(failures={("EventCreateWithFlags", 1): 2}))
    with ranks.nothing_left(), pytest.raises(DeviceError, match="cudaEventCreateWithFlags on cuda:0 failed: out of m"):
        ranks.prepare(halves_plan, ranks=[0], devices={0: device})
