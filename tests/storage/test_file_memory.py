"""Files as memory: no descriptor is held, views keep the pages, and what the system refuses is an OSError."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ray_streamer.storage.file_memory import map_file


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mapped"
    path.write_bytes(bytes(range(256)) * 100)
    return path


def _map(path, num_bytes):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return map_file(descriptor, num_bytes)
    finally:
        os.close(descriptor)


def test_memory_shows_the_file_and_cannot_be_written(file):
    view = _map(file, 25600)
    assert (view.readonly, view.format, view.nbytes) == (True, "B", 25600)
    assert view == file.read_bytes()
    with pytest.raises(TypeError):
        view[0] = 1
    array = np.frombuffer(view, np.uint8)
    assert not array.flags.writeable
    assert array[257] == 1


def _descriptors():
    """Number and target of each descriptor of this process, but the one for looking."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def test_no_descriptor_is_held(file):
    before = _descriptors()
    views = [_map(file, 25600) for _ in range(50)]
    # Some that earlier tests left to the collector may be gone.
    assert _descriptors() <= before
    assert all(view[1] == 1 for view in views)


def test_pages_stay_as_long_as_a_part_is_looked_at(file):
    view = _map(file, 25600)
    part = np.frombuffer(view, np.uint8)[300:310]
    del view
    gc.collect()
    assert _is_mapped(file)
    assert part.tolist() == list(range(44, 54))
    del part
    gc.collect()
    assert not _is_mapped(file)


def test_an_empty_file_is_empty_memory(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert _map(tmp_path / "empty", 0) == b""


def test_what_the_system_refuses_is_an_os_error(file):
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        map_file(-1, 10)
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError, match="Cannot allocate memory"):
        _map(file, 1 << 62)


def test_a_process_that_ends_with_views_ends_well(file):
    code = (
        "import os, sys, threading; from ray_streamer.storage.file_memory import map_file\n"
        f"view = map_file(os.open({str(file)!r}, os.O_RDONLY), 25600)\n"
        "sys.looked = view[10:20]\n"
        "threading.Thread(target=lambda: [sum(view) for _ in range(10**9)], daemon=True).start()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
