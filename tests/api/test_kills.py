"""Ranks killed at whatever moment of a load: the caller reads which one, and nothing stays behind."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

import ray_streamer
from ray_streamer.errors import ClusterError, RankFailedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer import RankContext

pytestmark = pytest.mark.usefixtures("local_ray")

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def wait_for_the_end(context: RankContext) -> None:
    threading.Event().wait(60)


class Killer(threading.Thread):
    """Kills the actor of one rank of the next load, some time after its process is there.

    Args:
        victim: Its rank.
        after_seconds: How long after.
    """

    def __init__(self, victim: int, after_seconds: float) -> None:
        super().__init__()
        self._known = {actor["ActorID"] for actor in ray._private.state.actors().values()}
        self._victim = victim
        self._after_seconds = after_seconds
        self.given_up = threading.Event()
        self.pids: list[int] = []

    def new_actors(self) -> list[dict[str, Any]]:
        return [a for a in ray._private.state.actors().values() if a["ActorID"] not in self._known]

    def run(self) -> None:
        while not self.given_up.wait(0.01):
            pids = [a["Pid"] for a in self.new_actors() if f" rank {self._victim} of" in a["Name"] and a["Pid"]]
            if pids:
                self.given_up.wait(self._after_seconds)
                os.kill(pids[0], signal.SIGKILL)
                return


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_that_is_killed_at_any_moment_is_named_and_nothing_is_left(
    seed: int, checkpoint: Any, wait_until: Callable[..., None], assert_gone: Callable[..., None]
) -> None:
    chance = random.Random(seed)
    victim = chance.randrange(2)
    # Starting takes some seconds, most of them in torch's import; loading a tenth of one.
    killer = Killer(victim, chance.uniform(0, 5))
    killer.start()
    try:
        with pytest.raises(ClusterError) as caught, ray_streamer.load_sharded(checkpoint.uri, tp=2) as model:
            model.run(wait_for_the_end)
        named = re.search(r"rank (\d)", str(caught.value))
        assert named is not None
        assert int(named[1]) == victim
        if isinstance(caught.value, RankFailedError):
            assert caught.value.rank == victim
    finally:
        killer.given_up.set()
        killer.join()
    wait_until(lambda: all(actor["State"] == "DEAD" for actor in killer.new_actors()))
    assert_gone([actor["Pid"] for actor in killer.new_actors() if actor["Pid"]])
    wait_until(lambda: {entry["state"] for entry in placement_group_table().values()} == {"REMOVED"})
    assert not [name for name in os.listdir("/dev/shm") if "ray_streamer" in name]
