"""Tensors that ranks of a node read together: each byte once, within a bound, whatever each of them asks for and when."""

from __future__ import annotations

import gc
import mmap
import os
import random
import secrets
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.errors import ObjectChangedError, RankFailedError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.shared_cells import CellLayout, SharedCells
from ray_streamer.rank.shared_tensors import SharedTensors
from ray_streamer.settings import Settings
from ray_streamer.staging.stop import StopSignal
from ray_streamer.storage import open_storage

HANG_SECONDS = 60.0
PAGE = mmap.PAGESIZE


class Counted:
    """A storage, and how often each page of each file was read through any of its copies."""

    def __init__(self, inner, pages, before):
        self._inner, self._pages, self._before = inner, pages, before

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def read_into(self, path, extent, buffer, *, etag):
        # The frames of an error hold it, as those of a store's client do.
        part = buffer[:]
        self._before(path)
        self._inner.read_into(path, extent, part, etag=etag)
        self._pages.update((path, page) for page in range(extent.start // PAGE, -(-extent.stop // PAGE)))


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    bits = torch.randint(0, 255, (64, 50), dtype=torch.uint8)
    return {
        "a-large": torch.randn(300, 401).to(torch.bfloat16),
        "b-scalar": torch.tensor(3.5),
        "c-empty": torch.zeros(0, 4),
        "d-larger": torch.randn(257, 1000),
        "e-f8": bits.view(torch.float8_e4m3fn),
        "f-i64": torch.arange(20),
        "g-another": torch.randn(100, 333).to(torch.bfloat16),
    }


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    """Two files, so that tensors begin at any byte of a page."""
    folder = tmp_path_factory.mktemp("shared")
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:4]}, folder / "1.safetensors", {"some": "words"})
    save_file({name: tensors[name] for name in names[4:]}, folder / "2.safetensors")
    return folder


class Node:
    """Ranks as threads of this process.

    Attributes:
        pages: How often each page of each file was read.
    """

    def __init__(self, folder):
        self._folder = folder
        self.pages = Counter()

    def run(
        self,
        work,
        num_ranks,
        *,
        memory_limit=1 << 20,
        block_bytes=PAGE,
        before=lambda path, number: None,
        progress_seconds=60,
    ):
        """What `work(shared, local rank)` returned on each rank, or the error that ended it; `before` each read of a rank."""
        session, outcomes = secrets.token_hex(8), [None] * num_ranks
        timeouts = Timeouts(startup_seconds=60, neighbour_seconds=60, progress_seconds=progress_seconds)

        def run(number):
            place = Place(session=session, rank=number, ranks=tuple(range(num_ranks)), node="n", timeouts=timeouts)
            storage = open_storage(str(self._folder), Settings(page_cache="off"))
            index = open_checkpoint(str(self._folder), storage, concurrency=2)
            counted = Counted(storage, self.pages, lambda path: before(path, number))
            limits = {"memory_limit": memory_limit, "block_bytes": block_bytes, "concurrency": 3}
            try:
                with (
                    NodeSession.meet(place) as met,
                    SharedTensors.open(met, index, counted, **limits) as shared,
                ):
                    outcomes[number] = work(shared, number)
            except BaseException as error:
                # Its traceback would keep what the rank had.
                outcomes[number] = error.with_traceback(None)
            finally:
                storage.close()

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_SECONDS)
            assert not thread.is_alive(), "a rank waits for ever"
        return outcomes


@pytest.fixture
def node(folder, ranks):
    with ranks.nothing_left():
        yield Node(folder)
    assert "ray_streamer-shared" not in Path("/proc/self/maps").read_text(), "memory is left mapped"


def assert_equal(found, tensors):
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), tensors[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("block_bytes", [PAGE, 1 << 20])
def test_ranks_that_come_together_read_every_page_once(node, tensors, num_ranks, block_bytes):
    reading, everybody_reads = set(), threading.Event()

    def before(path, number):
        reading.add(number)
        # In blocks of a page there is work for all of them.
        if len(reading) == num_ranks or block_bytes > PAGE:
            everybody_reads.set()
        assert everybody_reads.wait(HANG_SECONDS)

    def work(shared, _):
        found = shared.read(list(tensors))
        assert_equal(found, tensors)
        return shared.bytes_read

    read = node.run(work, num_ranks, block_bytes=block_bytes, before=before)
    assert max(node.pages.values()) == 1
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total <= sum(read) <= total + 8 * PAGE
    if num_ranks > 1 and block_bytes == PAGE:
        assert all(read), "a rank read nothing"


def test_a_rank_that_comes_later_finds_what_others_read(node, tensors):
    gone = threading.Barrier(2, timeout=HANG_SECONDS)

    def work(shared, number):
        if number:
            gone.wait()
        found = shared.read(["d-larger", "f-i64"])
        assert_equal(found, tensors)
        # Let go by the first rank before the second one asks.
        del found
        if not number:
            gone.wait()
        return shared.bytes_read

    first, second = node.run(work, 2)
    assert first
    assert not second


def test_what_a_rank_writes_to_its_tensor_no_other_sees(node, tensors):
    written = threading.Barrier(2, timeout=HANG_SECONDS)

    def work(shared, number):
        found = shared.read(["a-large", "f-i64"])
        if number:
            for tensor in found.values():
                tensor.zero_()
        written.wait()
        if not number:
            assert_equal(found, tensors)
            assert_equal(shared.read(["a-large", "f-i64"]), tensors)
        return found

    # They outlive the session.
    first, second = node.run(work, 2)
    assert "ray_streamer-shared" in Path("/proc/self/maps").read_text()
    assert_equal(first, tensors)
    assert not any(tensor.any() for tensor in second.values())


def resident_bytes(shared):
    return os.fstat(shared._cells.fd).st_blocks * 512  # nothing else counts a file's pages


def test_memory_is_bounded_and_what_went_is_read_again(node, tensors):
    limit = 200 << 10

    def work(shared, _):
        peak = 0
        for name in ("a-large", "g-another") * 3:
            found = shared.read([name])
            assert_equal(found, tensors)
            del found
            peak = max(peak, resident_bytes(shared))
        return peak

    [peak] = node.run(work, 1, memory_limit=limit)
    # The largest tensor is above the limit alone.
    assert peak <= tensors["a-large"].nbytes + limit
    assert max(node.pages.values()) == 3


def test_what_somebody_holds_stays(node, tensors):
    def work(shared, _):
        held = shared.read(["a-large"])
        for name in ("d-larger", "g-another") * 2:
            assert_equal(shared.read([name]), tensors)
        return held

    [held] = node.run(work, 1, memory_limit=16 << 10)
    assert_equal(held, tensors)
    assert {count for (path, _), count in node.pages.items() if path == "2.safetensors"} == {2}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_stream_gives_each_rank_what_it_wants_and_reads_every_page_once(node, folder, tensors, num_ranks):
    limit = 64 << 10
    peaks = [0] * num_ranks
    with closing(open_storage(str(folder), Settings())) as storage:
        names = open_checkpoint(str(folder), storage).names

    def work(shared, number):
        wanted = [name for at, name in enumerate(names) if at % 3 != number or num_ranks == 1]
        streamed = {}
        for name, tensor in shared.stream(wanted):
            assert_equal({name: tensor}, tensors)
            streamed[name] = None
            peaks[number] = max(peaks[number], resident_bytes(shared))
        return list(streamed), wanted

    for streamed, wanted in node.run(work, num_ranks, memory_limit=limit):
        assert streamed == wanted
    # Neighbours in a file share a page, and may lie in two windows.
    assert max(node.pages.values()) <= 2
    assert sum(node.pages.values()) <= len(node.pages) + len(tensors)
    largest = sorted(tensor.nbytes for tensor in tensors.values())[-3:]
    assert max(peaks) <= sum(largest) + limit * num_ranks + 8 * PAGE


@pytest.mark.parametrize("seed", range(4))
def test_whatever_ranks_ask_for_is_right(node, tensors, seed):
    def work(shared, number):
        chance = random.Random(seed * 10 + number)
        held = []
        for _ in range(25):
            found = shared.read(chance.sample(list(tensors), chance.randint(1, 3)))
            assert_equal(found, tensors)
            held.append(found)
            if len(held) > chance.randint(0, 3):
                held.pop(chance.randrange(len(held)))
        for found in held:
            assert_equal(found, tensors)

    assert node.run(work, 3, memory_limit=(10 << 10) * (seed + 1)) == [None] * 3


def test_a_read_that_fails_ends_all_ranks(node, tensors):
    def before(path, number):
        if path == "2.safetensors":
            raise ObjectChangedError("replaced")

    def work(shared, number):
        shared.read(["a-large"])
        if number:
            return shared.read(["g-another"])
        return list(shared.stream(tensors))

    outcomes = node.run(work, 2, before=before)
    assert isinstance(outcomes[1], ObjectChangedError)
    assert isinstance(outcomes[0], RankFailedError | ObjectChangedError)


def test_a_read_that_hangs_ends_the_ranks_that_wait_for_it_and_names_its_rank(node):
    """Rank 2 makes no step either, as in a collective of its engine, but nobody waits for it."""
    is_reading, is_over = threading.Event(), threading.Event()

    def before(path, number):
        if number == 1:
            is_reading.set()
            is_over.wait(HANG_SECONDS)

    def work(shared, number):
        if number == 2:
            is_over.wait(HANG_SECONDS)
            return None
        if number == 0:
            is_reading.wait(HANG_SECONDS)
        try:
            return shared.read(["b-scalar"])
        finally:
            is_over.set()

    first, _, _ = node.run(work, 3, before=before, progress_seconds=2)
    assert isinstance(first, RankFailedError)
    assert first.rank == 1
    assert "has made no progress" in str(first)


def test_a_rank_that_leaves_the_stream_ends_it_for_all(node, tensors):
    def work(shared, number):
        for name, _ in shared.stream(tensors):
            if number and name.startswith("b"):
                raise KeyError("the loader failed")

    first, second = node.run(work, 2, memory_limit=16 << 10)
    assert isinstance(second, KeyError)
    assert isinstance(first, RankFailedError)
    assert first.rank == 1
    assert "the loader failed" in str(first)
    # The frames of both errors hold tensors, and may be part of a cycle.
    del first, second
    gc.collect()


def test_a_cell_that_very_many_tensors_use_is_not_given_back():
    """As the scales of all experts in one cell, each of which every rank of a node holds."""
    layout = CellLayout(cell_bytes=PAGE, num_cells=2, image_start=PAGE, first_cells=(0,))
    rank = {"local_rank": 0, "expect": lambda _: None, "stop": StopSignal()}
    with SharedCells(SharedCells.make_memory(layout), layout, budget_bytes=PAGE, **rank) as cells:
        cells.hold([range(1)] * (1 << 16))
        cells.set_read(range(1))
        cells.hold([range(1, 2)])
        assert cells.missing(range(1), 1) == []
        cells.let_go([range(1)] * (1 << 16))
        cells.hold([range(1, 2)])
        assert cells.missing(range(1), 1) == [range(1)]
