"""One of four ranks dies, stops or fails at each step of `load_rank`: the others name it, and nothing of the load is left."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import pytest
from api_support import forked_ranks
from api_support.processes import RankProcesses

import ray_streamer

if TYPE_CHECKING:
    from collections.abc import Iterator

REASONS = {
    "dies": "its process ended",
    "stops": "stopped by a signal",
    "fails": "ShortReadError: the file ends too early",
}

SETTINGS = ray_streamer.Settings(
    page_cache="off",
    memory_limit=64 << 10,
    block_bytes=16 << 10,
    concurrency=2,
    neighbour_timeout_seconds=2.0,
    startup_timeout_seconds=60,
)


@pytest.fixture(scope="module")
def parent() -> Iterator[RankProcesses]:
    """The process that all ranks of this module are forked from; it never loads."""
    with RankProcesses(1) as processes:
        yield processes


def _load(parent: RankProcesses, checkpoint: Any, **given: Any) -> dict[str, Any]:
    common = {"uri": checkpoint.uri, "session": secrets.token_hex(8), "settings": SETTINGS}
    parent.order(0, forked_ranks.load_on_four, **common, **given)
    return parent.answer(0)


STEPS = [
    ("opening the device", 2),
    ("reading headers", 0),
    ("planning", 3),
    ("exchanging arenas", 1),
    ("reading a block", 2),
    ("finishing", 1),
]

CASES = [
    pytest.param(step, victim, how, id=f"{how}-{step}".replace(" ", "-"))
    for step, victim in STEPS
    for how in REASONS
    # Whoever dies before it met anybody has not come: then only the launcher knows.
    if (step, how) != ("opening the device", "dies")
]


@pytest.mark.parametrize(("step", "victim", "how"), CASES)
def test_the_others_name_the_rank(parent: RankProcesses, checkpoint: Any, step: str, victim: int, how: str) -> None:
    result = _load(parent, checkpoint, step=step, victim=victim, how=how)
    for outcome in result["outcomes"].values():
        # What the first rank finds wrong with the checkpoint is everybody's own error.
        is_shared = step == "reading headers" and how == "fails"
        assert outcome["error"] == ("ShortReadError" if is_shared else "RankFailedError"), outcome
        assert is_shared or outcome["named"] == victim, outcome
        assert REASONS[how].removeprefix("ShortReadError: " if is_shared else "") in outcome["text"]
        assert outcome["left"] == []
    assert result["sockets"] == []


def test_ranks_that_all_go_on_succeed(parent: RankProcesses, checkpoint: Any) -> None:
    result = _load(parent, checkpoint, step="planning", victim=None, how="dies")
    assert [result["outcomes"][rank] for rank in range(4)] == [{"error": None, "left": []}] * 4
    assert result["sockets"] == []
