"""Do several processes share one GPU? Each loads its slices; blocks are read once and copied out of each other's arenas."""

from __future__ import annotations

import multiprocessing
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ground import Ground, load
from plans import llama_plan

from ray_streamer.testing.oracle import bytes_of, expected_results

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ROUNDS = 3


def check(ground: Ground, folder: Path, *, num_processes: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each number of processes: the slowest rank's seconds, the second round and later, and whose bytes are wrong."""
    return [_check(ground, folder, tp) for tp in num_processes]


def _check(ground: Ground, folder: Path, tp: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    session = secrets.token_hex(8)
    pipes, processes = [], []
    for rank in range(tp):
        ours, theirs = context.Pipe()
        arguments = (theirs, ground.is_fake, ground.megabytes, str(folder), tp, rank, session)
        processes.append(context.Process(target=_run, args=arguments, daemon=True))
        processes[-1].start()
        pipes.append(ours)
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(ROUNDS):
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send("go")
        rounds.append([pipe.recv() for pipe in pipes])
    for process in processes:
        process.join()
    seconds = [max(result["seconds"] for result in results) for results in rounds]
    return {
        "processes": tp,
        "bytes": sum(result["bytes"] for result in rounds[0]),
        "first_seconds": seconds[0],
        "seconds": min(seconds[1:]),
        "wrong": [name for results in rounds for result in results for name in result["wrong"]],
    }


def _run(pipe: Connection, is_fake: bool, megabytes: int, folder: str, tp: int, rank: int, session: str) -> None:
    """One rank; a process of its own."""
    ground = Ground(is_fake, megabytes)
    plan = llama_plan(Path(folder), tp)
    device = ground.open_device()
    for number in range(ROUNDS):
        pipe.send("ready")
        pipe.recv()
        started = time.perf_counter()
        tensors = load(ground, plan, rank=rank, session=f"{session}/{number}", device=device)
        ground.synchronize()
        seconds = time.perf_counter() - started
        pipe.send(
            {
                "seconds": seconds,
                "bytes": sum(tensor.nbytes for tensor in tensors.values()),
                # One round is enough to compare: it costs more than the load.
                "wrong": [] if number else _wrong(plan, Path(folder), rank, tensors),
            }
        )
        del tensors


def _wrong(plan: Any, folder: Path, rank: int, tensors: dict[str, Any]) -> list[str]:
    expected = expected_results(folder, plan.index, plan.slices[rank])
    return [f"rank {rank}: {name}" for name, tensor in tensors.items() if bytes_of(tensor) != bytes_of(expected[name])]
