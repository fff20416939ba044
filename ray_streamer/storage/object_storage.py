"""How are objects of an object store read, whichever store it is?

What stores do in their own ways is asked of an `ObjectStore`. All answers come over our own connections (see `http_client`),
bodies into the caller's buffer. Each request is pinned to the object that the index saw, where the store can compare, and each
answer is compared with it (see `identity`). A body that broke goes on at the byte where it broke.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from ray_streamer.errors import ObjectChangedError, ShortReadError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.storage.answer import check_extent, content_range_of, refuse_encoded
from ray_streamer.storage.base import ObjectInfo, RemoteStorage, check_buffer, ignore
from ray_streamer.storage.counters import Counters
from ray_streamer.storage.http_client import HttpClient
from ray_streamer.storage.identity import Identity
from ray_streamer.storage.lateness import LateBodyError
from ray_streamer.storage.listing import list_keys
from ray_streamer.storage.object_requests import ConditionRefusedError, ObjectRequests
from ray_streamer.storage.partial_read import PartialRead
from ray_streamer.storage.retry import PassingFault, RetryEnd, RetryPolicy
from ray_streamer.storage.slow_address import Body
from ray_streamer.units import exact_bytes, human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray_streamer.storage.answer import ContentRange
    from ray_streamer.storage.base import Incident, OnFirstByte, StorageSettings, StorageStatistics
    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.listing import ListingPage
    from ray_streamer.storage.object_store import ObjectStore

_Result = TypeVar("_Result")
_FIRST_BYTE = Extent(0, 1)
# As many again after each pause: requests that are all hedged would earn another one each time, without end.
_MAX_CUTS = 16

_logger = logging.getLogger(__name__)


class ObjectStorage(RemoteStorage):
    """Objects below one folder or prefix of a store.

    Args:
        uri: The folder, for messages.
        settings: Timeouts, retries, concurrency, bandwidth.
        store: Closed with this storage.
    """

    def __init__(self, uri: str, settings: StorageSettings, store: ObjectStore) -> None:
        self.uri = uri
        self._store = store
        self._deadline_seconds = settings.retry_deadline_seconds
        self._list_timeout_seconds = settings.list_timeout_seconds
        self._counters = Counters()
        self._http = HttpClient(
            settings,
            ca_file=store.ca_file,
            counters=self._counters,
            named_by=urlsplit(store.endpoint).hostname if store.is_public_web else None,
        )
        self._requests = ObjectRequests(store, self._http, self._counters, max_requests=settings.concurrency)
        self._sends_conditions = True
        self._sizes: dict[tuple[str, str], int] = {}  # by path and ETag, which does not tell them
        self._warned: set[str] = set()
        self._closing = threading.Event()

    @property
    def endpoint(self) -> str:
        """Where requests go; no secret."""
        return self._store.endpoint

    @property
    def ca_file(self) -> str:
        """By which an https server is trusted; empty for those that the system trusts."""
        return self._store.ca_file

    def size_and_etag(self, path: str) -> ObjectInfo:
        """See `Storage`; asks for one byte, because the errors of a HEAD have no body that names the cause."""
        return self.read_head(path, 1)[1]

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See `Storage`."""
        read = PartialRead(path, Extent(0, max(1, max_bytes)))
        try:
            self._run(lambda: self._land(read))
            head, identity = bytes(read.view[:max_bytes]), read.identity
        except ShortReadError:
            # An object without bytes has no first byte to ask for.
            head, identity = b"", self._run(lambda: self._identity_of_empty(path))
        if identity is None or identity.size_bytes is None:
            raise StorageError(f"{self._name(path)}: the store does not say how long the object is")
        if not identity.is_exact:
            self._warn_of_identity(path, identity)
        self._sizes[path, identity.etag] = identity.size_bytes
        return head, ObjectInfo(identity.size_bytes, identity.token)

    def read_into(
        self, path: str, extent: Extent, buffer: memoryview, *, etag: str, on_first_byte: OnFirstByte = ignore
    ) -> None:
        """See `Storage`."""
        check_buffer(extent, buffer)
        identity = Identity.parse(etag)
        if identity.is_exact:
            identity = Identity(identity.etag, self._sizes.get((path, etag)), identity.modified)
        read = PartialRead(path, extent, buffer.cast("B"), identity, on_first_byte=on_first_byte)
        self._run(
            lambda: self._land(read),
            on_retry=lambda: self._counters.retried(path, read.rest.start, read.take_lost_seconds()),
        )

    def list(self, prefix: str = "", *, recursive: bool = False) -> list[str]:
        """See `Storage`; empty for a prefix that does not exist."""
        folder, listed = self._store.folder, self._store.listable(prefix)
        keys = self._store.keys
        if keys is None:
            keys = list_keys(
                lambda token, ends_at: self._run(
                    lambda: self._list_page(listed, token, recursive=recursive),
                    end=RetryEnd(ends_at, f"list_timeout_seconds={self._list_timeout_seconds:g}"),
                ),
                what=f"listing {self.uri}",
                timeout_seconds=self._list_timeout_seconds,
            )
        paths = {key.removeprefix(folder) for key in keys if key.startswith(folder)}
        # A key that ends with "/" stands for a folder in the consoles of object stores; some servers list below folders.
        found = [path for path in paths if path > prefix and path.startswith(prefix) and not path.endswith("/")]
        return sorted(path for path in found if recursive or "/" not in path[len(prefix) :])

    def statistics(self) -> StorageStatistics:
        """See `Storage`."""
        return self._counters.statistics()

    def incidents(self) -> tuple[Incident, ...]:
        """See `Storage`."""
        return self._counters.incidents()

    def close(self) -> None:
        """See `Storage`; reads in flight end with `StorageError`."""
        self._closing.set()
        self._requests.close()
        self._http.close()
        self._store.close()

    def _run(
        self,
        attempt: Callable[[], _Result],
        *,
        on_retry: Callable[[], None] | None = None,
        end: RetryEnd | None = None,
    ) -> _Result:
        """Try until it works; a body that was late goes on at once."""
        if self._closing.is_set():
            raise StorageError(f"{self.uri} is read after its storage was closed")

        def attempt_or_cut() -> _Result:
            for _ in range(_MAX_CUTS):
                try:
                    return attempt()
                except LateBodyError:
                    self._counters.add(num_cuts=1)
            raise PassingFault(f"reading {self.uri}: {_MAX_CUTS} bodies in a row were late, and were cut")

        policy = RetryPolicy(
            deadline_seconds=self._deadline_seconds,
            closing=self._closing,
            on_retry=on_retry or (lambda: self._counters.add(num_retries=1)),
            end=end,
        )
        return policy.run(attempt_or_cut)

    def _land(self, read: PartialRead) -> None:
        """One attempt to bring what is missing of an extent; what a broken body has brought stays."""
        try:
            self._land_once(read)
        except ConditionRefusedError as refused:
            self._look_again(read, refused.error)
            self._land_once(read)

    def _land_once(self, read: PartialRead) -> None:
        rest = read.rest
        if not rest.num_bytes:
            # Nothing was asked for, or the fault came after the last byte.
            return
        with self._answer(read.path, rest, expected=read.identity) as (answer, given, identity):
            self._pin_size(read, identity)
            read.begin(given, identity, what=self._name(read.path))
            began, address = time.perf_counter(), answer.connection.address
            try:
                self._http.receive_into(answer, read.view[read.num_landed :])
            finally:
                body = Body(address, read.path, rest.start, answer.num_received, began, time.perf_counter())
                self._counters.received(body)
                read.add(answer.num_received)
            if answer.is_too_long:
                raise StorageError(
                    f"{self._name(read.path, rest)}: the body is longer than the {exact_bytes(given.extent.num_bytes)} of its "
                    "Content-Range"
                )
        if read.rest.num_bytes:
            raise PassingFault(f"the body of {self._name(read.path, rest)} ended at byte {read.rest.start}")

    def _pin_size(self, read: PartialRead, identity: Identity) -> None:
        """All answers about one version tell one size, that of the first; an ETag alone does not say which."""
        expected = read.identity
        if expected and expected.is_exact and expected.size_bytes is None:
            size_bytes = self._sizes.setdefault((read.path, expected.etag), given_size := identity.size_bytes or 0)
            if size_bytes != given_size:
                raise ObjectChangedError(
                    f"{self._name(read.path)} has {exact_bytes(given_size)} now, not {exact_bytes(size_bytes)}"
                )

    def _look_again(self, read: PartialRead, refused: StorageError) -> None:
        """Ask without a condition which object is there, and send no more conditions if it is the expected one.

        Raises:
            ObjectChangedError: It is another object.
        """
        expected = read.identity
        try:
            with self._answer(read.path, _FIRST_BYTE, expected=None) as (answer, _, now):
                self._http.receive_into(answer, memoryview(bytearray(1)))
                difference = answer.secrets.clean(expected.difference(now)) if expected else ""
        except ShortReadError:
            difference = "the object is empty"
        if difference:
            raise ObjectChangedError(f"{refused}; the store says now: {difference}")
        self._sends_conditions = False
        self._warn(
            "condition",
            f"{self._name(read.path)}: the store refuses If-Match with the ETag that it gives; conditions are no longer "
            "sent, and the ETag of every answer is compared",
        )

    def _list_page(self, prefix: str, token: str, *, recursive: bool) -> ListingPage:
        what = f"listing {self.uri}"
        with self._requests.get_page(prefix, token, what, recursive=recursive) as answer:
            refuse_encoded(answer, what=what)
            most_bytes = self._store.max_page_bytes
            page = memoryview(bytearray(most_bytes if answer.length is None else min(most_bytes, answer.length)))
            self._http.receive_into(answer, page)
            if answer.is_too_long or (answer.length or 0) > len(page):
                raise StorageError(
                    f"{what}: expected the keys of a bucket, got a page of more than {human_bytes(most_bytes)}"
                )
            if answer.num_received < (answer.length or 0):
                raise PassingFault(f"{what}: the body ended at byte {answer.num_received} of {answer.length}")
            try:
                return self._store.parse_page(answer, bytes(page[: answer.num_received]))
            except ValueError as error:
                reason = answer.secrets.clean(str(error))
        raise StorageError(f"{what}: expected the keys of a bucket, got something else: {reason}")

    @contextmanager
    def _answer(
        self, path: str, asked: Extent, *, expected: Identity | None
    ) -> Iterator[tuple[HttpAnswer, ContentRange, Identity]]:
        """One GET for the bytes `asked`; the answer's head has been checked when the block begins."""
        what = self._name(path, asked)
        # The last byte is inclusive in HTTP (RFC 9110, section 14.1.2), and nowhere else.
        headers = {"Range": f"bytes={asked.start}-{asked.stop - 1}"}
        pinned = expected if self._sends_conditions else None
        with self._requests.get(path, what, headers, pinned, offset=asked.start) as (request, answer):
            given = content_range_of(answer, asked=asked, what=what)
            identity = self._store.identity_of(path, request, answer, given.size_bytes)
            difference = expected.difference(identity) if expected else ""
            if difference:
                raise ObjectChangedError(
                    f"{what}: the object is not the one that the index saw: {answer.secrets.clean(difference)}"
                )
            check_extent(answer, given, asked=asked, what=what)
            # An ETag that is known was looked at when the checkpoint was opened.
            is_known = expected is not None and expected.etag == identity.etag
            if not is_known and answer.secrets.are_in(identity.etag):
                identity = replace(identity, etag="")
            yield answer, given, identity

    def _identity_of_empty(self, path: str) -> Identity:
        """Of an object without bytes, which can be asked for as a whole only."""
        what = self._name(path)
        with self._requests.get(path, what, {}, None) as (request, answer):
            self._http.receive_into(answer, memoryview(bytearray(1)))
            if answer.length or answer.num_received:
                raise StorageError(f"{what}: the store refuses to give the first byte of an object that has some")
            return self._store.identity_of(path, request, answer, 0)

    def _warn_of_identity(self, path: str, identity: Identity) -> None:
        what = "a weak ETag" if identity.etag else "no ETag"
        compared = "size and Last-Modified" if identity.modified is not None else "size"
        self._warn(
            "identity",
            f"{self._name(path)} has {what}, so the store does not tell whether it was replaced; the loader compares "
            f"the {compared} of every answer instead",
        )

    def _warn(self, kind: str, message: str) -> None:
        """Say it once."""
        if kind not in self._warned:
            self._warned.add(kind)
            _logger.warning("%s", message)

    def _name(self, path: str, extent: Extent | None = None) -> str:
        name = super()._name(path)
        return f"{name} {extent}" if extent else name
