"""How are objects of an S3 bucket read?

boto3 finds credentials, endpoint and region, and signs; each object's url is signed once and then used for every range of
it. All answers come over our own connections (see `http_client`), bodies into the caller's buffer. Each request is pinned
by `If-Match` to the object that the index saw, and each answer compared with it (see `s3_identity`). A body that broke
goes on at the byte where it broke.
"""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from ray_streamer.errors import ObjectChangedError, ShortReadError, StorageError, ThrottledError
from ray_streamer.extent import Extent
from ray_streamer.storage.base import ObjectInfo, RemoteStorage, check_buffer, ignore
from ray_streamer.storage.http_client import HttpClient
from ray_streamer.storage.lateness import LateBodyError
from ray_streamer.storage.request_limit import RequestLimit
from ray_streamer.storage.retry import PassingFault, Patience
from ray_streamer.storage.s3_answer import check_extent, content_range_of, faults_translated, refuse_encoded
from ray_streamer.storage.s3_client import SignedRequest, SignedUrls, open_access
from ray_streamer.storage.s3_identity import Identity
from ray_streamer.storage.s3_landing import Landing
from ray_streamer.storage.s3_listing import MAX_PAGE_BYTES, ListingPage, list_keys
from ray_streamer.storage.s3_refusal import MAX_ERROR_BYTES, Refusal
from ray_streamer.storage.tally import Tally
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from ray_streamer.storage.base import OnFirstByte, StorageSettings, StorageStatistics
    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.s3_answer import ContentRange

_Result = TypeVar("_Result")
_FIRST_BYTE = Extent(0, 1)

_logger = logging.getLogger(__name__)


class _ConditionRefusedError(Exception):
    """The store says that `If-Match` does not hold, or that it does not know it.

    Attributes:
        error: What it becomes if that is true.
    """

    def __init__(self, error: StorageError) -> None:
        super().__init__(str(error))
        self.error = error


class S3Storage(RemoteStorage):
    """Objects below one prefix of one bucket."""

    def __init__(self, uri: str, settings: StorageSettings) -> None:
        self.uri = uri
        access = open_access(uri, settings)
        self._access = access
        self._location = access.location
        self._deadline_seconds = settings.retry_deadline_seconds
        self._list_timeout_seconds = settings.list_timeout_seconds
        self._urls = SignedUrls(access.sign, in_a_session=access.location.is_directory_bucket)
        self._tally = Tally()
        self._http = HttpClient(settings, ca_file=access.ca_file, tally=self._tally)
        self._limit = RequestLimit(settings.concurrency)
        self._has_answered = False
        self._sends_conditions = True
        self._sizes: dict[tuple[str, str], int] = {}  # by path and ETag, which does not tell them
        self._warned: set[str] = set()
        self._closing = threading.Event()

    def size_and_etag(self, path: str) -> ObjectInfo:
        """See `Storage`; asks for one byte, because the errors of a HEAD have no body that names the cause."""
        return self.read_head(path, 1)[1]

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        """See `Storage`."""
        landing = Landing(path, Extent(0, max(1, max_bytes)))
        try:
            self._run(lambda: self._land(landing))
            head, identity = bytes(landing.view[:max_bytes]), landing.identity
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
            identity = replace(identity, size_bytes=self._sizes.get((path, etag)))
        landing = Landing(path, extent, buffer.cast("B"), identity, on_first_byte=on_first_byte)
        self._run(lambda: self._land(landing))

    def list(self, prefix: str = "", *, recursive: bool = False) -> list[str]:
        """See `Storage`; empty for a prefix that does not exist."""
        folder, listed = self._location.key_of(""), self._location.listable(prefix)
        keys = list_keys(
            lambda token: self._run(lambda: self._list_page(listed, token, recursive=recursive)),
            what=f"listing {self.uri}",
            timeout_seconds=self._list_timeout_seconds,
        )
        paths = {key.removeprefix(folder) for key in keys if key.startswith(folder)}
        # A key that ends with "/" stands for a folder in the consoles of object stores; some servers list below folders.
        found = [path for path in paths if path > prefix and path.startswith(prefix) and not path.endswith("/")]
        return sorted(path for path in found if recursive or "/" not in path[len(prefix) :])

    def statistics(self) -> StorageStatistics:
        """See `Storage`."""
        return self._tally.statistics()

    def close(self) -> None:
        """See `Storage`; reads in flight end with `StorageError`."""
        self._closing.set()
        self._limit.close()
        self._http.close()
        self._access.client.close()

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

    def _land(self, landing: Landing) -> None:
        """One attempt to bring what is missing of an extent; what a broken body has brought stays."""
        try:
            self._land_once(landing)
        except _ConditionRefusedError as refused:
            self._look_again(landing, refused.error)
            self._land_once(landing)

    def _land_once(self, landing: Landing) -> None:
        rest = landing.rest
        if not rest.num_bytes:
            # Nothing was asked for, or the fault came after the last byte.
            return
        with self._answer(landing.path, rest, expected=landing.identity) as (answer, given, identity):
            self._pin_size(landing, identity)
            landing.begin(given, identity, what=self._name(landing.path))
            try:
                self._http.receive_into(answer, landing.view[landing.num_landed :])
            finally:
                landing.num_landed += answer.num_received
            if answer.is_too_long:
                raise StorageError(
                    f"{self._name(landing.path, rest)}: the body is longer than the {exact_bytes(given.extent.num_bytes)} of its "
                    "Content-Range"
                )
        if landing.rest.num_bytes:
            raise PassingFault(f"the body of {self._name(landing.path, rest)} ended at byte {landing.rest.start}")

    def _pin_size(self, landing: Landing, identity: Identity) -> None:
        """All answers about one version tell one size, that of the first; an ETag alone does not say which."""
        expected = landing.identity
        if expected and expected.is_exact and expected.size_bytes is None:
            size_bytes = self._sizes.setdefault((landing.path, expected.etag), given_size := identity.size_bytes or 0)
            if size_bytes != given_size:
                raise ObjectChangedError(
                    f"{self._name(landing.path)} has {exact_bytes(given_size)} now, not {exact_bytes(size_bytes)}"
                )

    def _look_again(self, landing: Landing, refused: StorageError) -> None:
        """Ask without a condition which object is there, and send no more conditions if it is the expected one.

        Raises:
            ObjectChangedError: It is another object.
        """
        expected = landing.identity
        try:
            with self._answer(landing.path, _FIRST_BYTE, expected=None) as (answer, _, now):
                self._http.receive_into(answer, memoryview(bytearray(1)))
                difference = answer.secrets.clean(expected.difference(now)) if expected else ""
        except ShortReadError:
            difference = "the object is empty"
        if difference:
            raise ObjectChangedError(f"{refused}; the store says now: {difference}")
        self._sends_conditions = False
        self._warn(
            "condition",
            f"{self._name(landing.path)}: the store refuses If-Match with the ETag that it gives; conditions are no longer "
            "sent, and the ETag of every answer is compared",
        )

    def _list_page(self, prefix: str, token: str, *, recursive: bool) -> ListingPage:
        what = f"listing {self.uri}"
        with self._faults_translated(what):
            request = self._access.sign_listing(prefix, token, recursive=recursive)
        with self._asked(what, request, is_object=False) as answer:
            refuse_encoded(answer, what=what)
            page = memoryview(
                bytearray(min(MAX_PAGE_BYTES, MAX_PAGE_BYTES if answer.length is None else answer.length))
            )
            self._http.receive_into(answer, page)
            if answer.num_received < (answer.length or 0) <= len(page):
                raise PassingFault(f"{what}: the body ended at byte {answer.num_received} of {answer.length}")
            try:
                return ListingPage.parse(bytes(page[: answer.num_received]))
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
        if expected and expected.condition and self._sends_conditions:
            headers["If-Match"] = expected.condition
        with self._get(path, what, headers) as answer:
            given = content_range_of(answer, what=what)
            identity = Identity.of_answer(answer, given.size_bytes)
            difference = expected.difference(identity) if expected else ""
            if difference:
                raise ObjectChangedError(
                    f"{what}: the object is not the one that the index saw: {answer.secrets.clean(difference)}"
                )
            check_extent(answer, given, asked=asked, what=what)
            if answer.secrets.are_in(identity.etag):
                identity = replace(identity, etag="")
            yield answer, given, identity

    def _identity_of_empty(self, path: str) -> Identity:
        """Of an object without bytes, which can be asked for as a whole only."""
        what = self._name(path)
        with self._get(path, what, {}) as answer:
            self._http.receive_into(answer, memoryview(bytearray(1)))
            if answer.length or answer.num_received:
                raise StorageError(f"{what}: the store refuses to give the first byte of an object that has some")
            return Identity.of_answer(answer, 0)

    @contextmanager
    def _get(self, path: str, what: str, headers: dict[str, str]) -> Iterator[HttpAnswer]:
        """The answer to one GET of an object; its status was success."""
        key = self._location.key_of(path)
        with self._faults_translated(what):
            url = self._urls.url_of(key)
        try:
            with self._asked(what, SignedRequest(url, {**headers, **self._access.headers})) as answer:
                yield answer
        except PassingFault as fault:
            if fault.is_worth_one_retry:
                self._urls.discard(key, url)
            raise

    @contextmanager
    def _asked(self, what: str, request: SignedRequest, *, is_object: bool = True) -> Iterator[HttpAnswer]:
        """The answer to one request, when its turn has come and if its status was success."""
        with (
            self._limit.admit() as number,
            self._faults_translated(what),
            self._http.get(request.url, request.headers) as answer,
        ):
            self._has_answered = True
            if answer.status not in (200, 206):
                raise self._refusal(answer, what, request, number=number, is_object=is_object)
            self._limit.climb()
            yield answer

    def _refusal(
        self, answer: HttpAnswer, what: str, request: SignedRequest, *, number: int, is_object: bool
    ) -> Exception:
        """The exception to raise for an answer, with what it means for later requests."""
        refusal = Refusal.from_answer(answer, self._http.read(answer, MAX_ERROR_BYTES))
        fault = refusal.error(what, is_object=is_object)
        if answer.status in (412, 501) and "If-Match" in request.headers and isinstance(fault, StorageError):
            return _ConditionRefusedError(fault)
        if isinstance(fault, PassingFault) and fault.error_class is ThrottledError:
            self._tally.add(num_throttled=1)
            self._limit.fall(number)
        return fault

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

    def _faults_translated(self, what: str) -> AbstractContextManager[None]:
        return faults_translated(what, endpoint=self._access.endpoint, has_answered=self._has_answered)

    def _name(self, path: str, extent: Extent | None = None) -> str:
        name = f"{self.uri.rstrip('/')}/{path}"
        return f"{name} {extent}" if extent else name
