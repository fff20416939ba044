"""Does every rank of `load_sharded` that is killed or stopped, at any moment, get its name told, and leave nothing in Ray?

    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 python benchmarks/soak_ray.py [ROUNDS] [SEED]

In each round a local Ray starts four ranks that load one checkpoint, and the process of one of them is killed (SIGKILL) or stopped
(SIGSTOP) at a random moment between its start and a little after a load's usual end. The caller must then have the model, or read an error
that names this rank, within 20 s; where it met nobody before, 20 s after the startup timeout, here 30 s. Then all actors are dead, their
processes gone, their placement group removed and no shared memory is left. `soak_ranks.py` does the same without Ray, with forks and
failures besides. Linux, CPU only; prints one line per round and a table.
"""

from __future__ import annotations

import collections
import os
import random
import re
import signal
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from soak_ranks import main_with_arguments, say_table, write_checkpoint

import ray_streamer
from ray_streamer import Settings, Split
from ray_streamer.errors import RankFailedError, RayStreamerError

NUM_RANKS = 4
ACTIONS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
STARTUP_SECONDS = 30.0
# For Ray to start a process that looks at a silent one, and for ranks that are told to stop.
GRACE_SECONDS = 20.0
GIVEN_UP_SECONDS = 120.0


def actors() -> dict[str, dict[str, Any]]:
    """Every actor that this Ray knows, by id."""
    return {actor["ActorID"]: actor for actor in ray._private.state.actors().values()}


class Marksman(threading.Thread):
    """Sends a signal to one rank of the next load, some time after its process is there."""

    def __init__(self, action: str | None, victim: int, after_seconds: float) -> None:
        super().__init__(daemon=True)
        self._action, self._victim, self._after_seconds = action, victim, after_seconds
        self._known = set(actors())
        self.is_over = threading.Event()
        self.acted: float | None = None
        self.appeared = float("nan")

    def new_actors(self) -> list[dict[str, Any]]:
        """The actors of this round."""
        return [actor for name, actor in actors().items() if name not in self._known]

    def run(self) -> None:
        """Waits for the process, then for the moment."""
        pid = 0
        while not pid:
            if self.is_over.wait(0.01):
                return
            named = (a["Pid"] for a in self.new_actors() if f" rank {self._victim} of" in a["Name"])
            pid = next(filter(None, named), 0)
        self.appeared = time.monotonic()
        if self._action is not None and not self.is_over.wait(self._after_seconds):
            with suppress(ProcessLookupError):
                os.kill(pid, ACTIONS[self._action])
                self.acted = time.monotonic()


def left(marksman: Marksman) -> list[str]:
    """What is still there after the load, however long Ray is given."""
    deadline = time.monotonic() + GIVEN_UP_SECONDS
    while True:
        mine = marksman.new_actors()
        pids = [actor["Pid"] for actor in mine if actor["Pid"]]
        found = [f"actor {actor['Name']} is {actor['State']}" for actor in mine if actor["State"] != "DEAD"]
        found += [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
        groups = placement_group_table().values()
        found += [f"placement group {group['name']}" for group in groups if group["state"] != "REMOVED"]
        found += [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if "ray_streamer" in name]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def play(folder: str, action: str | None, victim: int, after_seconds: float) -> tuple[str, float, list[str]]:
    """One round: how it ended, seconds from the signal (without one, from the start of the process), and what was wrong."""
    marksman = Marksman(action, victim, after_seconds)
    marksman.start()
    settings = Settings(
        memory_limit="64KiB",
        block_bytes="8KiB",
        concurrency=2,
        page_cache="off",
        direct_io="off",
        startup_timeout_seconds=STARTUP_SECONDS,
    )
    wrong: list[str] = []
    try:
        with ray_streamer.load_sharded(folder, tp=NUM_RANKS, rules={"*": Split(1)}, settings=settings):
            end = said = "loaded"
    except RayStreamerError as error:
        end = type(error).__name__
        said = f"{end}: {error}"
        # The text of a failed rank may also say who waited for it.
        named = (
            {error.rank}
            if isinstance(error, RankFailedError)
            else {int(number) for number in re.findall(r"\brank (\d+)\b", str(error))}
        )
        if named != {victim}:
            wrong.append(f"named {sorted(named)}: {error}")
    ended = time.monotonic()
    marksman.is_over.set()
    marksman.join()
    seconds = ended - (marksman.acted or marksman.appeared)
    has_met = "StartupTimeoutError" not in said
    if seconds > GRACE_SECONDS + (0 if has_met else STARTUP_SECONDS):
        wrong.append(f"too late: {said}")
    return end, seconds, wrong + [f"left {name}" for name in left(marksman)]


def main(num_rounds: int, seed: int) -> int:
    """Plays the rounds; the number of those that were not as they should be."""
    chance = random.Random(seed)
    table: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    num_bad = 0
    ray.init(num_cpus=NUM_RANKS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        usual = max(play(folder, None, 0, 0.0)[1] for _ in range(2))
        print(f"seed {seed}; a load takes {usual:.1f} s from the start of its processes", flush=True)
        for number in range(num_rounds):
            action, victim = list(ACTIONS)[number % len(ACTIONS)], chance.randrange(NUM_RANKS)
            after_seconds = chance.uniform(0, 1.1 * usual)
            end, seconds, wrong = play(folder, action, victim, after_seconds)
            table[action, end].append(seconds)
            num_bad += bool(wrong)
            print(
                f"{number:3} {action} rank {victim} after {after_seconds:4.1f} s: {end} {seconds:5.2f} s later "
                f"{'; '.join(wrong) or 'ok'}",
                flush=True,
            )
    ray.shutdown()
    say_table(table, num_bad, num_rounds)
    return num_bad


if __name__ == "__main__":
    main_with_arguments(main)
