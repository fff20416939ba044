"""How is an S3 bucket asked?

boto3 finds credentials, endpoint and region, and signs; each object's url is signed once and then used for every range of it.
Listings are signed by their headers. See `s3_client` for boto3, `s3_refusal` for what answers mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.storage.object_store import ObjectStore, Request, if_match
from ray_streamer.storage.s3_client import SignedUrls, open_access
from ray_streamer.storage.s3_faults import sdk_faults_translated
from ray_streamer.storage.s3_listing import parse_page
from ray_streamer.storage.s3_refusal import S3Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from ray_streamer.storage.base import StorageSettings
    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.identity import Identity
    from ray_streamer.storage.listing import ListingPage


class S3Store(ObjectStore):
    """One prefix of one bucket; see `ObjectStore`."""

    endpoint_advice = "is s3_endpoint_url right"
    ca_advice = "set s3_ca_bundle"

    def __init__(self, uri: str, settings: StorageSettings) -> None:
        access = open_access(uri, settings)
        self._access = access
        self._location = access.location
        self._urls = SignedUrls(access.sign, in_a_session=access.location.is_directory_bucket)
        self.ca_file = access.ca_file
        self.endpoint = access.endpoint
        self.folder = access.location.key_of("")

    def object_request(self, path: str, headers: Mapping[str, str], pinned: Identity | None) -> Request:
        """See `ObjectStore`."""
        condition = if_match(pinned)
        url = self._urls.url_of(self._location.key_of(path))
        return Request(url, {**headers, **condition, **self._access.headers}, is_conditional=bool(condition))

    def discard(self, path: str, request: Request) -> None:
        """See `ObjectStore`."""
        self._urls.discard(self._location.key_of(path), request.url)

    def refusal_of(self, request: Request, answer: HttpAnswer, body: bytes) -> S3Refusal:
        """See `ObjectStore`."""
        return S3Refusal.from_answer(answer, body)

    def listable(self, prefix: str) -> str:
        """See `ObjectStore`."""
        return self._location.listable(prefix)

    def listing_request(self, prefix: str, token: str, *, recursive: bool) -> Request:
        """See `ObjectStore`."""
        return self._access.sign_listing(prefix, token, recursive=recursive)

    def parse_page(self, answer: HttpAnswer, body: bytes) -> ListingPage:
        """See `ObjectStore`."""
        return parse_page(body)

    def faults_translated(self, what: str, *, has_answered: bool) -> AbstractContextManager[None]:
        """See `ObjectStore`."""
        return sdk_faults_translated(what, endpoint=self.endpoint, has_answered=has_answered)

    def close(self) -> None:
        """See `ObjectStore`."""
        self._access.client.close()


def open_store(uri: str, settings: StorageSettings) -> S3Store:
    """The store of an `s3://` uri; see `open_access` for its errors."""
    return S3Store(uri, settings)
