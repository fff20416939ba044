"""Tensors in host memory: every dtype, every strided copy, whatever the memory is made of."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_streamer.device import open_device
from ray_streamer.device.base import Copy
from ray_streamer.device.cpu import CpuDevice
from ray_streamer.dtypes import DTYPES
from ray_streamer.errors import DeviceError
from ray_streamer.planning.rank_plan import Piece


def _lone(num_bytes: int, *, source: int = 0, target: int = 0) -> Piece:
    return Piece(0, source, num_bytes, 1, num_bytes, target, num_bytes)


def _copy(source: np.ndarray, piece: Piece, target: np.ndarray) -> None:
    """By the device, whose error is raised."""
    device = CpuDevice()
    outcomes: list[BaseException | None] = []
    device.deliver(source, [Copy(piece, device.result(torch.from_numpy(target)))], outcomes.append)
    [error] = outcomes
    if error is not None:
        raise error


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(), (24,), (3, 8), (2, 0, 8), (1, 1, 4)], ids=str)
def test_every_dtype_lies_in_memory_as_in_the_file(dtype, shape):
    num_bits = int(np.prod(shape, dtype=np.int64)) * dtype.num_bits
    if num_bits % 8:
        pytest.skip("not whole bytes: no file holds it")
    device = CpuDevice()
    result = device.result(device.empty(dtype, shape))
    tensor, num_bytes, address = result
    assert tensor.dtype == getattr(torch, dtype.torch_name)
    assert tuple(tensor.shape) == dtype.torch_shape(shape)
    assert tensor.is_contiguous()
    assert num_bytes == result.host_bytes().nbytes == tensor.nbytes == num_bits // 8
    content = np.arange(num_bits // 8, dtype=np.uint8) % 2
    done: list[BaseException | None] = []
    device.deliver(content, [Copy(_lone(len(content)), result)] if len(content) else [], done.append)
    assert done == [None]
    if tensor.numel():
        assert result.host_bytes().ctypes.data == tensor.data_ptr() == address
    # Torch's own reading of a file's bytes.
    expected = torch.empty(0, dtype=tensor.dtype).set_(
        torch.frombuffer(bytearray(content.tobytes()), dtype=torch.uint8).untyped_storage()
        if len(content)
        else torch.UntypedStorage(0),
        0,
        tensor.shape,
    )
    assert _bytes(tensor) == _bytes(expected) == content.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize(("shape", "strides"), [((1,), (2,)), ((1, 1), (5, 3)), ((1, 0), (7, 2)), ((), ())], ids=str)
def test_strides_that_no_index_uses_are_no_matter(dtype, shape, strides):
    memory = torch.zeros(8 * 16, dtype=torch.uint8).view(getattr(torch, dtype.torch_name))
    tensor = memory.as_strided(shape, strides, 1)
    result = CpuDevice().result(tensor)
    assert result.host_bytes().nbytes == tensor.nbytes
    result.host_bytes()[:] = 1
    written = memory.view(torch.uint8).nonzero().flatten().tolist()
    assert written == list(range(memory.itemsize, memory.itemsize + tensor.nbytes))


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.untyped_storage())[: tensor.nbytes]


def test_a_delivered_tensor_reads_as_numbers():
    device = CpuDevice()
    result = device.result(device.empty(next(dtype for dtype in DTYPES if dtype.name == "F32"), (2, 3)))
    numbers = np.array([[1.5, -2, 3], [4, 5, 6]], dtype="<f4")
    device.deliver(numbers.view(np.uint8).ravel(), [Copy(_lone(24), result)], lambda _: None)
    assert torch.equal(result.tensor, torch.from_numpy(numbers))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_strided_copies_move_what_a_loop_over_bytes_moves(data):
    run_bytes = data.draw(st.integers(1, 40))
    num_runs = data.draw(st.integers(1, 12))
    source_stride = data.draw(st.integers(run_bytes, run_bytes + 50))
    target_stride = data.draw(st.integers(run_bytes, run_bytes + 50))
    source_start, target_start = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30))
    tails = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    source = np.random.default_rng(0).integers(
        1, 256, source_start + (num_runs - 1) * source_stride + run_bytes + tails[0], dtype=np.uint8
    )
    source.flags.writeable = False
    target = np.zeros(target_start + (num_runs - 1) * target_stride + run_bytes + tails[1], np.uint8)
    expected = target.copy()
    for run in range(num_runs):
        for byte in range(run_bytes):
            expected[target_start + run * target_stride + byte] = source[source_start + run * source_stride + byte]
    _copy(source, Piece(0, source_start, run_bytes, num_runs, source_stride, target_start, target_stride), target)
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("num_bytes", [1, 16 << 10, (16 << 10) + 1, 200_001])
def test_a_run_of_any_length_arrives_as_it_is(num_bytes):
    source = np.random.default_rng(0).integers(1, 256, num_bytes + 9, dtype=np.uint8)
    target = np.zeros(num_bytes + 5, np.uint8)
    _copy(source, _lone(num_bytes, source=7, target=3), target)
    assert np.array_equal(target[3:-2], source[7:-2])
    assert not target[:3].any()
    assert not target[-2:].any()


@pytest.mark.parametrize(
    "piece",
    [
        _lone(11),
        _lone(5, source=6),
        _lone(5, target=6),
        _lone(5, source=-1),
        _lone(5, target=-1),
        Piece(0, 0, 2, 6, 2, 0, 2),
        Piece(0, 0, 2, 3, 5, 0, 2),
        Piece(0, 0, 2, 3, 2, 0, 5),
    ],
)
def test_a_copy_that_leaves_its_memory_is_refused(piece):
    """A wrong plan must not become a wild write."""
    source, target = np.ones(10, np.uint8), np.zeros(10, np.uint8)
    with pytest.raises((ValueError, TypeError)):
        _copy(source, piece, target)
    assert not target.any()


def test_a_failed_copy_is_said_once_to_done():
    device = CpuDevice()
    result = device.result(torch.zeros(4, dtype=torch.uint8))
    outcomes: list[BaseException | None] = []
    device.deliver(np.ones(8, np.uint8), [Copy(_lone(8), result)], outcomes.append)
    assert len(outcomes) == 1
    assert isinstance(outcomes[0], ValueError)


def test_memory_of_the_caller_lies_where_its_view_says():
    base = torch.zeros(10, 6, dtype=torch.int16)
    result = CpuDevice().result(base[4])
    result.host_bytes()[:] = 255
    assert (base[4] == -1).all()
    assert base.abs().sum() == 6


def test_devices_by_name():
    assert open_device("cpu").name == "cpu"
    with pytest.raises(DeviceError, match="device 'abacus'"):
        open_device("abacus")


CAST_IN_THREADS = """
import os, threading, torch
from ray_streamer.device.strided import _copy_in_one_thread

torch.set_num_threads(16)
num_threads = []
source = torch.randn(3, 70_000).bfloat16()[:, ::2]
targets = [torch.empty(source.shape) for _ in range(2)]
before = len(os.listdir("/proc/self/task"))

def cast(target):
    _copy_in_one_thread(target, source)
    num_threads.append(len(os.listdir("/proc/self/task")))

# One thread for both: the system may show one that has ended for a moment longer.
thread = threading.Thread(target=lambda: [cast(target) for target in targets])
thread.start()
thread.join()
assert all(torch.equal(target, source.float()) for target in targets)
print(max(num_threads) - before)
"""


def test_a_thread_that_casts_starts_no_others():
    said = subprocess.run([sys.executable, "-c", CAST_IN_THREADS], check=True, capture_output=True, text=True)
    assert int(said.stdout) == 1, "the thread that casts, and nothing else"
