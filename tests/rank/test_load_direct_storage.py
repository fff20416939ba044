"""A GPU that reads files itself: what one rank alone wants in one piece bypasses the arena, everything else does not."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ray_streamer.device.direct_storage import DirectStorage
from ray_streamer.errors import DeviceError, ObjectChangedError
from ray_streamer.planning.topology import Topology
from ray_streamer.storage.memory import MemoryStorage
from ray_streamer.testing.fake_cuda import FakeCuda, open_fake_cuda
from ray_streamer.testing.parts import TensorPart

if TYPE_CHECKING:
    from pathlib import Path

ROWS, COLUMNS = (256, 128), (64, 512)


class HostFile:
    """Reads as `kvikio.CuFile` does, into host memory."""

    num_reads = 0
    fails = False

    def __init__(self, file: str, flags: str) -> None:
        self._fd = os.open(file, os.O_RDONLY)

    def pread(self, buf: torch.Tensor, size: int, file_offset: int) -> HostFile:
        if HostFile.fails:
            raise RuntimeError("cuFile says no")
        HostFile.num_reads += 1
        self._result = os.preadv(self._fd, [buf.numpy()], file_offset)
        return self

    def get(self) -> int:
        return self._result

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture(autouse=True)
def fresh_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostFile, "num_reads", 0)
    monkeypatch.setattr(HostFile, "fails", False)


@pytest.fixture
def specs() -> list[tuple[str, str, tuple[int, ...]]]:
    return [("rows", "F32", ROWS), ("columns", "U8", COLUMNS)]


def _plan(ranks, uri: str) -> Any:
    slices = {
        "rows": (TensorPart.along(ROWS, dim=0, start=0, stop=200),),
        "columns": (TensorPart.along(COLUMNS, dim=1, start=0, stop=100),),
    }
    return ranks.plan(uri, slices, topology=Topology.even(1), min_run_bytes=4096, max_gap_bytes=4096)


def _devices() -> dict[int, Any]:
    return {0: open_fake_cuda(FakeCuda(), direct_storage=DirectStorage(HostFile))}


def test_one_piece_goes_straight_and_rows_are_staged(ranks, specs, tmp_path) -> None:
    plan = _plan(ranks, str(ranks.write(tmp_path, [specs])))
    (expected,) = ranks.prepare(plan).start().tensors()
    out = {"rows": torch.zeros(300, 128)[50:250]}
    with ranks.nothing_left():
        running = ranks.prepare(plan, devices=_devices(), out=out)
        (tensors,) = running.start().tensors()
    assert all(torch.equal(tensors[name].view(torch.uint8), expected[name].view(torch.uint8)) for name in expected)
    statistics = running.loads[0].statistics()
    assert HostFile.num_reads > 0
    assert HostFile.num_reads + len(running.storages[0].reads) == statistics.num_requests
    assert 0 < statistics.direct_bytes <= 200 * 128 * 4
    assert statistics.bytes_delivered == statistics.bytes_to_deliver


def test_what_the_caller_has_queued_is_over_before_the_first_read(ranks, specs, tmp_path) -> None:
    """Such a read knows no stream, so the stream that follows the caller's is waited for when the results are prepared."""
    plan = _plan(ranks, str(ranks.write(tmp_path, [specs])))
    library = FakeCuda()
    device = open_fake_cuda(library, direct_storage=DirectStorage(HostFile))
    running = ranks.prepare(plan, devices={0: device})
    names = [call.name for call in library.calls if call.name.startswith("Stream")]
    assert names[-2:] == ["StreamWaitEvent", "StreamSynchronize"]
    running.start().tensors()


def test_a_storage_without_files_takes_the_normal_way(ranks, specs, tmp_path) -> None:
    folder = ranks.write(tmp_path, [specs])
    uri = "memory://direct-storage"
    MemoryStorage.remove(uri)
    MemoryStorage.put(uri, {path.name: path.read_bytes() for path in folder.iterdir()})
    running = ranks.prepare(_plan(ranks, uri), devices=_devices())
    running.start().tensors()
    assert HostFile.num_reads == 0
    assert running.loads[0].statistics().direct_bytes == 0


def test_what_the_device_cannot_read_fails_the_load(ranks, specs, tmp_path, monkeypatch) -> None:
    plan = _plan(ranks, str(ranks.write(tmp_path, [specs])))
    monkeypatch.setattr(HostFile, "fails", True)
    with ranks.nothing_left():
        (outcome,) = ranks.prepare(plan, devices=_devices()).start().join()
    assert isinstance(outcome, DeviceError)
    assert "cuFile says no; gpu_direct_storage=off" in str(outcome)


def test_a_file_that_was_replaced_is_found_out(ranks, specs, tmp_path) -> None:
    """The device opens by name and knows no etag; the index does, and is asked before anything is handed out."""
    folder: Path = ranks.write(tmp_path, [specs])
    plan = _plan(ranks, str(folder))
    (path,) = folder.iterdir()
    os.utime(path, ns=(1, 1))
    rows_only = ranks.plan(
        str(folder), {"rows": (TensorPart.whole(ROWS),), "columns": (None,)}, topology=Topology.even(1)
    )
    os.utime(path, ns=(2, 2))
    for stale in (plan, rows_only):
        (outcome,) = ranks.prepare(stale, devices=_devices()).start().join()
        assert isinstance(outcome, ObjectChangedError)
