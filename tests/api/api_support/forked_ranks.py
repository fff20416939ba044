"""Four ranks forked from one process that has imported torch; one of them ends itself at a step of its load.

The process must have loaded nothing itself: a fork copies locks, but not the threads (gloo's, torch's, Arrow's) that would open them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray_streamer
from api_support.processes import show_stacks
from api_support.rank_tasks import possessions
from ray_streamer.errors import ShortReadError
from ray_streamer.rank.block_reads import BlockReads
from ray_streamer.rank.neighbourhood import Neighbourhood
from ray_streamer.rank.request import LoadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS: dict[str, tuple[type, str]] = {
    "opening the device": (LoadRequest, "open_device"),
    "reading headers": (LoadRequest, "read_index"),
    "planning": (LoadRequest, "read_limits"),
    "exchanging arenas": (Neighbourhood, "exchange_arenas"),
    "reading a block": (BlockReads, "read_into"),
    "finishing": (Neighbourhood, "finish"),
}
"""Where a rank may be made to end: the method whose call ends it."""

ANSWER_SECONDS = 50.0
"""Less than whoever ordered the load waits, so that the rank is named."""


def load_on_four(
    uri: str, *, victim: int | None, step: str, how: str, session: str, **arguments: Any
) -> dict[str, Any]:
    """Loads on four ranks; gives how each survivor ended and what it left, and the sockets that are left at the end."""
    pipes: list[int] = []
    pids: list[int] = []
    for rank in range(4):
        # Made and closed around each fork, so that no later rank holds this one's end open.
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            end = _ending(how) if rank == victim else None
            _run(
                lambda rank=rank: {"uri": uri, "rank": rank, "world_size": 4, "session": session} | arguments,
                step,
                end,
                theirs,
            )
        os.close(theirs)
        pipes.append(ours)
        pids.append(pid)
    try:
        outcomes = {rank: _read(pipes[rank], rank, pids[rank]) for rank in range(4) if rank != victim}
    finally:
        for pid, ours in zip(pids, pipes, strict=True):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(ours)
    sockets = [line for line in Path("/proc/net/unix").read_text().splitlines() if session in line]
    return {"outcomes": outcomes, "sockets": sockets}


def _ending(how: str) -> Callable[..., Any]:
    def end(*_: object, **__: object) -> None:
        if how == "fails":
            raise ShortReadError("the file ends too early")
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)

    return end


def _run(make: Callable[[], dict[str, Any]], step: str, end: Callable[..., Any] | None, answers: int) -> None:
    """One rank, from its birth to its end."""
    try:
        if end is not None:
            setattr(*STEPS[step], end)
        before = possessions()
        try:
            ray_streamer.load_rank(**make())
            outcome: dict[str, Any] = {"error": None}
        except ray_streamer.errors.RayStreamerError as error:
            named = getattr(error, "rank", None)
            outcome = {"error": type(error).__name__, "named": named, "text": str(error)}
        left = [name for name in possessions() if name not in before]
        os.write(answers, json.dumps(outcome | {"left": left}).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _read(pipe: int, rank: int, pid: int) -> dict[str, Any]:
    """What a rank wrote before its pipe ended with it."""
    text = b""
    while not text.endswith(b"}"):
        if not select.select([pipe], [], [], ANSWER_SECONDS)[0]:
            show_stacks(pid)
            raise AssertionError(f"rank {rank} neither loads nor fails")
        read = os.read(pipe, 1 << 16)
        assert read, f"rank {rank} ended without a word"
        text += read
    return json.loads(text)
