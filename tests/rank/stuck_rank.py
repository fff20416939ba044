"""A rank in a process of its own that stops in the middle of its load, says so, and waits to be killed.

Arguments: file of the pickled plan, rank, session, and where it stops: "read" or "deliver".
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from ray_streamer.device.cpu import CpuDevice
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.rank.load import RankLoad
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage

NUM_BLOCKS_BEFORE = 2


class _Stop:
    """Lets a few calls pass, then stops for good."""

    def __init__(self) -> None:
        self._num_calls = 0

    def __call__(self) -> None:
        self._num_calls += 1
        if self._num_calls > NUM_BLOCKS_BEFORE:
            sys.stdout.write("stuck\n")
            sys.stdout.flush()
            sys.stdin.read()


class _Device(CpuDevice):
    def __init__(self, stop) -> None:
        self._stop = stop

    def deliver(self, source, copies, done) -> None:
        self._stop()
        super().deliver(source, copies, done)


class _Storage:
    def __init__(self, inner, stop) -> None:
        self._inner, self._stop = inner, stop

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def read_into(self, *arguments, **keywords) -> None:
        self._stop()
        self._inner.read_into(*arguments, **keywords)


def _main(plan_file: str, rank: str, session: str, where: str) -> None:
    plan = pickle.loads(Path(plan_file).read_bytes())
    storage = open_storage(plan.index.uri, Settings(page_cache="off"))
    device = CpuDevice()
    if where == "read":
        storage = _Storage(storage, _Stop())
    else:
        device = _Device(_Stop())
    mine = plan.rank_plan(int(rank))
    place = Place(session=session, rank=mine.rank, ranks=mine.ranks, node="node-0", timeouts=Timeouts.of(Settings()))
    with NodeSession.meet(place) as met:
        RankLoad(mine, storage, device, met, concurrency=1, memory_limit=2 * 4096).run()


if __name__ == "__main__":
    _main(*sys.argv[1:])
