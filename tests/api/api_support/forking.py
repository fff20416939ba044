"""What a process does that has loaded, or loads, and is then forked; every function runs in a process of its own."""

from __future__ import annotations

import os
import select
import signal
from typing import TYPE_CHECKING, Any

import torch

import ray_streamer

if TYPE_CHECKING:
    from collections.abc import Callable

ALONE = {"rank": 0, "world_size": 1}
ANSWER_SECONDS = 30.0
"""Less than whoever ordered the function waits."""


def in_child(function: Callable[[], Any]) -> str:
    """What the function returns in a forked process, or the error that it raises there, as text."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            told = repr(function())
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(theirs, told.encode())
        os._exit(0)
    os.close(theirs)
    try:
        return os.read(ours, 4096).decode() if select.select([ours], [], [], ANSWER_SECONDS)[0] else "waits for ever"
    finally:
        os.close(ours)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def take_in_child(uri: str) -> tuple[str, str, int]:
    """Take from a stream that the parent has begun, and close it, in forked processes; then all the rest in the parent."""
    stream = ray_streamer.stream_rank(uri, **ALONE)
    next(stream)
    taken, closed = in_child(lambda: next(stream)), in_child(stream.close)
    return taken, closed, 1 + len(list(stream))


def take_first_in_child(uri: str) -> str:
    """Take from a stream that nobody has begun before the fork."""
    stream = ray_streamer.stream_rank(uri, **ALONE)
    return in_child(lambda: len(list(stream)))


def load_in_children(uri: str, *, num_children: int, **arguments: Any) -> list[str]:
    """Load in several forked processes after torch has computed with threads of its own; gives how each ended."""
    torch.set_num_threads(2)
    torch.ones(1 << 20).to(torch.bfloat16)

    def load() -> list[bool]:
        tensors = ray_streamer.load_rank(uri, **ALONE, **arguments)
        # Not by torch, whose threads the child does not have.
        return [bool(tensor.numpy()[1001:].any()) for tensor in tensors.values()]

    return [in_child(load) for _ in range(num_children)]
