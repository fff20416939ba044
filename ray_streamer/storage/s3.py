"""How are objects of an S3 bucket read?

boto3 finds credentials, endpoint and region, lists and signs; each object's url is signed once and then used for every
range of it. Bodies come over our own connections (see `http_client`) into the caller's buffer, each request pinned by
`If-Match` to the object that the index saw. A body that broke goes on at the byte where it broke.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from ray_streamer.errors import ShortReadError, StorageError, ThrottledError
from ray_streamer.extent import Extent
from ray_streamer.storage.base import ObjectInfo, RemoteStorage, check_buffer
from ray_streamer.storage.http_client import HttpClient
from ray_streamer.storage.lateness import LateBodyError
from ray_streamer.storage.request_limit import RequestLimit
from ray_streamer.storage.retry import PassingFault, Patience
from ray_streamer.storage.s3_answer import Refusal, faults_translated, range_of
from ray_streamer.storage.s3_client import SignedUrls, open_access
from ray_streamer.storage.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from ray_streamer.storage.base import StorageSettings, StorageStatistics
    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.s3_answer import ContentRange

_Result = TypeVar("_Result")


class S3Storage(RemoteStorage):
    """Objects below one prefix of one bucket."""

    def __init__(self, uri: str, settings: StorageSettings) -> None:
        self.uri = uri
        access = open_access(uri, settings)
        self._access = access
        self._location = access.location
        self._client = access.client
        self._endpoint = access.endpoint
        self._deadline_seconds = settings.retry_deadline_seconds
        self._urls = SignedUrls(access.sign, in_a_session=access.location.is_directory_bucket)
        self._tally = Tally()
        self._http = HttpClient(settings, ca_file=access.ca_file, tally=self._tally)
        self._limit = RequestLimit(settings.concurrency)
        self._has_answered = False
        self._closing = threading.Event()

    def size_and_etag(self, path: str) -> ObjectInfo:
        """See `Storage`; asks for one byte, because the errors of a HEAD have no body that names the cause."""
        return self.read_head(path, 1)[1]

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See `Storage`."""
        asked = Extent(0, max(1, max_bytes))

        def attempt() -> tuple[bytes, ObjectInfo]:
            with self._answer(path, asked) as (answer, given):
                head = bytearray(given.extent.num_bytes)
                self._http.receive_into(answer, memoryview(head))
                if answer.num_received < len(head):
                    raise PassingFault(f"the body of {self._name(path, asked)} ended too early")
                return bytes(head[:max_bytes]), ObjectInfo(given.size_bytes, answer.header("etag"))

        try:
            return self._run(attempt)
        except ShortReadError:
            # An object without bytes has no first byte to ask for.
            return b"", self._ask_info(path)

    def read_into(self, path: str, extent: Extent, buffer: memoryview, *, etag: str) -> None:
        """See `Storage`."""
        check_buffer(extent, buffer)
        view = buffer.cast("B")
        num_landed = 0

        def attempt() -> None:
            nonlocal num_landed
            rest = Extent(extent.start + num_landed, extent.stop)
            if not rest.num_bytes:
                # The fault came after the last byte.
                return
            with self._answer(path, rest, etag=etag) as (answer, given):
                if given.extent != rest:
                    raise ShortReadError(f"{self._name(path)} ends at {given.size_bytes}, before extent {extent} does")
                try:
                    self._http.receive_into(answer, view[num_landed:])
                finally:
                    num_landed += answer.num_received
            if num_landed < extent.num_bytes:
                raise PassingFault(f"the body of {self._name(path, rest)} ended at byte {extent.start + num_landed}")

        if extent.num_bytes:
            self._run(attempt)

    def list(self, prefix: str = "") -> list[str]:
        """See `Storage`; empty for a prefix that does not exist."""
        folder = self._location.key_of("")
        pages = self._client.get_paginator("list_objects_v2")

        def attempt() -> list[str]:
            with self._faults_translated(f"listing {self.uri}"):
                found = pages.paginate(**self._access.arguments, Prefix=self._location.listable(prefix), Delimiter="/")
                return [entry["Key"].removeprefix(folder) for page in found for entry in page.get("Contents", ())]

        # A key that ends with "/" stands for a folder in the consoles of object stores.
        listed = self._run(attempt)
        return sorted(path for path in listed if path.startswith(prefix) and path and not path.endswith("/"))

    def statistics(self) -> StorageStatistics:
        """See `Storage`."""
        return self._tally.statistics()

    def close(self) -> None:
        """See `Storage`; reads in flight end with `StorageError`."""
        self._closing.set()
        self._limit.close()
        self._http.close()
        self._client.close()

    def _run(self, attempt: Callable[[], _Result]) -> _Result:
        """Try until it works; a body that was late goes on at once."""
        if self._closing.is_set():
            raise StorageError(f"{self.uri} is read after its storage was closed")

        def attempt_or_cut() -> _Result:
            while True:
                try:
                    return attempt()
                except LateBodyError:
                    self._tally.add(num_cuts=1)

        patience = Patience(
            deadline_seconds=self._deadline_seconds,
            closing=self._closing,
            on_retry=lambda: self._tally.add(num_retries=1),
        )
        return patience.run(attempt_or_cut)

    @contextmanager
    def _answer(self, path: str, asked: Extent, *, etag: str = "") -> Iterator[tuple[HttpAnswer, ContentRange]]:
        """One GET for the bytes `asked`; the answer's head has been checked when the block begins."""
        what = self._name(path, asked)
        # The last byte is inclusive in HTTP (RFC 9110, section 14.1.2), and nowhere else.
        headers = {"Range": f"bytes={asked.start}-{asked.stop - 1}", **self._access.headers}
        if etag:
            headers["If-Match"] = etag
        key = self._location.key_of(path)
        with self._limit.admit() as number, self._faults_translated(what):
            url = self._urls.url_of(key)
            with self._http.get(url, headers) as answer:
                self._has_answered = True
                if answer.status not in (200, 206):
                    raise self._refusal(answer, what, number=number, key=key, url=url)
                self._limit.climb()
                yield answer, range_of(answer, asked=asked, etag=etag, what=what)

    def _refusal(
        self, answer: HttpAnswer, what: str, *, number: int, key: str, url: str
    ) -> StorageError | PassingFault:
        """The exception to raise for an answer, with what it means for later requests."""
        fault = Refusal.from_answer(answer).error(what)
        if isinstance(fault, PassingFault):
            if fault.is_worth_one_retry:
                self._urls.discard(key, url)
            if fault.error_class is ThrottledError:
                self._tally.add(num_throttled=1)
                self._limit.fall(number)
        return fault

    def _ask_info(self, path: str) -> ObjectInfo:
        def attempt() -> ObjectInfo:
            with self._faults_translated(self._name(path)):
                head = self._client.head_object(**self._access.arguments, Key=self._location.key_of(path))
                return ObjectInfo(head["ContentLength"], head.get("ETag", ""))

        return self._run(attempt)

    def _faults_translated(self, what: str) -> AbstractContextManager[None]:
        return faults_translated(what, endpoint=self._endpoint, has_answered=self._has_answered)

    def _name(self, path: str, extent: Extent | None = None) -> str:
        name = f"{self.uri.rstrip('/')}/{path}"
        return f"{name} {extent}" if extent else name
