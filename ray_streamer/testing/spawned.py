"""What do processes of their own answer, one for each rank? For tests whose ranks need a process group, or another interpreter."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection


def answers_of(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, timeout_seconds: float
) -> list[Any]:
    """What `function` returned in each process, or the error that it raised there; processes are spawned.

    Args:
        function: Importable there, like its arguments.
        arguments: Of each process.
        timeout_seconds: For each answer, and for the end of each process.

    Raises:
        AssertionError: A process gave no answer.
    """
    context = multiprocessing.get_context("spawn")
    started: list[tuple[Any, Any]] = []
    for own in arguments:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(sender, function, own), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    answers: list[Any] = []
    for _, receiver in started:
        assert receiver.poll(timeout_seconds), "a process gave no answer"
        answers.append(receiver.recv())
    for process, _ in started:
        process.join(timeout_seconds)
    return answers


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(function(*arguments))
    except BaseException as error:
        sender.send(error)
