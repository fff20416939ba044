"""A rank in a process of its own that does something to itself at one step of a session, and says how its session ended.

Arguments: session, local rank, number of ranks, what to do ("nothing", "kill", "stop", "fail", "fork", "fork raw", "hang"), and at
which step of `STEPS`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time

from ray_streamer.errors import ShortReadError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession

STEPS = ("meet", "gather", "large gather", "share", "lend", "load", "finish")
NEIGHBOUR_SECONDS = float(os.environ.get("NEIGHBOUR_SECONDS", "1.5"))
# Short where a rank hangs on purpose; on a busy machine any step may take long.
PROGRESS_SECONDS = float(os.environ.get("PROGRESS_SECONDS", "60"))


class _Listener:
    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)

    def on_announce(self, owner: int, block: int, slot: int) -> None:
        self.arrived.release()

    def on_release(self, slot: int) -> None:
        self.arrived.release()


def _say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def _act(action: str) -> None:
    _say(action)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "fail":
        raise ShortReadError("the file ends too early")
    elif action in ("fork", "fork raw"):
        # The raw one runs no hooks of Python's, so that its copies of all sockets stay open.
        child = os.fork() if action == "fork" else ctypes.PyDLL(None).syscall(57)
        if child == 0:
            os.close(1)
            signal.pause()
        _say(str(child))
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "hang":
        # Without Python's lock: the process lives and talks, but gets nowhere.
        time.sleep(3600)


def _run(session: NodeSession, action: str, at: str) -> None:
    def step(name: str) -> None:
        if name == at:
            _act(action)

    step("gather")
    session.gather(b"small")
    step("large gather")
    session.gather(bytes(100_000))
    step("share")
    session.share(lambda: bytes(100_000))
    step("lend")
    memory = os.memfd_create("ray_streamer-test", os.MFD_CLOEXEC)
    os.ftruncate(memory, 4096)
    listener = _Listener()
    session.begin_load(listener)
    session.lend(b"one slot", memory, 4096)
    others = [number for number in range(len(session.place.ranks)) if number != session.place.local_rank]
    session.announce(7, 0, others)
    for _ in others:
        while not listener.arrived.acquire(timeout=0.05):
            session.stop.check()
    step("load")
    for other in others:
        session.release(other, 0)
    step("finish")
    session.finish_load()


def _main(name: str, local_rank: str, num_ranks: str, action: str = "nothing", at: str = "") -> None:
    place = Place(
        session=name,
        rank=int(local_rank),
        ranks=tuple(range(int(num_ranks))),
        node="n",
        timeouts=Timeouts(startup_seconds=60, neighbour_seconds=NEIGHBOUR_SECONDS, progress_seconds=PROGRESS_SECONDS),
    )
    try:
        if at == "meet":
            _act(action)
        with NodeSession.meet(place) as session:
            _run(session, action, at)
        outcome = {"error": None}
    except BaseException as error:
        outcome = {"error": type(error).__name__, "rank": getattr(error, "rank", None), "text": str(error)}
    _say(json.dumps(outcome))


if __name__ == "__main__":
    _main(*sys.argv[1:])
