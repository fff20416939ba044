"""Calls in flight on several actors: what has come back, what has failed, who has not answered?"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError

from ray_streamer.cluster.failures import FailedCall, explain_failure
from ray_streamer.errors import ClusterError
from ray_streamer.wording import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def send(method: Any, *args: Any) -> ray.ObjectRef[Any]:
    """Calls a method of an actor.

    Raises:
        ClusterError: An argument cannot be pickled.
    """
    try:
        return method.remote(*args)
    except TypeError as error:  # Ray's, for what it cannot pickle
        raise ClusterError(
            f"what a rank is given cannot be pickled: {first_line(error)}; give functions that can be imported, and plain values"
        ) from error


def kill(actors: Sequence[Any]) -> None:
    """Ends actors, the last one first; those that are dead already stay so."""
    for actor in reversed(actors):
        # ValueError: an actor of a Ray that this process has since left.
        with suppress(RayError, ValueError):
            if ray.is_initialized():
                ray.kill(actor)


class Calls:
    """One call to each of several actors, by number (a rank, or a seat before ranks are known).

    Attributes:
        is_callers: Whether they run the caller's own function.
        results: What has come back so far, by number.
        failures: What has failed so far, in order of arrival.
    """

    def __init__(self, refs: Mapping[int, ray.ObjectRef[Any]], *, is_callers: bool = False) -> None:
        self.is_callers = is_callers
        self._numbers = {ref: number for number, ref in refs.items()}
        self.results: dict[int, Any] = {}
        self.failures: list[FailedCall] = []

    @property
    def pending(self) -> tuple[int, ...]:
        """Numbers that have not answered."""
        return tuple(sorted(self._numbers.values()))

    @property
    def refs(self) -> tuple[ray.ObjectRef[Any], ...]:
        """Answers that have not come."""
        return tuple(self._numbers)

    def add(self, number: int, ref: ray.ObjectRef[Any]) -> None:
        """One more call is in flight."""
        self._numbers[ref] = number

    def unanswered(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """Those of `numbers` whose call has neither come back nor failed, whether it was sent or not."""
        ended = self.results.keys() | {failure.rank for failure in self.failures}
        return tuple(number for number in numbers if number not in ended)

    def fail(self, failure: FailedCall) -> None:
        """Counts a call as failed, which is not waited for any more."""
        self.failures.append(failure)
        self._numbers = {ref: number for ref, number in self._numbers.items() if number != failure.rank}

    def collect(self, timeout_seconds: float) -> None:
        """Wait until at least one more call has ended, or for `timeout_seconds`, and take in all that have."""
        ray.wait(list(self._numbers), timeout=timeout_seconds)
        done, _ = ray.wait(list(self._numbers), num_returns=len(self._numbers), timeout=0)
        for ref in done:
            number = self._numbers.pop(ref)
            try:
                self.results[number] = ray.get(ref)
            except RayError as error:
                self.failures.append(replace(explain_failure(number, error), is_callers=self.is_callers))


class ProgressPoll:
    """Asks every rank for its progress again and again, without ever waiting for an answer."""

    def __init__(self, actors: Mapping[int, Any]) -> None:
        self._actors = actors
        self._asked: dict[ray.ObjectRef[Any], int] = {}
        self._latest: dict[int, Any] = dict.fromkeys(actors)

    def latest(self) -> list[Any]:
        """The newest answer of each rank, None where there is none yet; asks anew those that have answered."""
        if self._asked:
            done, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            for ref in done:
                self._take(self._asked.pop(ref), ref)
        waiting = set(self._asked.values())
        for rank, actor in self._actors.items():
            if rank not in waiting:
                self._asked[actor.control.remote("progress")] = rank
        return list(self._latest.values())

    def _take(self, rank: int, ref: ray.ObjectRef[Any]) -> None:
        # A dead rank is silent here: the call that is being watched tells of it.
        with suppress(RayActorError):
            self._latest[rank] = ray.get(ref)
