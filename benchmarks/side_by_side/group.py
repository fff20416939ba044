"""What does one run take? A fresh process for each rank, timed from the start of the first to the end of the last load."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.testing.peak_memory import PeakMemory, allocated_bytes
from side_by_side.results import Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from side_by_side.task import Task

_HIDDEN = ("RAY_STREAMER_", "RUNAI_STREAMER_", "AWS_", "SSL_CERT_", "REQUESTS_CA_", "CURL_CA_", "OMP_", "HF_", "PYTHON")
"""Beginnings of variables of this machine that would reach a loader, or would make every process compile what it imports."""

BENCHMARKS = Path(__file__).parents[1]


class ContenderError(RuntimeError):
    """A contender did not load; the message is what its row says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks of one run, before they start.

    Attributes:
        tasks: One for each rank.
        environment: What they get beside the variables of this process.
        bytes_sent: The server's count so far; None where there is no server.
        log: What they write on standard error goes there.
        limit_seconds: After that they are ended.
    """

    tasks: Sequence[Task]
    environment: Mapping[str, str]
    bytes_sent: Callable[[], int] | None
    log: Path
    limit_seconds: float

    def measure(self) -> tuple[Run, list[str]]:
        """Runs them; what it took, and the digest of each rank's tensors.

        Raises:
            ContenderError: A rank failed, is not installed, or took too long.
        """
        with ExitStack() as stack:
            sent = self.bytes_sent() if self.bytes_sent else 0
            log = stack.enter_context(self.log.open("wb"))
            started = time.monotonic()
            ranks = [stack.enter_context(_Rank(task, self._variables(), log)) for task in self.tasks]
            is_late = stack.enter_context(_Watchdog(ranks, self.limit_seconds)).has_bitten
            # All at once, before one after the other is waited for: each has much memory to give back.
            stack.callback(_kill_all, ranks)
            ask = _Asker(ranks, is_late, self.limit_seconds).ask
            ask([task.to_json() for task in self.tasks])
            pids = [rank.pid for rank in ranks]
            with PeakMemory(pids, shared_bytes=allocated_bytes) as memory:
                loads = ask(["load"] * len(ranks))
            digests = ask(["digest"] * len(ranks))
            disk_bytes = sum(load["disk_bytes"] for load in loads)
            run = Run(
                whole_seconds=max(load["stopped"] for load in loads) - started,
                load_seconds=max(load["stopped"] for load in loads) - min(load["started"] for load in loads),
                whole_cpu_seconds=sum(load["cpu_seconds"] for load in loads),
                load_cpu_seconds=sum(load["load_cpu_seconds"] for load in loads),
                added_bytes=memory.added_bytes,
                read_bytes=self.bytes_sent() - sent if self.bytes_sent else disk_bytes,
            )
        return run, [answer["digest"] for answer in digests]

    def _variables(self) -> dict[str, str]:
        here = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_HIDDEN) and not name.lower().endswith("_proxy")
        }
        path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
        # As torchrun sets it for several ranks of one machine; and all of them are on this one.
        return here | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **self.environment}


class _Rank:
    """The process of one rank, for the length of a `with` block."""

    def __init__(self, task: Task, environment: Mapping[str, str], log: Any) -> None:
        self._rank = task.rank
        self._process = subprocess.Popen(
            [sys.executable, "-m", "side_by_side.rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=dict(environment),
            bufsize=0,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._questions, self.answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, line: str) -> None:
        try:
            self._questions.write(f"{line}\n".encode())
        except BrokenPipeError:
            raise ContenderError(f"rank {self._rank} has ended") from None

    def answer(self) -> dict[str, Any]:
        """Its next answer, which must be under way."""
        line = self.answers.readline()
        if not line:
            raise ContenderError(f"rank {self._rank} ended with {self._process.wait()}")
        answer = json.loads(line)
        if "missing" in answer:
            raise ContenderError(f"not installed: no module {answer['missing']}")
        if "error" in answer:
            raise ContenderError(answer["error"])
        return answer

    def kill(self) -> None:
        self._process.kill()

    def __enter__(self) -> _Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._questions.close()
        self.answers.close()


def _kill_all(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        rank.kill()


class _Watchdog:
    """Ends all ranks when time is up."""

    def __init__(self, ranks: Sequence[_Rank], limit_seconds: float) -> None:
        self.has_bitten = threading.Event()
        self._ranks = ranks
        self._timer = threading.Timer(limit_seconds, self._bite)
        self._timer.daemon = True

    def _bite(self) -> None:
        self.has_bitten.set()
        _kill_all(self._ranks)

    def __enter__(self) -> _Watchdog:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


class _Asker:
    """Tells all ranks something, and takes their answers in the order in which they come: who fails is heard at once."""

    def __init__(self, ranks: Sequence[_Rank], is_late: threading.Event, limit_seconds: float) -> None:
        self._ranks, self._is_late, self._limit_seconds = ranks, is_late, limit_seconds

    def ask(self, lines: Sequence[str]) -> list[dict[str, Any]]:
        """One answer of each rank.

        Raises:
            ContenderError: A rank failed, or time is up.
        """
        answers: dict[int, dict[str, Any]] = {}
        try:
            with selectors.DefaultSelector() as selector:
                for number, (rank, line) in enumerate(zip(self._ranks, lines, strict=True)):
                    selector.register(rank.answers, selectors.EVENT_READ, number)
                    rank.tell(line)
                while len(answers) < len(self._ranks):
                    for key, _ in selector.select():
                        answers[key.data] = self._ranks[key.data].answer()
                        selector.unregister(key.fileobj)
        except ContenderError:
            if self._is_late.is_set():
                raise ContenderError(f"took longer than {self._limit_seconds:.0f} s") from None
            raise
        return [answers[number] for number in range(len(self._ranks))]
