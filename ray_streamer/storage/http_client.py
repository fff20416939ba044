"""How is one GET answered in time? On a kept connection, and when the answer is late, by whichever request is first.

    ask on A ──── head in time ───────────────────────────> body from A
           └──── late ──> ask on B too ──> first head wins ─> its body; the other connection is shut

One thread does all of this, and no byte of a body is received before the race is over: two answers never write into the
same memory. Retries and the meaning of answers are not decided here.
"""

from __future__ import annotations

import errno
import functools
import select
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import h11

from ray_streamer.storage.bandwidth import Bandwidth
from ray_streamer.storage.http_pool import HttpPool
from ray_streamer.storage.http_route import route_of
from ray_streamer.storage.lateness import SEGMENT_BYTES, Hedging, SegmentClock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ray_streamer.storage.base import StorageSettings
    from ray_streamer.storage.counters import Counters
    from ray_streamer.storage.http_connection import HttpAnswer, HttpConnection
    from ray_streamer.storage.http_route import Route

# What is late may be learned while one waits.
_LOOK_AGAIN_SECONDS = 0.1
# Another thread connects meanwhile.
_CONNECTED_SECONDS = 0.01
_MAX_KNOWN_ROUTES = 64


class HttpClient:
    """GETs over kept connections; safe to call from many threads.

    Args:
        settings: Timeouts, share of extra requests, bandwidth.
        ca_file: By which https servers are trusted; empty for those that the system trusts.
        counters: Where connections, extra requests and thrown-away bytes are counted.
        named_by: The host of the server that may name others, if it may; see `Dialer`.
    """

    def __init__(
        self, settings: StorageSettings, *, ca_file: str, counters: Counters, named_by: str | None = None
    ) -> None:
        self._closing = threading.Event()
        self._pool = HttpPool(
            connect_timeout_seconds=settings.connect_timeout_seconds,
            ca_file=ca_file,
            counters=counters,
            closing=self._closing,
            named_by=named_by,
        )
        # Asked for once per server: the environment may have hundreds of variables, and all of them are looked at.
        self._route_to = functools.lru_cache(_MAX_KNOWN_ROUTES)(route_of)
        self._hedging = Hedging(max_fraction=settings.hedge_percent / 100)
        self._bandwidth = Bandwidth(settings.max_bandwidth, self._closing)
        self._first_byte_timeout_seconds = settings.first_byte_timeout_seconds
        self._stall_timeout_seconds = settings.stall_timeout_seconds
        self._counters = counters

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[HttpAnswer]:
        """The answer to one GET; the connection is kept when the block has read the whole body.

        Raises:
            OSError: The network failed, nothing came in time, or the pool was closed meanwhile.
            h11.RemoteProtocolError: The server does not speak HTTP.
            SettingsError: The environment names a proxy that cannot be used.
        """
        parts = urlsplit(url)
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        route = self._route_to(f"{parts.scheme}://{parts.netloc}")
        with _Race(self._pool, route, target, headers, self._counters) as race:
            answer = self._first_answer(race)
        try:
            yield answer
        finally:
            self._pool.give_back(answer.connection, is_reusable=answer.is_reusable)

    def receive_into(self, answer: HttpAnswer, buffer: memoryview) -> None:
        """Receive a body into `buffer`, as far as the one and the other reach; see `answer.num_received`.

        Raises:
            LateBodyError: The rest may be asked for again, at once.
            OSError: The connection broke, or stalled.
            h11.RemoteProtocolError: A chunked body is malformed.
        """
        clock = SegmentClock(timeout_seconds=self._stall_timeout_seconds, hedging=self._hedging)
        for num_bytes in answer.receive_into(buffer, clock):
            self._bandwidth.pay(num_bytes)
        # What shorter bodies take says little about whole segments.
        if answer.num_received >= SEGMENT_BYTES:
            clock.end_body()

    def read(self, answer: HttpAnswer, max_bytes: int) -> bytes:
        """The beginning of a body, at most `max_bytes`; for those of errors, what came before it broke or stalled."""
        body = memoryview(bytearray(max_bytes if answer.length is None else min(max_bytes, answer.length)))
        with suppress(OSError, h11.RemoteProtocolError):
            self.receive_into(answer, body)
        return bytes(body[: answer.num_received])

    def close(self) -> None:
        """End all connections; those who wait for one, or for their share of the bandwidth, wake up."""
        self._closing.set()
        self._pool.close()

    def _first_answer(self, race: _Race) -> HttpAnswer:
        self._hedging.earn()
        race.start()
        began = time.monotonic()
        while True:
            waited_seconds = time.monotonic() - began
            if waited_seconds >= self._first_byte_timeout_seconds:
                raise TimeoutError(
                    errno.ETIMEDOUT,
                    f"no response headers in {self._first_byte_timeout_seconds:g} s (first_byte_timeout_seconds)",
                )
            # Once more after one time, three times, seven times of what is late: second requests may be unlucky, too.
            late_after_seconds = self._hedging.heads.late_after_seconds * (2 ** (race.num_hedges + 1) - 1)
            if waited_seconds >= late_after_seconds and self._hedging.spend():
                race.hedge()
                continue
            left_seconds = late_after_seconds - waited_seconds
            look_again_seconds = _CONNECTED_SECONDS if race.num_wanted else _LOOK_AGAIN_SECONDS
            answer = race.wait(left_seconds if 0 < left_seconds < look_again_seconds else look_again_seconds)
            if answer is not None:
                for seconds in race.latencies:
                    self._hedging.heads.observe(seconds)
                return answer


@dataclass(frozen=True, slots=True)
class _Runner:
    connection: HttpConnection
    was_idle: bool
    began: float


class _Race:
    """One request on one connection or several; those that did not win are given up at the end of the `with` block.

    Attributes:
        num_hedges: Requests beside the first one that are wanted or under way.
        num_wanted: Of these, how many wait for a connection.
        latencies: When an answer has come: seconds that each request had been under way.
    """

    def __init__(
        self, pool: HttpPool, route: Route, target: str, headers: Mapping[str, str], counters: Counters
    ) -> None:
        self._pool, self._route, self._target, self._headers = pool, route, target, headers
        self._counters = counters
        self._runners: dict[int, _Runner] = {}
        self._poll = select.poll()
        self.num_hedges = 0
        self.num_wanted = 0
        self.latencies: list[float] = []

    def start(self) -> None:
        """Ask, on an idle connection if there is one."""
        if not self._ask_on_idle():
            self._ask(self._pool.connect(self._route), was_idle=False)

    def hedge(self) -> None:
        """Ask once more, as soon as a connection is idle; one is made meanwhile, if none is.

        To connect may take long, too, and the first answer may come before.
        """
        self.num_hedges += 1
        self.num_wanted += 1
        self._ask_wanted()
        if self.num_wanted:
            self._pool.connect_meanwhile(self._route)

    def _ask_on_idle(self) -> bool:
        """Whether there was an idle connection, and it took the request."""
        connection = self._pool.take_idle(self._route)
        if connection is not None:
            # A server may close an idle connection at any time; that says nothing about the request.
            with suppress(ConnectionError):
                self._ask(connection, was_idle=True)
                return True
        return False

    def _ask_wanted(self) -> None:
        # When that cannot be done, the first request still runs.
        with suppress(OSError):
            while self.num_wanted and self._ask_on_idle():
                self.num_wanted -= 1
                self._counters.add(num_hedges=1)

    def wait(self, seconds: float) -> HttpAnswer | None:
        """The first answer whose head comes within so long.

        Raises:
            OSError: The last connection in the race is gone.
            h11.RemoteProtocolError: The last server in the race does not speak HTTP.
        """
        self._ask_wanted()
        for fileno, _ in self._poll.poll(1000 * seconds):
            runner = self._runners[fileno]
            try:
                answer = runner.connection.receive_head()
            except (OSError, h11.RemoteProtocolError) as error:
                self._drop(fileno)
                if runner.was_idle and isinstance(error, ConnectionError):
                    self._ask(self._pool.connect(self._route), was_idle=False)
                elif not self._runners:
                    raise
                continue
            if answer is not None:
                now = time.monotonic()
                self.latencies = [now - each.began for each in self._runners.values()]
                del self._runners[fileno]
                return answer
        return None

    def _ask(self, connection: HttpConnection, *, was_idle: bool) -> None:
        try:
            connection.ask(self._target, self._headers)
        except BaseException:
            self._pool.give_back(connection, is_reusable=False)
            raise
        fileno = connection.fileno()
        self._runners[fileno] = _Runner(connection, was_idle, time.monotonic())
        self._poll.register(fileno, select.POLLIN)

    def _drop(self, fileno: int) -> None:
        self._poll.unregister(fileno)
        self._pool.give_back(self._runners.pop(fileno).connection, is_reusable=False)

    def __enter__(self) -> _Race:
        return self

    def __exit__(self, *_: object) -> None:
        for fileno in list(self._runners):
            self._drop(fileno)
