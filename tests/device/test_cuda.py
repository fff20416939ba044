"""Copies to a CUDA device, on a runtime that has no GPU but moves bytes as late as a real one may."""

from __future__ import annotations

import threading
from contextlib import suppress
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_streamer.device import check_device_name, is_cuda, open_device
from ray_streamer.device.base import Copy
from ray_streamer.device.cuda import SHORT_RUN_BYTES, check_bounds
from ray_streamer.device.cuda_library import find_runtime_file
from ray_streamer.device.short_runs import CHUNK_BYTES, NUM_CHUNKS
from ray_streamer.dtypes import dtype_named
from ray_streamer.errors import DeviceError
from ray_streamer.planning.rank_plan import Piece
from ray_streamer.testing.fake_cuda import CALLER_STREAM, FakeCuda, open_fake_cuda

WAIT_SECONDS = 30.0


def _lone(num_bytes: int, *, source: int = 0, target: int = 0) -> Piece:
    return Piece(0, source, num_bytes, 1, num_bytes, target, num_bytes)


def _random_bytes(num_bytes: int) -> np.ndarray:
    return np.random.default_rng(num_bytes).integers(1, 256, num_bytes, dtype=np.uint8)


class Outcome:
    """What `done` was called with."""

    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []
        self.called = threading.Event()

    def __call__(self, error: BaseException | None) -> None:
        self.errors.append(error)
        self.called.set()

    @property
    def error(self) -> BaseException | None:
        assert self.called.wait(WAIT_SECONDS)
        assert len(self.errors) == 1
        return self.errors[0]


def _names(library: FakeCuda, *wanted: str) -> list[str]:
    return [call.name for call in library.calls if call.name in wanted]


def _deliver(device, source, copies) -> Outcome:
    outcome = Outcome()
    device.deliver(source, copies, outcome)
    return outcome


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_strided_copies_move_what_a_loop_over_bytes_moves(data):
    """Every way to copy: at once, strided, packed on the host, cut on the device with a scratch of few rows or many."""
    run_bytes = data.draw(st.integers(1, 40))
    num_runs = data.draw(st.integers(1, 12))
    source_stride = run_bytes + data.draw(st.integers(0, 50))
    target_stride = run_bytes + data.draw(st.sampled_from([0, 0, 7]))
    source_start, target_start = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30))
    tails = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    source = _random_bytes(source_start + (num_runs - 1) * source_stride + run_bytes + tails[0])
    tensor = torch.zeros(target_start + (num_runs - 1) * target_stride + run_bytes + tails[1], dtype=torch.uint8)
    expected = np.zeros(tensor.numel(), np.uint8)
    for run in range(num_runs):
        for byte in range(run_bytes):
            expected[target_start + run * target_stride + byte] = source[source_start + run * source_stride + byte]
    library = FakeCuda(random=data.draw(st.sampled_from([None, Random(0)])))
    device = open_fake_cuda(
        library,
        short_run_bytes=data.draw(st.sampled_from([0, 20, 1000])),
        device_scratch_bytes=data.draw(st.sampled_from([0, 30, 100, 5000])),
    )
    if data.draw(st.booleans()):
        device.pin(memoryview(source))
    device.wait_for_caller_stream()
    piece = Piece(0, source_start, run_bytes, num_runs, source_stride, target_start, target_stride)
    outcome = _deliver(device, source, [Copy(piece, device.result(tensor))])
    assert outcome.error is None
    assert np.array_equal(tensor.numpy(), expected)
    device.close()
    assert not library.faults
    assert not library.locked


@pytest.mark.parametrize(
    ("piece", "scratch", "calls"),
    [
        pytest.param(_lone(8192), 0, ["MemcpyAsync"], id="contiguous"),
        pytest.param(Piece(0, 0, 2048, 4, 2048, 0, 2048), 0, ["MemcpyAsync"], id="rows that touch"),
        pytest.param(Piece(0, 0, 2048, 4, 4096, 0, 2048), 0, ["Memcpy2DAsync"], id="long rows"),
        pytest.param(Piece(0, 0, 64, 4, 4096, 0, 64), 0, ["MemcpyAsync"], id="short rows, packed"),
        pytest.param(Piece(0, 0, 64, 4, 4096, 0, 4096), 0, ["Memcpy2DAsync"], id="short rows to short rows"),
        pytest.param(Piece(0, 0, 64, 4, 4096, 0, 64), 4096, ["MemcpyAsync", "Memcpy2DAsync"] * 4, id="short rows, cut"),
        pytest.param(
            Piece(0, 0, CHUNK_BYTES, 2, CHUNK_BYTES + 8, 0, CHUNK_BYTES), 0, ["Memcpy2DAsync"], id="longest rows"
        ),
        pytest.param(Piece(0, 0, 64, 4, 4096, 0, 64), 4095, ["MemcpyAsync"], id="scratch of less than a row"),
    ],
)
def test_the_kind_of_copy_follows_the_length_of_a_run(piece, scratch, calls):
    short_run_bytes = 1 << 30 if piece.run_bytes == CHUNK_BYTES else SHORT_RUN_BYTES
    library = FakeCuda()
    device = open_fake_cuda(library, short_run_bytes=short_run_bytes, device_scratch_bytes=scratch)
    device.wait_for_caller_stream()
    tensor = torch.zeros(3 * CHUNK_BYTES, dtype=torch.uint8)
    assert _deliver(device, _random_bytes(3 * CHUNK_BYTES), [Copy(piece, device.result(tensor))]).error is None
    assert _names(library, "MemcpyAsync", "Memcpy2DAsync") == calls
    device.close()


def test_nothing_is_done_before_its_event():
    """The source is given back when the copy engine has read it, no sooner."""
    may_fire = threading.Event()
    library = FakeCuda(before={"EventSynchronize": lambda: may_fire.wait(WAIT_SECONDS)})
    device = open_fake_cuda(library)
    source, tensor = _random_bytes(5000), torch.zeros(5000, dtype=torch.uint8)
    device.pin(memoryview(source))
    outcome = _deliver(device, source, [Copy(_lone(5000), device.result(tensor))])
    assert not outcome.called.is_set()
    assert library.num_pending == 1
    assert not tensor.any()
    may_fire.set()
    assert outcome.error is None
    assert np.array_equal(tensor.numpy(), source)
    device.close()


def test_memory_is_locked_before_its_first_copy_and_unlocked_after_its_last():
    library = FakeCuda()
    device = open_fake_cuda(library)
    own, neighbours = _random_bytes(8192), _random_bytes(4096)
    neighbours.flags.writeable = False
    tensor = torch.zeros(12288, dtype=torch.uint8)
    device.pin(memoryview(own))
    device.pin(memoryview(neighbours))
    device.pin(memoryview(b""))
    _deliver(device, own, [Copy(_lone(8192), device.result(tensor))])
    _deliver(device, neighbours, [Copy(_lone(4096, target=8192), device.result(tensor))])
    assert len(library.locked) == 2
    device.close()
    assert np.array_equal(tensor.numpy(), np.concatenate([own, neighbours]))
    calls = _names(library, "HostRegister", "MemcpyAsync", "EventSynchronize", "StreamSynchronize", "HostUnregister")
    assert calls.index("HostRegister") < calls.index("MemcpyAsync")
    assert calls[-2:] == ["HostUnregister"] * 2
    assert "HostUnregister" not in calls[:-2]
    flags = [call.arguments[2] for call in library.calls if call.name == "HostRegister"]
    assert flags == [1, 1 | 8], "portable; what is mapped read-only is locked as read-only"
    assert not library.faults


def test_a_copy_waits_until_its_source_is_locked():
    """Even when locking takes long: a copy out of pageable memory would hold up the thread that queues it."""
    copied, locked_at_copy = threading.Event(), []

    def before_copy() -> None:
        locked_at_copy.append(len(library.locked))
        copied.set()

    # Gives a copy that does not wait the time to show itself.
    library = FakeCuda(before={"HostRegister": lambda: copied.wait(0.2), "MemcpyAsync": before_copy})
    device = open_fake_cuda(library)
    source, tensor = _random_bytes(100), torch.zeros(100, dtype=torch.uint8)
    device.pin(memoryview(source))
    assert _deliver(device, source, [Copy(_lone(100), device.result(tensor))]).error is None
    assert locked_at_copy == [1]
    device.close()


def test_a_device_that_knows_no_read_only_memory_takes_it_plainly():
    library = FakeCuda(failures={("HostRegister", 1): 1})
    device = open_fake_cuda(library)
    arena = bytes(4096)
    device.pin(memoryview(arena))
    device.close()
    assert [call.arguments[2] for call in library.calls if call.name == "HostRegister"] == [9, 1]
    assert not library.locked


def test_memory_that_cannot_be_locked_is_copied_from_all_the_same(caplog):
    library = FakeCuda(failures={("HostRegister", 1): 2})
    device = open_fake_cuda(library)
    source, tensor = _random_bytes(5000), torch.zeros(5000, dtype=torch.uint8)
    device.pin(memoryview(source))
    assert _deliver(device, source, [Copy(_lone(5000), device.result(tensor))]).error is None
    device.close()
    assert np.array_equal(tensor.numpy(), source)
    assert library.count("HostUnregister") == 0
    assert "5000 bytes of staging memory are not page-locked" in caplog.text
    assert "cudaHostRegister on cuda:0 failed: out of memory (error 2)" in caplog.text


def test_copies_follow_what_the_caller_has_queued():
    library = FakeCuda()
    device = open_fake_cuda(library)
    device.wait_for_caller_stream()
    record, wait = [call for call in library.calls if call.name in ("EventRecord", "StreamWaitEvent")]
    (create,) = [call for call in library.calls if call.name == "StreamCreateWithFlags"]
    assert record.arguments[1] == CALLER_STREAM
    assert wait.arguments[:2] == (create.arguments[0]._obj.value, record.arguments[0])
    assert create.arguments[1] == 1, "a stream that does not wait for the default stream"
    device.close()


@pytest.mark.parametrize(
    ("name", "status"),
    [("MemcpyAsync", 1), ("Memcpy2DAsync", 12), ("EventRecord", 700), ("EventSynchronize", 700), ("SetDevice", 2)],
)
def test_an_error_of_any_call_is_said_once_with_its_name_and_text(name, status):
    library = FakeCuda(failures={(name, number): status for number in range(1, 20)})
    device = open_fake_cuda(library)
    tensor = torch.zeros(16384, dtype=torch.uint8)
    pieces = [_lone(100), Piece(0, 0, 2048, 4, 4096, 0, 2048)]
    outcome = _deliver(device, _random_bytes(16384), [Copy(piece, device.result(tensor)) for piece in pieces])
    error = outcome.error
    assert isinstance(error, DeviceError)
    assert f"cuda{name} on cuda:0 failed: {library.error_text(status)} (error {status})" in str(error)
    # Taken out, or torch would find it later and blame something else.
    assert library.count("GetLastError") >= 1
    with suppress(DeviceError):
        device.close()


def test_a_failed_start_is_the_error_of_everything_that_needs_the_device():
    device = open_fake_cuda(FakeCuda(failures={("StreamCreateWithFlags", 1): 2, ("StreamCreateWithFlags", 2): 2}))
    arena = bytearray(4096)
    device.pin(memoryview(arena))
    with pytest.raises(DeviceError, match="cudaStreamCreateWithFlags on cuda:0 failed: out of memory"):
        device.empty(dtype_named("F32"), (2,))
    with pytest.raises(DeviceError, match="cudaStreamCreateWithFlags"):
        device.wait_for_caller_stream()
    device.close()


@pytest.mark.parametrize("name", ["HostUnregister", "StreamSynchronize"])
def test_what_fails_at_the_end_is_raised_by_close(name):
    library = FakeCuda(failures={(name, 1): 700})
    device = open_fake_cuda(library)
    arenas = bytearray(4096), bytearray(8192)
    for arena in arenas:
        device.pin(memoryview(arena))
    device.wait_for_caller_stream()
    with pytest.raises(DeviceError, match=f"cuda{name} on cuda:0 failed: an illegal memory access"):
        device.close()
    assert library.count("HostUnregister") == 2


def test_after_a_copy_that_failed_the_source_is_kept_for_those_before_it():
    library = FakeCuda(failures={("MemcpyAsync", 2): 1})
    device = open_fake_cuda(library)
    source, tensor = _random_bytes(200), torch.zeros(200, dtype=torch.uint8)
    device.pin(memoryview(source))
    made: list[bool] = []
    copies = [Copy(_lone(100), device.result(tensor)), Copy(_lone(100, source=100, target=100), device.result(tensor))]
    outcome = Outcome()

    def done(error: BaseException | None) -> None:
        made.append(np.array_equal(tensor.numpy()[:100], source[:100]))
        outcome(error)

    device.deliver(source, copies, done)
    assert isinstance(outcome.error, DeviceError)
    assert made == [True]
    device.close()


def test_short_rows_of_many_blocks_share_the_chunks():
    """More pieces than chunks, from several threads: each waits for a chunk that its event has freed."""
    library = FakeCuda(random=Random(3))
    device = open_fake_cuda(library)
    run_bytes, num_runs = 512, 2 * CHUNK_BYTES // 512 + 3
    sources = [_random_bytes(num_runs * 520 + number) for number in range(6)]
    tensors = [torch.zeros(num_runs * run_bytes, dtype=torch.uint8) for _ in sources]
    piece = Piece(0, 0, run_bytes, num_runs, 520, 0, run_bytes)
    outcomes = [Outcome() for _ in sources]
    threads = [
        threading.Thread(target=device.deliver, args=(source, [Copy(piece, device.result(tensor))], outcome))
        for source, tensor, outcome in zip(sources, tensors, outcomes, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert [outcome.error for outcome in outcomes] == [None] * 6
    for source, tensor in zip(sources, tensors, strict=True):
        rows = np.ndarray((num_runs, run_bytes), np.uint8, source, 0, (520, 1))
        assert np.array_equal(tensor.numpy(), rows.ravel())
    registered = [call.arguments[1] for call in library.calls if call.name == "HostRegister"]
    assert registered == [NUM_CHUNKS * CHUNK_BYTES], "bounded, and locked once"
    device.close()
    assert not library.locked
    assert not library.faults


def test_rows_of_many_blocks_are_cut_in_one_scratch():
    """What one thread copies into the scratch is cut before another thread's rows overwrite it."""
    library = FakeCuda()
    device = open_fake_cuda(library, device_scratch_bytes=2000)
    device.wait_for_caller_stream()
    piece = Piece(0, 0, 100, 50, 400, 0, 100)
    sources = [_random_bytes(49 * 400 + 100 + number) for number in range(8 * 10)]
    tensors = [torch.zeros(50 * 100, dtype=torch.uint8) for _ in sources]
    outcomes = [Outcome() for _ in sources]
    start = threading.Barrier(8)

    def work(first: int) -> None:
        start.wait(WAIT_SECONDS)
        for number in range(first, len(sources), 8):
            device.deliver(sources[number], [Copy(piece, device.result(tensors[number]))], outcomes[number])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert [outcome.error for outcome in outcomes] == [None] * len(sources)
    for source, tensor in zip(sources, tensors, strict=True):
        assert np.array_equal(tensor.numpy(), np.ndarray((50, 100), np.uint8, source, 0, (400, 1)).ravel())
    device.close()


def test_a_device_serves_one_load_after_the_other():
    library = FakeCuda()
    device = open_fake_cuda(library)
    for _ in range(3):
        source, tensor = _random_bytes(3000), torch.zeros(3000, dtype=torch.uint8)
        device.pin(memoryview(source))
        assert _deliver(device, source, [Copy(_lone(3000), device.result(tensor))]).error is None
        device.close()
        assert np.array_equal(tensor.numpy(), source)
        assert not library.locked
    assert library.count("StreamCreateWithFlags") == 1
    assert library.count("EventCreateWithFlags") == 2, "one to follow the caller, one that is used again"


@pytest.mark.parametrize(
    "piece",
    [
        _lone(11),
        _lone(5, source=6),
        _lone(5, target=6),
        _lone(5, source=-1),
        Piece(0, 0, 2, 6, 2, 0, 2),
        Piece(0, 0, 2, 3, 5, 0, 2),
        Piece(0, 0, 2, 3, 2, 0, 5),
    ],
)
def test_a_copy_that_leaves_its_memory_is_refused(piece):
    """A wrong plan must not become a wild write."""
    with pytest.raises(ValueError, match="does not lie within a block of 10 and a tensor of 10 bytes"):
        check_bounds(piece, 10, 10)
    library = FakeCuda()
    device = open_fake_cuda(library)
    outcome = _deliver(device, _random_bytes(10), [Copy(piece, device.result(torch.zeros(10, dtype=torch.uint8)))])
    assert isinstance(outcome.error, ValueError)
    assert library.count("MemcpyAsync", "Memcpy2DAsync") == 0
    device.close()


def test_targets_of_the_caller_are_checked():
    device = open_fake_cuda(FakeCuda())
    with pytest.raises(DeviceError, match=r"out\['w'\] lies on meta, the load was asked to deliver to cuda:0"):
        device.check_target("w", torch.empty(2, device="meta"))
    result = device.result(torch.empty(4))
    assert result.address is None
    assert device.landing(result, 0, 4) is None
    device.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_torch_is_asked_and_its_answer_told():
    with pytest.raises(
        DeviceError, match=rf"device 'cuda:1': torch {torch.__version__.replace('+', '.')} sees no CUDA"
    ):
        open_device("cuda:1")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:12", "cpu"])
def test_names_of_devices(name):
    check_device_name(name)
    assert is_cuda(name) == name.startswith("cuda")


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:-1", "gpu", "cpu:0", "CUDA", ""])
def test_names_of_no_device(name):
    with pytest.raises(DeviceError, match="is not supported by this version"):
        check_device_name(name)


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        ("/venv/lib/python3.11/site-packages/nvidia/cuda_runtime/lib/libcudart.so.12", "cuda"),
        ("/opt/a b/libcudart-d0da41ae.so.11.0", "cuda"),
        ("/opt/rocm/lib/libamdhip64.so.6", "hip"),
    ],
)
def test_the_runtime_is_found_among_the_mapped_files(path, prefix):
    maps = f"7f0-7f1 r--p 00000000 08:01 1 /lib/libc.so.6\n7f1-7f2 r-xp 00001000 08:01 42    {path}\n7f3-7f4 rw-p 0 0:0 0\n"
    assert find_runtime_file(maps) == (path, prefix)


def test_a_torch_without_a_runtime_library_is_told():
    with pytest.raises(DeviceError, match="has loaded no CUDA runtime that copies could go through"):
        find_runtime_file("7f0-7f1 r--p 00000000 08:01 1 /lib/libc.so.6\n")
