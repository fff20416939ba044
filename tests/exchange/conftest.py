"""Ranks that meet as threads of this process, or as processes of their own that do what a script says."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.exchange.session import NodeSession
from ray_streamer.testing.possessions import descriptors, mappings_of, package_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HANG_SECONDS = 120.0
FIRST_RANK = 20


def _place(
    session: str,
    local_rank: int,
    num_ranks: int,
    *,
    startup: float = HANG_SECONDS,
    neighbour: float = HANG_SECONDS,
    progress: float = HANG_SECONDS,
    assumption: str = "",
) -> Place:
    return Place(
        session=session,
        rank=FIRST_RANK + local_rank,
        ranks=tuple(range(FIRST_RANK, FIRST_RANK + num_ranks)),
        node="n",
        timeouts=Timeouts(startup_seconds=startup, neighbour_seconds=neighbour, progress_seconds=progress),
        assumption=assumption,
    )


class RankThread:
    """One rank: meets the others in a thread of its own, does `work` with the session, and leaves it.

    Attributes:
        outcome: What `work` returned, or the error that ended it.
    """

    def __init__(self, work: Callable[[NodeSession], Any], place: Place) -> None:
        self.outcome: Any = None

        def run() -> None:
            try:
                with NodeSession.meet(place) as session:
                    self.outcome = work(session)
            except BaseException as error:
                self.outcome = error

        self._thread = threading.Thread(target=run, name=f"test-rank-{place.rank}", daemon=True)
        self._thread.start()

    def join(self) -> Any:
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive(), "a rank waits for ever"
        return self.outcome


class RankScript:
    """One rank as a process: see `scripted_rank.py`."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, str(Path(__file__).with_name("scripted_rank.py")), *map(str, arguments)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def wait_for(self, line: str) -> None:
        """Until the rank says so."""
        assert self._process.stdout is not None
        while (said := self._process.stdout.readline().strip()) != line:
            assert said, f"the rank ended before it said {line!r}"

    def child(self) -> int:
        """The process that the rank forked before it ended."""
        self.wait_for("fork raw")
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def outcome(self) -> dict[str, Any]:
        """What the rank ended with."""
        said, _ = self._process.communicate(timeout=HANG_SECONDS)
        return json.loads(said.splitlines()[-1])

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def session() -> str:
    """The name of a session that no other test has."""
    return secrets.token_hex(8)


@pytest.fixture
def place() -> Callable[..., Place]:
    return _place


@pytest.fixture
def start(session: str) -> Callable[..., RankThread]:
    """Starts local rank `local_rank` of `num_ranks`, which does `work`; keywords are timeouts."""

    def start_rank(work: Callable[[NodeSession], Any], local_rank: int, num_ranks: int, **given: Any) -> RankThread:
        return RankThread(work, _place(given.pop("session", session), local_rank, num_ranks, **given))

    return start_rank


@pytest.fixture
def together(start: Callable[..., RankThread]) -> Callable[..., list[Any]]:
    """What each of `num_ranks` ranks that do the same `work` ends with."""

    def run(work: Callable[[NodeSession], Any], num_ranks: int, **given: Any) -> list[Any]:
        return [rank.join() for rank in [start(work, number, num_ranks, **given) for number in range(num_ranks)]]

    return run


@pytest.fixture
def script(session: str) -> Iterator[Callable[..., RankScript]]:
    """Starts a rank as a process; all are gone at the end."""
    started: list[RankScript] = []

    def start_process(*arguments: object) -> RankScript:
        started.append(RankScript(session, *arguments))
        return started[-1]

    yield start_process
    for rank in started:
        rank.kill()


@pytest.fixture(autouse=True)
def nothing_left(session: str) -> Iterator[None]:
    """Every thread, descriptor, mapping and name of a test is gone when it is over; what tests of other modules left is theirs."""
    before, threads_before, mapped_before = _descriptors(), package_threads(), mappings_of("ray_streamer-")
    yield
    left = [name for name in _descriptors() if name not in before]
    assert not left, "descriptors are left"
    assert not set(package_threads()) - set(threads_before), "threads are left"
    assert session not in Path("/proc/net/unix").read_text(), "a socket is left"
    assert not set(mappings_of("ray_streamer-")) - set(mapped_before), "memory is left mapped"


def _descriptors() -> list[str]:
    return [name for name in descriptors() if name.startswith(("socket:", "/memfd:", "anon_inode:"))]
