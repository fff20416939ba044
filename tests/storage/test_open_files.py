"""A bounded number of files is open, whatever the number of files and threads; nothing is closed under a reader."""

from __future__ import annotations

import errno
import os
import random
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest

from ray_streamer.errors import StorageError
from ray_streamer.storage.open_files import OpenFiles, num_places

SECONDS = 30.0


@pytest.fixture
def open_it(tmp_path):
    """A function that makes a function that opens file `key`, which holds its own name."""

    def open_it(key):
        path = tmp_path / str(key)
        if not path.exists():
            path.write_text(str(key))
        return lambda: os.open(tmp_path / str(key), os.O_RDONLY)

    return open_it


def _open_names(tmp_path) -> list[str]:
    """Names of the files in `tmp_path` that this process has open: numbers of descriptors are used again."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(os.path.basename(link) for link in links if os.path.dirname(link) == str(tmp_path))


def test_the_file_unused_for_longest_is_closed(open_it, tmp_path):
    files = OpenFiles(2)
    for key in ("a", "b", "a", "c"):
        with files.use(key, open_it(key)):
            assert key in _open_names(tmp_path)
    assert _open_names(tmp_path) == ["a", "c"]
    with files.use("a", lambda: pytest.fail("it is open")):
        pass
    files.close()
    assert _open_names(tmp_path) == []


def test_many_threads_never_hold_more_files_than_there_are_places(open_it, tmp_path, monkeypatch):
    """Counted at each open and close: a look into /proc while other threads open files sees some of them twice."""
    files, lock, ours, counts = OpenFiles(3), threading.Lock(), set(), [0]
    for key in range(20):
        os.close(open_it(key)())

    def count(change: int) -> None:
        with lock:
            counts.append(counts[-1] + change)

    def opened(key: int) -> int:
        count(+1)
        descriptor = open_it(key)()
        ours.add(descriptor)
        return descriptor

    def closed(descriptor: int, close=os.close) -> None:
        is_ours = descriptor in ours
        ours.discard(descriptor)
        close(descriptor)
        if is_ours:
            count(-1)

    def read_some(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(50):
            key = choose.randrange(20)
            with files.use(key, partial(opened, key)) as file:
                assert os.pread(file.buffered, 10, 0).decode() == str(key)

    monkeypatch.setattr(os, "close", closed)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(read_some, range(8)):
            pass
    assert max(counts) == 3
    files.close()
    assert counts[-1] == 0
    assert _open_names(tmp_path) == []


def test_who_wants_a_place_waits_for_a_read_to_end(open_it):
    files, is_waiting, found = OpenFiles(1), threading.Event(), []

    def wait_for_place() -> None:
        is_waiting.set()
        with files.use("b", open_it("b")) as file:
            found.append(os.pread(file.buffered, 10, 0))

    waiter = threading.Thread(target=wait_for_place)
    with files.use("a", open_it("a")) as file:
        waiter.start()
        assert is_waiting.wait(SECONDS)
        with files.use("a", open_it("a")) as again:
            assert again is file
        assert not found
    waiter.join(SECONDS)
    assert found == [b"b"]
    files.close()


def test_closing_leaves_a_file_to_its_reader_and_refuses_all_others(open_it, tmp_path):
    files, outcomes = OpenFiles(1), []

    def wait_for_place() -> None:
        try:
            with files.use("b", open_it("b")):
                outcomes.append("open")
        except StorageError as error:
            outcomes.append(str(error))

    waiter = threading.Thread(target=wait_for_place)
    with files.use("a", open_it("a")) as file:
        waiter.start()
        files.close()
        files.close()
        waiter.join(SECONDS)
        assert os.pread(file.buffered, 1, 0) == b"a"
    assert _open_names(tmp_path) == []
    assert outcomes == ["b is read after its storage was closed"]


def test_a_file_that_cannot_be_opened_takes_no_place(open_it, tmp_path):
    files = OpenFiles(1)
    for number in (errno.ENOENT, errno.EMFILE):

        def refuse(number=number):
            raise OSError(number, os.strerror(number))

        with pytest.raises(OSError, match=os.strerror(number)), files.use("a", refuse):
            pass
    with files.use("a", open_it("a")) as file:
        assert os.pread(file.buffered, 1, 0) == b"a"
    files.discard("a")
    assert _open_names(tmp_path) == []
    files.discard("a")


def test_idle_files_make_room_for_a_process_without_descriptors(open_it, tmp_path):
    files, attempts = OpenFiles(10), []
    with files.use("idle", open_it("idle")):
        pass

    def open_second_time():
        attempts.append(_open_names(tmp_path))
        if len(attempts) == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return open_it("b")()

    with files.use("b", open_second_time):
        assert attempts == [["idle"], []]
    files.close()


@pytest.mark.parametrize(
    ("soft", "concurrency", "places"),
    [(1024, 16, 16), (256, 16, 16), (64, 16, 4), (8, 16, 1), (1024, 1024, 64), (resource.RLIM_INFINITY, 100, 100)],
)
def test_places_are_a_part_of_what_the_process_may_open(monkeypatch, soft, concurrency, places):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert num_places(concurrency) == places
