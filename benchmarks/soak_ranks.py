"""Does every rank that dies, stops, fails or forks and dies, at any moment, get its name told within bounds, and leave nothing?

    python benchmarks/soak_ranks.py [ROUNDS] [SEED]

In each round four processes load one checkpoint without Ray, and one of them is made to end at a random moment between the call of
`load_rank` and a little after a load's usual end. Every other rank must then succeed, or name that rank within 10 s on a machine that
has CPUs to spare, with no thread, descriptor, mapping or socket left of the load. A rank that ends before it met anybody has not come:
it is named after the startup timeout, here 15 s. Linux, CPU only; prints one line per round and a table.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import random
import secrets
import select
import signal
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ray_streamer
import ray_streamer.api.rank
from ray_streamer import Settings, Split
from ray_streamer.errors import RankFailedError, ShortReadError, StartupTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NUM_RANKS = 4
NUM_TENSORS = 24
ACTIONS = ("kill", "stop", "fork", "fail")
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "fork": signal.SIGUSR1, "fail": signal.SIGUSR2}
STARTUP_SECONDS = 15.0
GIVEN_UP_SECONDS = 120.0
_RAW_FORK = {"x86_64": 57}


def write_checkpoint(folder: str) -> None:
    """Tensors of 1 MiB whose columns go to all ranks."""
    header, size = {}, 1 << 20
    for number in range(NUM_TENSORS):
        offsets = [number * size, (number + 1) * size]
        header[f"w.{number}"] = {"dtype": "U8", "shape": [1024, 1024], "data_offsets": offsets}
    text = json.dumps(header).encode()
    Path(folder, "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + os.urandom(NUM_TENSORS * size))


def possessions() -> list[str]:
    """What a load could leave in this process."""
    found = [thread.name for thread in threading.enumerate() if thread.name.startswith("ray_streamer")]
    found += [line.split()[-2] for line in Path("/proc/self/maps").read_text().splitlines() if "ray_streamer-" in line]
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith(("socket:", "/memfd:", "anon_inode:")):
            found.append(target)
    return sorted(found)


def _fork_and_die(*_: object) -> None:
    # Without Python's hooks, and with its lock: the child keeps copies of every socket open, as one of a C library would.
    if ctypes.PyDLL(None).syscall(_RAW_FORK[os.uname().machine]) == 0:
        while True:
            signal.pause()
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(*_: object) -> None:
    raise ShortReadError("the soak ends this rank")


def run_rank(rank: int, folder: str, session: str, answers: int) -> None:
    """One rank; says how its load ended, when, and what it left."""
    signal.signal(signal.SIGUSR1, _fork_and_die)
    signal.signal(signal.SIGUSR2, _fail)
    settings = Settings.resolve(
        memory_limit="64KiB",
        block_bytes="8KiB",
        concurrency=2,
        page_cache="off",
        direct_io="off",
        startup_timeout_seconds=STARTUP_SECONDS,
    )
    before = possessions()
    os.write(answers, b"\n")
    arguments: dict[str, Any] = {"rules": {"*": Split(1)}, "settings": settings}
    try:
        ray_streamer.load_rank(folder, rank=rank, world_size=NUM_RANKS, session=session, **arguments)
        outcome: dict[str, Any] = {"error": None}
    except BaseException as error:
        outcome = {"error": type(error).__name__, "named": getattr(error, "rank", None), "text": str(error)[:200]}
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    left = [name for name in possessions() if name not in before]
    os.write(answers, (json.dumps(outcome | {"rank": rank, "ended": time.monotonic(), "left": left}) + "\n").encode())


class Round:
    """Four ranks, one of them marked."""

    def __init__(self, folder: str) -> None:
        self.session = secrets.token_hex(8)
        self._answers, answers = os.pipe()
        self.pids = [self._fork(rank, folder, answers) for rank in range(NUM_RANKS)]
        os.close(answers)
        self._text = b""

    def _fork(self, rank: int, folder: str, answers: int) -> int:
        pid = os.fork()
        if pid == 0:
            os.close(self._answers)
            os.setpgid(0, 0)
            run_rank(rank, folder, self.session, answers)
            os._exit(0)
        return pid

    def wait_until_called(self) -> None:
        """Until every rank is about to call `load_rank`."""
        while self._text.count(b"\n") < NUM_RANKS:
            self._text += os.read(self._answers, 1 << 16)

    def outcomes(self, ranks: set[int]) -> dict[int, dict[str, Any]]:
        """What these ranks ended with, as far as they end in time."""
        deadline = time.monotonic() + GIVEN_UP_SECONDS
        while True:
            lines = [
                line for line in self._text.decode().splitlines(keepends=True) if line.strip() and line.endswith("\n")
            ]
            said = {answer["rank"]: answer for answer in map(json.loads, lines)}
            if ranks <= said.keys() or time.monotonic() > deadline:
                return said
            if select.select([self._answers], [], [], 1.0)[0]:
                self._text += os.read(self._answers, 1 << 16)

    def end(self) -> list[str]:
        """Ends all processes; the sockets that are left then."""
        for pid in self.pids:
            # The group: whatever the rank forked is in it.
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(self._answers)
        return [line for line in Path("/proc/net/unix").read_text().splitlines() if self.session in line]


def play(folder: str, action: str | None, delay_seconds: float, victim: int) -> dict[str, Any]:
    """One round; what the survivors said, and after how many seconds the last one of them."""
    scene = Round(folder)
    scene.wait_until_called()
    time.sleep(delay_seconds)
    acted = time.monotonic()
    if action is not None:
        os.kill(scene.pids[victim], SIGNALS[action])
    survivors = set(range(NUM_RANKS)) - ({victim} if action else set())
    said = scene.outcomes(survivors)
    sockets = scene.end()
    ends = {rank: said[rank]["ended"] - acted for rank in survivors & said.keys()}
    return {
        "silent": sorted(survivors - said.keys()),
        "outcomes": {rank: said[rank] for rank in survivors & said.keys()},
        "seconds": max(ends.values(), default=0.0),
        "sockets": [line for line in sockets if action != "fork"],
    }


def faults(result: dict[str, Any], victim: int) -> list[str]:
    """What is not as it should be."""
    found = [f"rank {rank} did not end" for rank in result["silent"]]
    for rank, outcome in result["outcomes"].items():
        is_absence = outcome["error"] == StartupTimeoutError.__name__ and f"ranks [{victim}]" in outcome["text"]
        # What ends the first rank while it reads the headers for all is everybody's own error.
        if is_absence or (victim == 0 and outcome["error"] == ShortReadError.__name__):
            continue
        if outcome["error"] not in (None, RankFailedError.__name__):
            found.append(f"rank {rank} raised {outcome['error']}: {outcome['text']}")
        elif outcome["error"] is not None and outcome["named"] != victim:
            found.append(f"rank {rank} named rank {outcome['named']}: {outcome['text']}")
        found += [f"rank {rank} left {name}" for name in outcome["left"]]
    return found + [f"left in the kernel: {line}" for line in result["sockets"]]


def main(num_rounds: int, seed: int) -> int:
    """Plays the rounds; the number of those that were not as they should be."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    table: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    num_bad = 0
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        usual = max(play(folder, None, 0.0, 0)["seconds"] for _ in range(2))
        print(f"seed {seed}; a load takes {usual:.2f} s", flush=True)
        for number in range(num_rounds):
            action, victim = ACTIONS[number % len(ACTIONS)], chance.randrange(NUM_RANKS)
            delay_seconds = chance.uniform(0, 1.1 * usual)
            result = play(folder, action, delay_seconds, victim)
            wrong = faults(result, victim)
            errors = {outcome["error"] for outcome in result["outcomes"].values()} - {None}
            end = "absent" if StartupTimeoutError.__name__ in errors else "named" if errors else "loaded"
            table[action, end].append(result["seconds"])
            num_bad += bool(wrong)
            print(
                f"{number:3} {action:5} rank {victim} after {delay_seconds:5.2f} s: "
                f"{end} within {result['seconds']:5.2f} s {'; '.join(wrong) or 'ok'}",
                flush=True,
            )
    say_table(table, num_bad, num_rounds)
    return num_bad


def say_table(table: Mapping[tuple[str, str], list[float]], num_bad: int, num_rounds: int) -> None:
    """Prints how often and how fast each action came to each end, and how many rounds were wrong."""
    for (action, end), seconds in sorted(table.items()):
        ordered = sorted(seconds)
        middle = ordered[len(ordered) // 2]
        print(f"{action:5} {end:20} {len(ordered):3} times, median {middle:5.2f} s, longest {ordered[-1]:5.2f} s")
    print(f"{num_bad} of {num_rounds} rounds were not as they should be")


def main_with_arguments(play_rounds: Callable[[int, int], int]) -> None:
    """Runs `play_rounds` with number of rounds and seed of the command line; exits with whether any round was wrong."""
    given = [int(argument) for argument in sys.argv[1:]]
    sys.exit(bool(play_rounds(*[*given, *(100, 1)[len(given) :]])))


if __name__ == "__main__":
    main_with_arguments(main)
