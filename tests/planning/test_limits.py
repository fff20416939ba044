"""From the user's memory limit to the size of a block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.errors import BudgetError, PlanError
from ray_streamer.planning.limits import ReadLimits, fit_block_bytes, rank_memory_limit

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("memory_limit", "node_memory_limit", "available_bytes", "num_local_ranks", "expected"),
    [
        pytest.param(None, None, 64 * GIB, 8, 1 * GIB, id="default-is-a-gib-where-memory-is-plenty"),
        pytest.param(None, None, 16 * GIB, 8, 512 * MIB, id="default-is-a-quarter-of-what-is-free-over-the-ranks"),
        pytest.param(None, None, 1 * MIB, 8, 256 * KIB, id="default-is-never-below-one-block"),
        pytest.param(300 * MIB, None, 1 * MIB, 8, 300 * MIB, id="a-given-limit-is-taken-as-it-is"),
        pytest.param(0, None, 64 * GIB, 8, 0, id="least"),
        pytest.param(-1, None, 64 * GIB, 8, -1, id="as-much-as-useful"),
        pytest.param(None, 2 * GIB, 64 * GIB, 8, 256 * MIB, id="the-node-bounds-the-default"),
        pytest.param(1 * GIB, 2 * GIB, 64 * GIB, 8, 256 * MIB, id="the-node-bounds-a-given-limit"),
        pytest.param(100 * MIB, 2 * GIB, 64 * GIB, 8, 100 * MIB, id="a-smaller-given-limit-stays"),
        pytest.param(-1, 2 * GIB, 64 * GIB, 8, 256 * MIB, id="the-node-bounds-as-much-as-useful"),
        pytest.param(0, 2 * GIB, 64 * GIB, 8, 0, id="least-fits-the-node"),
        pytest.param(0, 800 * KIB, 64 * GIB, 8, 100 * KIB, id="least-does-not-pass-the-node"),
    ],
)
def test_rank_memory_limit(memory_limit, node_memory_limit, available_bytes, num_local_ranks, expected):
    limit = rank_memory_limit(
        memory_limit=memory_limit,
        node_memory_limit=node_memory_limit,
        available_bytes=available_bytes,
        num_local_ranks=num_local_ranks,
    )
    assert limit == expected


@pytest.mark.parametrize("memory_limit", [None, 0, -1, GIB])
def test_node_limit_that_leaves_nothing_is_refused(memory_limit):
    with pytest.raises(BudgetError, match=r"for each of 8 ranks; the smallest that can work is 32 KiB"):
        rank_memory_limit(
            memory_limit=memory_limit, node_memory_limit=8 * 4096 - 1, available_bytes=GIB, num_local_ranks=8
        )


@pytest.mark.parametrize(
    ("memory_limit", "block_bytes", "concurrency", "expected"),
    [
        pytest.param(128 * MIB, 8 * MIB, 16, 8 * MIB, id="every-read-has-a-slot"),
        pytest.param(128 * MIB - 1, 8 * MIB, 16, 4 * MIB, id="halved-when-one-byte-is-missing"),
        pytest.param(20 * MIB, 8 * MIB, 16, 1 * MIB, id="halved-until-every-read-has-a-slot"),
        pytest.param(1 * MIB, 8 * MIB, 16, 256 * KIB, id="never-below-the-floor"),
        pytest.param(256 * KIB, 8 * MIB, 16, 256 * KIB, id="one-slot-of-the-floor-is-enough"),
        pytest.param(0, 8 * MIB, 16, 256 * KIB, id="least-is-the-floor"),
        pytest.param(0, 64 * KIB, 16, 64 * KIB, id="small-blocks-are-their-own-floor"),
        pytest.param(64 * KIB, 64 * KIB, 16, 64 * KIB, id="small-blocks-need-no-more-than-one"),
        pytest.param(-1, 8 * MIB, 16, 8 * MIB, id="no-limit-leaves-blocks-as-they-are"),
        pytest.param(5 * MIB, 3 * MIB + 4096, 2, 1 * MIB + 512 * KIB, id="odd-sizes-stay-multiples-of-a-page"),
    ],
)
def test_fit_block_bytes(memory_limit, block_bytes, concurrency, expected):
    fitted = fit_block_bytes(memory_limit=memory_limit, block_bytes=block_bytes, concurrency=concurrency)
    assert fitted == expected


@given(memory_limit=st.integers(0, GIB), pages=st.integers(1, 1 << 14), concurrency=st.integers(1, 64))
def test_fitted_blocks_are_legal_and_fit(memory_limit, pages, concurrency):
    block_bytes = pages * 4096
    floor = min(256 * KIB, block_bytes)
    if 0 < memory_limit < floor:
        with pytest.raises(BudgetError):
            fit_block_bytes(memory_limit=memory_limit, block_bytes=block_bytes, concurrency=concurrency)
        return
    fitted = fit_block_bytes(memory_limit=memory_limit, block_bytes=block_bytes, concurrency=concurrency)
    ReadLimits(block_bytes=fitted, min_run_bytes=0, max_gap_bytes=0)
    assert floor <= fitted <= block_bytes
    assert fitted <= max(memory_limit, floor)
    assert fitted == floor or fitted * concurrency <= memory_limit


def test_limit_below_one_block_names_the_smallest():
    with pytest.raises(
        BudgetError,
        match=r"memory_limit of 256 KiB \(262143 bytes\) per rank.*the smallest that works is 256 KiB per rank",
    ):
        fit_block_bytes(memory_limit=256 * KIB - 1, block_bytes=8 * MIB, concurrency=16)


@pytest.mark.parametrize(
    ("block_bytes", "min_run_bytes", "max_gap_bytes", "message"),
    [
        pytest.param(0, 0, 0, "block_bytes", id="no-block"),
        pytest.param(5000, 0, 0, "multiple of 4 KiB", id="block-off-the-page"),
        pytest.param(2 * GIB, 0, 0, "up to 1 GiB, got 2 GiB", id="block-too-large"),
        pytest.param(4096, -1, 0, "negative", id="negative-run"),
        pytest.param(4096, 0, -1, "negative", id="negative-gap"),
    ],
)
def test_read_limits_refuse(block_bytes, min_run_bytes, max_gap_bytes, message):
    with pytest.raises(PlanError, match=message):
        ReadLimits(block_bytes=block_bytes, min_run_bytes=min_run_bytes, max_gap_bytes=max_gap_bytes)
