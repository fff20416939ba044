"""What a rank raises reaches the driver: as it is where pickle can bring it, else its type and text."""

from __future__ import annotations

import pickle
import threading
from typing import TYPE_CHECKING

import pytest

from ray_streamer.cluster.rank_actor import RankActor
from ray_streamer.errors import ClusterError, ObjectMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Two(Exception):
    """Takes two arguments, and pickle gives it one."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


class Holding(Exception):
    """Has something that pickle refuses."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Changing(Exception):
    """Comes out of pickle as something else."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, ("nothing",)


class Worker:
    """Raises what it is told to, or gives numbers one by one."""

    def __init__(self, rank: int, make: Callable[[], Exception]) -> None:
        self._make = make

    def work(self) -> None:
        raise self._make()

    def numbers(self) -> Iterator[int]:
        yield from range(3)


def _raised(make: Callable[[], Exception]) -> Exception:
    actor = RankActor("rank", 0)
    actor.build(Worker, (make,))
    with pytest.raises(Exception) as caught:  # noqa: PT011  # any, and looked at by the tests
        actor.call("work")
    return caught.value


@pytest.mark.parametrize("make", [lambda: KeyError("a"), lambda: ObjectMissingError("no such file")])
def test_what_travels_is_raised_as_it_is(make: Callable[[], Exception]) -> None:
    assert type(_raised(make)) is type(make())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(lambda: Two("a", "b"), "Two: a and b", id="other-arguments"),
        pytest.param(lambda: Holding("held"), "Holding: held", id="unpicklable"),
        pytest.param(lambda: Changing("gone"), "Changing: gone", id="something-else"),
    ],
)
def test_what_does_not_travel_is_told(make: Callable[[], Exception], text: str) -> None:
    told = pickle.loads(pickle.dumps(_raised(make)))
    assert type(told) is ClusterError
    assert str(told) == text


def test_a_generator_is_refused_since_ray_would_bring_its_first_value_alone() -> None:
    actor = RankActor("rank", 0)
    actor.build(Worker, (KeyError,))
    with pytest.raises(ClusterError, match=r"the generator 'numbers', .* return a list"):
        actor.call("numbers")
