"""Staging memory is what the user allowed, seen from outside of the ranks, whatever the size of the checkpoint.

While ranks load, what the kernel counts for their processes is sampled: anonymous memory, and shared memory that they map,
whether it was touched or not. What comes on top of the tensors is staging and overhead.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pytest
from api_support import rank_tasks

import ray_streamer
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import llama_layout
from ray_streamer.testing.peak_memory import PeakMemory, mapped_bytes

if TYPE_CHECKING:
    from api_support.processes import RankProcesses

MIB = 1 << 20
SLACK_BYTES = 4 * MIB
"""What a rank may need beside staging: threads, plan, buffers of the interpreter. It does not depend on the checkpoint."""

MOST_TRIES = 5
"""On a busy machine a short load passes between two looks, and one reader may do the work of all."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two of one shape, of 61 and 196 MiB."""
    uris = {}
    for name, layers in (("small", 2), ("large", 8)):
        layout = llama_layout(hidden=1024, layers=layers, heads=16, kv_heads=8, intermediate=2816, vocab=4001)
        folder = write_checkpoint(tmp_path_factory.mktemp(name), layout.tensors, num_files=2, config=layout.config)
        uris[name] = str(folder)
    return uris


@pytest.fixture(scope="module")
def warm_pair(pair: RankProcesses, checkpoints: dict[str, str]) -> RankProcesses:
    """Has loaded before: what a first load imports and keeps is nobody's staging."""
    places = [{"uri": checkpoints["small"], "rank": rank, "world_size": 2} for rank in range(2)]
    session = {"settings": ray_streamer.Settings(page_cache="off"), "session": secrets.token_hex(8)}
    pair.run(rank_tasks.hold_own_tensors, places)
    pair.run(rank_tasks.load_into_held, [place | session for place in places])
    return pair


def measure(
    pair: RankProcesses, uri: str, settings: ray_streamer.Settings, *, own_memory: bool
) -> tuple[int, list[Any]]:
    """Bytes that both ranks together needed on top of their tensors, and each rank's statistics."""
    places = [{"uri": uri, "rank": rank, "world_size": 2} for rank in range(2)]
    session = {"settings": settings, "session": secrets.token_hex(8)}
    pair.run(rank_tasks.free, [{}, {}])
    if own_memory:
        pair.run(rank_tasks.hold_own_tensors, places)
    with PeakMemory(pair.pids, shared_bytes=mapped_bytes, sample_seconds=0.002) as memory:
        statistics = pair.run(rank_tasks.load_into_held, [place | session for place in places])
    tensor_bytes = 0 if own_memory else sum(rank.bytes_delivered for rank in statistics)
    assert memory.now() - memory.baseline_bytes <= tensor_bytes + 2 * SLACK_BYTES
    pair.run(rank_tasks.free, [{}, {}])
    return memory.added_bytes - tensor_bytes, statistics


@pytest.mark.parametrize("own_memory", [pytest.param(True, id="own-memory"), pytest.param(False, id="fresh-tensors")])
@pytest.mark.parametrize("limit_bytes", [4 * MIB, 32 * MIB])
@pytest.mark.parametrize("direct_io", ["off", "on"])
def test_staging_is_what_was_allowed_whatever_the_checkpoint(
    warm_pair: RankProcesses, checkpoints: dict[str, str], limit_bytes: int, direct_io: Any, own_memory: bool
) -> None:
    settings = ray_streamer.Settings(page_cache="off", direct_io=direct_io, memory_limit=limit_bytes, concurrency=8)
    for uri in checkpoints.values():
        is_full = False
        for _ in range(MOST_TRIES):
            extra_bytes, statistics = measure(warm_pair, uri, settings, own_memory=own_memory)
            assert {rank.memory_limit for rank in statistics} == {limit_bytes}
            most_staged = [rank.peak_staging_bytes for rank in statistics]
            assert max(most_staged) <= limit_bytes
            # Both arenas, each once, and an overhead that is the same for both checkpoints.
            assert extra_bytes <= 2 * (limit_bytes + SLACK_BYTES)
            # What was measured does contain the arenas; fresh tensors fill up while the arenas go.
            is_full = min(most_staged) >= limit_bytes // 2 and (extra_bytes >= 2 * limit_bytes or not own_memory)
            # Most blocks come to their tensors through buffers that are less than the limit.
            is_full |= min(rank.storage.scratch_bytes for rank in statistics) > 0
            if is_full:
                break
        assert is_full, "staging was never seen in use"
