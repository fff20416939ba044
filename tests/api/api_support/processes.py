"""Rank processes that stay: torch is imported once, and each test gives every rank a function to run."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

HANG_SECONDS = 60.0
START_SECONDS = 300.0
"""Torch takes its time to be imported where many processes do so."""


class RankProcesses:
    """Processes that run importable functions on order; use as a context manager.

    A process that owes a test its answer, because it hangs or because the test failed first, is another one for the next test.

    Args:
        num_processes: How many.
        are_forked: Whether torch is imported once for all of them, by a process from which they are forked.
    """

    def __init__(self, num_processes: int, *, are_forked: bool = False) -> None:
        context = multiprocessing.get_context("forkserver" if are_forked else "spawn")
        if are_forked:
            context.set_forkserver_preload(["torch", "ray_streamer.api.rank"])
        self._context = context
        started = [self._start() for _ in range(num_processes)]
        self._pipes: list[Connection] = [pipe for pipe, _ in started]
        self._processes: list[Any] = [process for _, process in started]
        self._owing = [True] * num_processes
        for number in range(num_processes):
            assert self.answer(number, START_SECONDS) == "ready"

    @property
    def pids(self) -> list[int]:
        """Their process ids, in rank order."""
        return [process.pid for process in self._processes]

    def _start(self) -> tuple[Connection, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def _replace(self, number: int) -> None:
        self._pipes[number].close()
        self._processes[number].kill()
        self._processes[number].join()
        self._pipes[number], self._processes[number] = self._start()
        assert self.answer(number, START_SECONDS) == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(10)
            process.kill()
            process.join()

    def order(
        self, process: int, function: Callable[..., Any], /, *, environment: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        """Let one process call a function with these variables in its environment; `answer` waits for the result."""
        if self._owing[process]:
            self._replace(process)
        self._owing[process] = True
        self._pipes[process].send((function, kwargs, environment or {}))

    def answer(self, process: int, seconds: float = HANG_SECONDS) -> Any:
        """What the function returned, or the error that it raised; a process that says nothing shows its stacks and is ended."""
        if not self._pipes[process].poll(seconds):
            show_stacks(self.pids[process])
            self._processes[process].kill()
            raise AssertionError(f"process {process} does not answer")
        answer = self._pipes[process].recv()
        self._owing[process] = False
        return answer

    def run(self, function: Callable[..., Any], per_rank: Sequence[dict[str, Any]]) -> list[Any]:
        """What the function returned, or raised, in each process, each called with keywords of its own."""
        for process, kwargs in enumerate(per_rank):
            self.order(process, function, **kwargs)
        return [self.answer(process) for process in range(len(per_rank))]


def show_stacks(pid: int) -> None:
    """Let a process of this module's, or one forked from it, write to stderr where its threads are."""
    os.kill(pid, signal.SIGUSR1)
    time.sleep(1)


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    for name in [name for name in os.environ if name.startswith(("RAY_STREAMER_", "RUNAI_STREAMER_", "AWS_"))]:
        del os.environ[name]
    import torch

    torch.set_num_threads(1)
    import ray_streamer.api.rank  # noqa: F401

    pipe.send("ready")
    while True:
        try:
            function, kwargs, environment = pipe.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            outcome = function(**kwargs)
        except Exception as error:
            outcome = _portable(error)
        for name in environment:
            del os.environ[name]
        pipe.send(outcome)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
