"""Which of several errors is the cause, and how is it told without a bare Ray error?

One rank's fault shows up as many errors: its own, its neighbours' ("rank 3 went away", "rank 3 did not come", "aborted"), and
Ray's when the process died. Only the first that is nobody's echo is the cause.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from ray_streamer.errors import ClusterError, LoadAbortedError, RankFailedError, StartupTimeoutError

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

_DEATHS = (RayActorError, ActorUnschedulableError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)

_LESS_MEMORY = (
    "Free memory on that node, or give ranks less of it, as by a smaller memory_limit or by more nodes; RAY_memory_usage_threshold, where "
    "Ray is started, says how full a node may be"
)


@dataclass(frozen=True, slots=True)
class FailedCall:
    """One rank's call ended in an error.

    Attributes:
        rank: The rank whose call it was.
        cause: The error that the worker raised, or a sentence about the actor's death.
        origin: The error that Ray raised here; None where Ray noticed nothing.
        is_callers: Whether the caller's own function ran: what it says of ranks is about other ranks than these.
    """

    rank: int
    cause: BaseException | str
    origin: RayError | None = None
    is_callers: bool = False

    @property
    def is_echo(self) -> bool:
        """Another rank's failure, as seen from this one."""
        return not self.is_callers and (isinstance(self.cause, LoadAbortedError) or bool(self.accused))

    @property
    def accused(self) -> tuple[int, ...]:
        """The ranks whose failure this one reports."""
        if self.is_callers:
            return ()
        if isinstance(self.cause, RankFailedError):
            return (self.cause.rank,)
        return self.cause.ranks if isinstance(self.cause, StartupTimeoutError) else ()


def explain_failure(rank: int, error: RayError) -> FailedCall:
    """What went wrong in a call, with the worker's own error and its type when there is one."""
    if isinstance(error, RayTaskError):
        cause: BaseException = error.cause
        if isinstance(cause, RayError):
            return FailedCall(rank, ClusterError(_one_line(cause) + _hint(cause)), error)
        cause.add_note(f"on rank {rank}, {_plain(error)}")
        return FailedCall(rank, cause, error)
    if isinstance(error, ActorUnavailableError):
        return FailedCall(rank, f"actor unreachable: {_one_line(error)}", error)
    if isinstance(error, OutOfMemoryError):
        return FailedCall(rank, f"actor died: {_one_line(error)}. {_LESS_MEMORY}", error)
    if isinstance(error, _DEATHS):
        return FailedCall(rank, f"actor died: {_one_line(error)}", error)
    return FailedCall(rank, ClusterError(f"Ray lost the call: {type(error).__name__}: {_one_line(error)}"), error)


def choose_cause(failures: Sequence[FailedCall]) -> FailedCall:
    """The failure to report, of those in order of arrival: the first that is no echo, else the first to name a rank."""
    for failure in failures:
        if not failure.is_echo:
            return failure
    for failure in failures:
        if failure.accused:
            return failure
    return failures[0]


def tell_failure(failure: FailedCall, nodes: Sequence[str], *, alive: Container[int] = ()) -> RankFailedError:
    """The error for the caller, with its cause chained.

    Args:
        failure: The chosen one. When it is an echo, the rank that it speaks of is the one reported.
        nodes: Node of each rank, as messages name it.
        alive: Ranks that have answered: of several that did not come, another one is reported.
    """
    rank, cause = failure.rank, failure.cause
    accused = [number for number in failure.accused if 0 <= number < len(nodes)]
    if accused:
        rank = next((number for number in accused if number not in alive), accused[0])
        cause = cause.cause if isinstance(cause, RankFailedError) else cause
    error = RankFailedError(rank, nodes[rank], cause)
    error.__cause__ = failure.cause if isinstance(failure.cause, BaseException) else failure.origin
    return error


@contextmanager
def ray_errors_translated(doing: str) -> Iterator[None]:
    """Turn what Ray raises inside into `ClusterError: <doing>: ...`, chained."""
    try:
        yield
    except RayError as error:
        raise ClusterError(f"{doing}: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: RayError) -> str:
    # The lines of a dead actor's message that start with a tab are Ray's own names for it.
    # What follows is of Ray's own code, or of all processes of the node.
    text = re.split(r"\n(?:traceback|Object store memory usage): ", _plain(error), maxsplit=1)[0]
    return " ".join(" ".join(line for line in text.splitlines() if not line.startswith("\t")).split())


def _hint(error: RayError) -> str:
    is_absent = "No module named" in str(error)
    return "; give it to all nodes with the job's working_dir or py_modules" if is_absent else ""


def _plain(error: RayError) -> str:
    # Ray colours the tracebacks of its workers.
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
