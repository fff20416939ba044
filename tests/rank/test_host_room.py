"""Room for tensors and staging: what ranks of a node need, against the limits that they are within."""

from __future__ import annotations

import mmap
import secrets
import threading

import pytest
import torch

from ray_streamer.device.first_touch import touched_bytes
from ray_streamer.errors import BudgetError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.machine import MACHINE, MemoryRoom
from ray_streamer.rank.host_room import (
    HostNeed,
    bytes_to_stage_in,
    missing_bytes,
    refuse_too_much,
    staging_limit,
)
from ray_streamer.slices.result import ResultSpec, ResultSpecs

GIB = 1 << 30
PAGE = mmap.PAGESIZE
TIMEOUTS = Timeouts(startup_seconds=120.0, neighbour_seconds=120.0, progress_seconds=120.0)


def room(identity: str, free: int, most: int | None = None) -> MemoryRoom:
    return MemoryRoom(
        identity=identity, name=f"the 9 GiB of {identity}", free_bytes=free, most_bytes=free if most is None else most
    )


def need(rank: int, tensors: int, *rooms: MemoryRoom, others: int = 0) -> HostNeed:
    return HostNeed(rank=rank, tensor_bytes=tensors, other_bytes=others, rooms=rooms)


def test_a_need_travels() -> None:
    mine = HostNeed.of(3, tensor_bytes=512, block_bytes=64, imports_torch=False)
    assert mine.rooms[0].identity == MACHINE
    assert HostNeed.from_bytes(mine.to_bytes()) == mine
    importing = HostNeed.of(3, tensor_bytes=512, block_bytes=64, imports_torch=True)
    assert importing.other_bytes > mine.other_bytes > 64


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        pytest.param(
            [need(0, 3 * GIB, room("group a", 2 * GIB))],
            "node n has no room .* rank 0 would take 3 GiB for tensors .* 2 GiB of the 9 GiB of group a are left; raise that limit",
            id="one-rank",
        ),
        pytest.param(
            [need(0, 2 * GIB, room("group a", 3 * GIB)), need(1, 2 * GIB, room("group a", 3 * GIB))],
            "2 ranks together would take 4 GiB",
            id="ranks-of-one-group",
        ),
        pytest.param(
            [
                need(0, 2 * GIB, room("group a", 3 * GIB), room("around", 3 * GIB)),
                need(1, 2 * GIB, room("group b", 3 * GIB), room("around", 3 * GIB)),
            ],
            "2 ranks together .* 3 GiB of the 9 GiB of around",
            id="a-group-around-theirs",
        ),
        pytest.param(
            [need(0, GIB, room("group a", GIB), others=1)], "rank 0 would take 1 GiB for tensors and 1 B", id="staging"
        ),
        pytest.param(
            [need(0, 3 * GIB, room(MACHINE, 2 * GIB))], "are left; load into GPUs or on more nodes", id="machine"
        ),
    ],
)
def test_what_the_kernel_would_end_is_refused(needs: list[HostNeed], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        refuse_too_much(needs, node="n")


@pytest.mark.parametrize(
    "needs",
    [
        pytest.param([need(0, GIB, room("group a", GIB))], id="just-enough"),
        pytest.param([need(0, 2 * GIB, room("group a", GIB, most=3 * GIB))], id="with-swap"),
        pytest.param([need(0, GIB, room("a", GIB)), need(1, GIB, room("b", GIB))], id="a-group-each"),
        pytest.param([need(0, 0, room("group a", 0), others=GIB)], id="no-tensors-in-host-memory"),
    ],
)
def test_what_fits_is_not_refused(needs: list[HostNeed]) -> None:
    refuse_too_much(needs, node="n")


def test_ranks_share_what_is_left_to_stage_in() -> None:
    name, left, threads = secrets.token_hex(8), [0, 0], []
    # Rank 0 has a limit of its own, which is tighter than that of both.
    needs = [
        need(0, 100, room("around", 990), room("own", 150), others=10),
        need(1, 200, room("around", 1000), others=10),
    ]

    def say(rank: int) -> None:
        place = Place(session=name, rank=rank, ranks=(0, 1), node="n", timeouts=TIMEOUTS)
        with NodeSession.meet(place) as session:
            left[rank] = bytes_to_stage_in(session, lambda: needs[rank], block_bytes=8)

    threads = [threading.Thread(target=say, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left == [8 + 40, 8 + (1000 - 100 - 200 - 20) // 2]


@pytest.mark.parametrize(
    ("memory_limit", "room_bytes", "staging"),
    [(100, 1000, 100), (100, 60, 60), (0, 60, 0), (-1, 1000, -1), (-1, 500, -1), (-1, 400, 400)],
)
def test_staging_is_at_most_what_there_is_room_for(
    memory_limit: int, room_bytes: int, staging: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert staging_limit(memory_limit, room_bytes, useful_bytes=500) == staging
    assert ("memory is short" in caplog.text) == (staging == room_bytes)


def test_results_need_the_memory_that_nobody_has_touched() -> None:
    results = ResultSpecs.of(
        [
            ResultSpec(name="a", dtype="F32", shape=(4 * PAGE,)),
            ResultSpec(name="b", dtype="F4", shape=(2, PAGE)),
            ResultSpec(name="c", dtype="F32", shape=(4 * PAGE,), strides=(2,)),
        ]
    )
    assert missing_bytes(results, {}) == 16 * PAGE + PAGE + 16 * PAGE
    touched, fresh = torch.ones(4 * PAGE), torch.frombuffer(mmap.mmap(-1, 16 * PAGE), dtype=torch.float32)
    fresh[0] = 1
    assert missing_bytes(results, {"a": touched, "tied": touched}) == 17 * PAGE
    assert missing_bytes(results, {"a": fresh}) == 32 * PAGE
    assert missing_bytes(results, {"c": torch.ones(8 * PAGE)[::2]}) == 17 * PAGE
    assert missing_bytes(results, {"a": touched, "more": torch.ones(64 * PAGE)}) == 0
    without_memory = {"a": torch.empty(4, device="meta"), "b": None, "c": torch.ones(4, 4).to_sparse()}
    assert missing_bytes(results, without_memory) == 33 * PAGE


def test_touched_memory_is_counted_by_pages() -> None:
    with mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = torch.frombuffer(memory, dtype=torch.uint8)
        address = view.data_ptr()
        assert touched_bytes(address, 8 * PAGE) == 0
        view[3 * PAGE] = 1
        assert touched_bytes(address, 8 * PAGE) == PAGE
        assert touched_bytes(address + 3 * PAGE + 10, 20) == 20
        assert touched_bytes(address, 0) == 0
        del view
