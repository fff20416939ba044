"""How is one request to an object store sent, until its answer is a success? In its turn, along redirects, refusals told apart."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ray_streamer.errors import StorageError, ThrottledError
from ray_streamer.storage.answer import faults_translated
from ray_streamer.storage.refusal import MAX_ERROR_BYTES
from ray_streamer.storage.request_limit import RequestLimit
from ray_streamer.storage.retry import PassingFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from ray_streamer.storage.counters import Counters
    from ray_streamer.storage.http_client import HttpClient
    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.identity import Identity
    from ray_streamer.storage.object_store import ObjectStore, Request

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5


class ConditionRefusedError(Exception):
    """The store says that `If-Match` does not hold, or that it does not know it.

    Attributes:
        error: What it becomes if that is true.
    """

    def __init__(self, error: StorageError) -> None:
        super().__init__(str(error))
        self.error = error


class _MovedError(Exception):
    """The store sent the request elsewhere.

    Attributes:
        request: What to send instead; of an object the store has noted it.
    """

    def __init__(self, request: Request | None = None) -> None:
        super().__init__()
        self.request = request


def _is_of_no_more_use(request: Request, fault: PassingFault | StorageError) -> bool:
    """Whether the credentials, or the address that a server named, are better found anew: that one may be gone, or never was good."""
    if isinstance(fault, PassingFault) and fault.error_class is ThrottledError:
        return False
    return request.is_sent_on or (isinstance(fault, PassingFault) and fault.is_worth_one_retry)


def _sent_on_too_often(what: str) -> StorageError:
    return StorageError(f"{what}: the server sent the request on more than {_MAX_REDIRECTS} times")


class ObjectRequests:
    """Requests to one store; many threads send them at once.

    Args:
        store: Makes the requests, and says what its refusals mean. The caller closes it.
        http: Sends them. The caller closes it.
        counters: Where throttled requests are counted, and those that were held back.
        max_requests: Never more than so many at once.
    """

    def __init__(self, store: ObjectStore, http: HttpClient, counters: Counters, *, max_requests: int) -> None:
        self._store = store
        self._http = http
        self._counters = counters
        self._limit = RequestLimit(max_requests)
        self._has_answered = False

    @contextmanager
    def get(
        self, path: str, what: str, headers: Mapping[str, str], pinned: Identity | None, *, offset: int = 0
    ) -> Iterator[tuple[Request, HttpAnswer]]:
        """One GET of an object and its answer, whose status was success, wherever the store sent the request.

        Args:
            path: Of the object, relative to the folder.
            what: Object and extent, for messages.
            headers: To be sent.
            pinned: The version that is wanted, if the store is to look at it, too.
            offset: The first byte that is wanted, for the report.

        Raises:
            ConditionRefusedError: The store refuses the condition on the version.
            PassingFault: Asking again may help.
            RayStreamerError: Asking again does not help.
        """
        for _ in range(_MAX_REDIRECTS + 1):
            request = self._made(what, lambda: self._store.object_request(path, headers, pinned))
            try:
                with self._asked(what, request, path=path, offset=offset) as answer:
                    yield request, answer
            except _MovedError:
                continue
            except (PassingFault, StorageError) as fault:
                if _is_of_no_more_use(request, fault):
                    self._store.discard(path, request)
                raise
            else:
                return
            finally:
                self._store.end(path, request)
        raise _sent_on_too_often(what)

    @contextmanager
    def get_page(self, prefix: str, token: str, what: str, *, recursive: bool) -> Iterator[HttpAnswer]:
        """One GET of a page of a listing and its answer, whose status was success; see `ObjectStore.listing_request`.

        Raises:
            PassingFault: Asking again may help.
            RayStreamerError: Asking again does not help.
        """
        request = self._made(what, lambda: self._store.listing_request(prefix, token, recursive=recursive))
        try:
            for _ in range(_MAX_REDIRECTS + 1):
                try:
                    with self._asked(what, request, path=None) as answer:
                        yield answer
                except _MovedError as moved:
                    request = moved.request or request
                else:
                    return
        finally:
            self._store.end_page()
        raise _sent_on_too_often(what)

    def close(self) -> None:
        """Let everybody through who waits for a turn: what they ask then fails by itself."""
        self._limit.close()

    @contextmanager
    def _asked(self, what: str, request: Request, *, path: str | None, offset: int = 0) -> Iterator[HttpAnswer]:
        """The answer to one request, for an object or else a listing, when its turn has come and if its status was success."""
        with (
            self._limit.admit() as turn,
            self._faults_translated(what, endpoint=self._store.place_of(request)),
            self._http.get(request.url, request.headers) as answer,
        ):
            self._has_answered = True
            if answer.status not in (200, 206):
                moved = self._moved(what, request, answer, path) if answer.status in _REDIRECTS else None
                if moved:
                    # Its body is of no interest, but keeps the connection.
                    self._http.read(answer, MAX_ERROR_BYTES)
                    raise moved
                raise self._refusal(answer, what, request, number=turn.number, is_object=path is not None)
            self._limit.climb()
            if turn.held_seconds and path is not None:
                self._counters.held(path, offset, turn.held_seconds)
            yield answer

    def _moved(self, what: str, request: Request, answer: HttpAnswer, path: str | None) -> _MovedError | None:
        """What a redirect means; None where it is followed nowhere."""
        if path is not None:
            return _MovedError() if self._store.follow(path, request, answer) else None
        instead = self._store.follow_page(request, answer, what)
        return _MovedError(instead) if instead else None

    def _refusal(self, answer: HttpAnswer, what: str, request: Request, *, number: int, is_object: bool) -> Exception:
        """The exception to raise for an answer, with what it means for later requests."""
        refusal = self._store.refusal_of(request, answer, self._http.read(answer, MAX_ERROR_BYTES))
        fault = refusal.error(what, is_object=is_object)
        if answer.status in (412, 501) and request.is_conditional and isinstance(fault, StorageError):
            return ConditionRefusedError(fault)
        if isinstance(fault, PassingFault) and fault.error_class is ThrottledError:
            self._counters.add(num_throttled=1)
            self._limit.fall(number)
        return fault

    def _faults_translated(self, what: str, *, endpoint: str) -> AbstractContextManager[None]:
        return faults_translated(
            what,
            endpoint=endpoint,
            endpoint_advice=self._store.endpoint_advice,
            ca_advice=self._store.ca_advice,
            has_answered=self._has_answered,
        )

    def _made(self, what: str, make: Callable[[], Request]) -> Request:
        """A request, for which the store's own library may ask for credentials: its faults are translated, too."""
        try:
            return make()
        except Exception:
            # Only now: to translate what may be raised costs more than to make most requests.
            here = self._faults_translated(what, endpoint=self._store.endpoint)
            with here, self._store.faults_translated(what, has_answered=self._has_answered):
                raise
