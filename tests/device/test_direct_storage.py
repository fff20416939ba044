"""Files that a GPU reads itself: kvikio's interface is stood in for, since kvikio needs a driver even to read host memory."""

from __future__ import annotations

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ray_streamer.device.direct_storage import DirectStorage, open_direct_storage
from ray_streamer.errors import DeviceError, ShortReadError
from ray_streamer.extent import Extent

if TYPE_CHECKING:
    from pathlib import Path


class Future:
    def __init__(self, result: int) -> None:
        self._result = result

    def get(self) -> int:
        return self._result


class CuFile:
    """What kvikio 26.10 documents of its class, on host memory."""

    opened: list[CuFile]
    lock = threading.Lock()

    def __init__(self, file: str, flags: str) -> None:
        assert flags == "r"
        if not os.path.exists(file):
            raise RuntimeError("KvikIO failure: cannot open file")
        self.fd = os.open(file, os.O_RDONLY)
        self.num_reads = 0
        with self.lock:
            self.opened.append(self)

    def pread(self, buf: torch.Tensor, size: int | None = None, file_offset: int = 0) -> Future:
        assert (buf.dtype, buf.dim(), buf.numel()) == (torch.uint8, 1, size)
        with self.lock:
            self.num_reads += 1
        return Future(os.preadv(self.fd, [buf.numpy()], file_offset))

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> type[CuFile]:
    module: Any = ModuleType("kvikio")
    module.CuFile = CuFile
    monkeypatch.setitem(sys.modules, "kvikio", module)
    monkeypatch.setattr(CuFile, "opened", [], raising=False)
    return CuFile


@pytest.fixture
def storage(kvikio: type[CuFile]) -> DirectStorage:
    storage = open_direct_storage()
    assert storage is not None
    return storage


def test_extents_of_files_that_are_opened_once(storage: DirectStorage, tmp_path: Path) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "a").write_bytes(content)
    target = torch.zeros(1000, dtype=torch.uint8)
    for start in (0, 17, 9000):
        storage.read(str(tmp_path / "a"), Extent(start, start + 1000), target)
        assert bytes(target.numpy()) == content[start : start + 1000]
    (opened,) = CuFile.opened
    storage.close()
    assert opened.fd == -1


@pytest.mark.usefixtures("kvikio")
def test_readers_that_begin_together_open_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))

    def open_slowly(file: str, flags: str) -> CuFile:
        threading.Event().wait(0.05)
        return CuFile(file, flags)

    def read(start: int) -> None:
        storage.read(str(tmp_path / "a"), Extent(start, start + 10), torch.zeros(10, dtype=torch.uint8))

    storage = DirectStorage(open_slowly)
    with ThreadPoolExecutor(4) as readers:
        list(readers.map(read, range(4)))
    (opened,) = CuFile.opened
    assert opened.num_reads == 4
    storage.close()


def test_a_file_that_is_too_short(storage: DirectStorage, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(ShortReadError, match="kvikio read 50 of 100 bytes"):
        storage.read(str(tmp_path / "a"), Extent(50, 150), torch.zeros(100, dtype=torch.uint8))
    storage.close()


def test_what_kvikio_refuses(storage: DirectStorage, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"kvikio cannot read .*cannot open file; gpu_direct_storage=off takes"):
        storage.read(str(tmp_path / "none"), Extent(0, 10), torch.zeros(10, dtype=torch.uint8))


def test_without_kvikio_nothing_changes_and_one_line_says_so(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with caplog.at_level(logging.INFO, logger="ray_streamer"):
        assert open_direct_storage() is None
    assert len(caplog.records) == 1
    assert "gpu_direct_storage=on has no effect: kvikio does not import" in caplog.text
