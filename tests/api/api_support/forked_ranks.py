"""Four ranks forked from one process that has imported torch; one of them ends itself at a step of its load."""

from __future__ import annotations

import json
import os
import signal
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray_streamer
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
    "exchanging arenas": (Neighbourhood, "meet"),
    "reading a block": (BlockReads, "read_into"),
    "finishing": (Neighbourhood, "finish"),
}
"""Where a rank may be made to end: the method whose call ends it."""


def load_on_four(
    uri: str, *, victim: int | None, step: str, how: str, session: str, **arguments: Any
) -> dict[str, Any]:
    """Loads on four ranks; gives how each survivor ended and what it left, and the sockets that are left at the end."""
    pipes = [os.pipe() for _ in range(4)]
    pids: list[int] = []
    for rank in range(4):
        pid = os.fork()
        if pid == 0:
            end = _ending(how) if rank == victim else None
            _run(
                lambda rank=rank: {"uri": uri, "rank": rank, "world_size": 4, "session": session} | arguments,
                step,
                end,
                pipes[rank][1],
            )
        pids.append(pid)
    for _, theirs in pipes:
        os.close(theirs)
    outcomes = {rank: _read(pipes[rank][0]) for rank in range(4) if rank != victim}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for ours, _ in pipes:
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


def _read(pipe: int) -> dict[str, Any]:
    """What a rank wrote; its pipe ends with the rank itself, since the forks before it have copies of the others' only."""
    text = b""
    while not text.endswith(b"}"):
        read = os.read(pipe, 1 << 16)
        assert read, "a rank ended without a word"
        text += read
    return json.loads(text)
