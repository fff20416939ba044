"""How is a bucket of Google Cloud Storage asked: `gs://BUCKET/PREFIX`?

Over the JSON API, whose objects have a generation: a number that no two versions of an object share. It is the identity, and a
condition of every request. google-auth finds who asks (application default credentials), and renews tokens before they end.
Sources: Google Cloud Storage, "JSON API reference", "Request preconditions", "Requester Pays", "Object names and namespaces".
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, urlencode, urlsplit

from ray_streamer.errors import CredentialsError, SettingsError
from ray_streamer.storage.bounded_call import find_credentials
from ray_streamer.storage.extras import missing_extra
from ray_streamer.storage.http_head import VISIBLE
from ray_streamer.storage.http_route import is_http_address
from ray_streamer.storage.identity import Identity
from ray_streamer.storage.listing import MAX_JSON_BYTES, MAX_TOKEN_CHARS, ListingPage
from ray_streamer.storage.object_store import ObjectStore, Request
from ray_streamer.storage.refusal import Refusal, skew_of
from ray_streamer.storage.renewal import Freshness, Renewal
from ray_streamer.storage.trust import ca_file_of_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_streamer.storage.base import StorageSettings
    from ray_streamer.storage.http_connection import HttpAnswer

_ENDPOINT = "https://storage.googleapis.com"
_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_only",)
# Names of 2 KiB, twice as long as any, fit into a page then.
_MAX_RESULTS = 500
_GENERATION = re.compile(r'"?([0-9]{1,20})"?')
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._:-]{1,220}[a-z0-9]")
_SHOWN_PATH = re.compile(r"[^{}\n]{1,500}")
_ANONYMOUS = "anonymous@"
_WHO = (
    "let google-auth know who asks: GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or a service account of "
    "the machine or pod; for a public bucket set gs_unsigned, or give gs://anonymous@BUCKET/PREFIX"
)

_NEEDS = "who asks needs the role Storage Object Viewer, with"


@dataclass(frozen=True, slots=True, kw_only=True)
class GoogleRefusal(Refusal):
    """See `Refusal`."""

    THROTTLE_CODES: ClassVar[frozenset[str]] = frozenset({"rateLimitExceeded", "userRateLimitExceeded", "slowDown"})
    FAILURE_CODES: ClassVar[frozenset[str]] = frozenset({"backendError", "internalError"})

    @classmethod
    def from_answer(cls, answer: HttpAnswer, body: bytes) -> GoogleRefusal:
        """What a raw answer says, with the beginning of its body: JSON, or of an object's bytes plain text."""
        code, message = _said(body)
        secrets = answer.secrets
        return cls(
            status=answer.status,
            code=secrets.clean(code, max_chars=100),
            message=secrets.clean(message).rstrip("."),
            request_id=secrets.clean(answer.header("x-guploader-uploadid"), max_chars=128),
            retry_after=answer.header("retry-after"),
            skew_seconds=skew_of(answer.header("date")),
        )

    @property
    def what_is_missing(self) -> str:
        """See `Refusal`."""
        return "bucket" if "bucket does not exist" in self.message else "object"

    def advice(self, *, is_object: bool) -> list[str]:
        """See `Refusal`."""
        if "requester pays" in self.message.lower() or "user project" in self.message.lower():
            return ["whoever asks pays in this bucket: set gs_user_project to the project that does"]
        if self.status == 401:
            return [_WHO]
        if self.status == 403:
            if is_object:
                return [
                    f"{_NEEDS} storage.objects.get; without storage.objects.list an object that does not exist looks like this, too"
                ]
            return [f"{_NEEDS} storage.objects.list"]
        return []


def _said(body: bytes) -> tuple[str, str]:
    """Reason and sentence of an error."""
    try:
        error: Any = json.loads(body)["error"]
        reasons = [str(each.get("reason", "")) for each in error.get("errors", ())]
        return (reasons or [""])[0], str(error.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = body[:1000].decode("utf-8", "replace")
        return "", "" if "<" in text else text


class GoogleCredentials:
    """Who asks, by google-auth; safe to call from many threads.

    Args:
        timeout_seconds: How long finding or renewing a token may take.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._renewal = Renewal(self._freshness, self._renew)
        self._credentials: Any = None
        self._is_refused = False

    def headers(self) -> dict[str, str]:
        """The headers that say so, with a token that is good for some minutes where it could be renewed.

        Raises:
            CredentialsError: There are no credentials, or none in time.
            SettingsError: google-auth is not installed.
        """
        self._renewal.ensure()
        headers: dict[str, str] = {}
        self._credentials.apply(headers)
        return headers

    def refuse(self, headers: Mapping[str, str]) -> None:
        """The store did not take a request with these headers; get another token, unless there is another one already."""
        with self._renewal.finding.turn():
            said: dict[str, str] = {}
            if self._credentials is not None and _has_token(self._credentials):
                self._credentials.apply(said)
            if said.items() <= headers.items():
                self._is_refused = True

    def _freshness(self) -> Freshness:
        if self._credentials is None or self._is_refused:
            return Freshness.ENDED
        # By google-auth's names.
        return {"FRESH": Freshness.FRESH, "STALE": Freshness.ENDS_SOON}.get(
            self._credentials.token_state.name, Freshness.ENDED
        )

    def _renew(self) -> None:
        try:
            import google.auth
            from google.auth import exceptions
            from google.auth.transport.requests import Request as Transport
        except ImportError as error:
            raise missing_extra("gs:// with credentials", "google-auth", "google") from error

        def find() -> Any:
            found = self._credentials or google.auth.default(scopes=_SCOPES)[0]
            if self._is_refused or not _is_fresh(found):
                found.refresh(Transport())
            if not _has_token(found):
                raise CredentialsError(
                    f"the token endpoint that google-auth asked gave no token that can be sent; {_advice()}"
                )
            return found

        self._credentials = find_credentials(
            "google-auth", find, seconds=self._timeout_seconds, refusals=(exceptions.GoogleAuthError,), advice=_advice()
        )
        self._is_refused = False


def _is_fresh(credentials: Any) -> bool:
    return credentials.token_state.name == "FRESH"


def _has_token(credentials: Any) -> bool:
    return isinstance(credentials.token, str) and bool(VISIBLE.fullmatch(credentials.token))


def _advice() -> str:
    """What to do without credentials, by what the environment says of them."""
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    if not named:
        return _WHO
    # Some give it the content of the file.
    shown = named if _SHOWN_PATH.fullmatch(named) else "what is no path (not shown)"
    if not os.path.exists(named):
        return f"GOOGLE_APPLICATION_CREDENTIALS names {shown}, and there is no such file; set it to the path of one"
    return f"look at {shown}, which GOOGLE_APPLICATION_CREDENTIALS names, and at its token_uri; or {_WHO}"


class GoogleStore(ObjectStore):
    """One prefix of one bucket; see `ObjectStore`.

    Args:
        endpoint: Of the JSON API, without a "/" at its end.
        bucket: Its name.
        prefix: Without a "/" at its end.
        credentials: None to send none.
        user_project: Who pays for requests to requester-pays buckets; empty for the bucket's owner.
    """

    endpoint_advice = "is STORAGE_EMULATOR_HOST right"
    max_page_bytes = MAX_JSON_BYTES

    def __init__(
        self, *, endpoint: str, bucket: str, prefix: str, credentials: GoogleCredentials | None, user_project: str
    ) -> None:
        self.endpoint = endpoint
        self.ca_file = ca_file_of_environment("REQUESTS_CA_BUNDLE", endpoint=self.endpoint)
        self.folder = f"{prefix}/" if prefix else ""
        self._objects = f"{endpoint}/storage/v1/b/{quote(bucket, safe='')}/o"
        self._credentials = credentials
        self._payer = {"userProject": user_project} if user_project else {}

    def object_request(self, path: str, headers: Mapping[str, str], pinned: Identity | None) -> Request:
        """See `ObjectStore`."""
        generation = _GENERATION.fullmatch(pinned.etag) if pinned else None
        condition = {"ifGenerationMatch": generation[1]} if generation else {}
        query = urlencode({"alt": "media", **condition, **self._payer})
        url = f"{self._objects}/{quote(self.folder + path, safe='')}?{query}"
        return Request(url, {**headers, **self._authorization()}, is_conditional=bool(condition))

    def discard(self, path: str, request: Request) -> None:
        """See `ObjectStore`."""
        if self._credentials:
            self._credentials.refuse(request.headers)

    def identity_of(self, path: str, request: Request, answer: HttpAnswer, size_bytes: int) -> Identity:
        """See `ObjectStore`."""
        generation = _GENERATION.fullmatch(answer.header("x-goog-generation"))
        return Identity(f'"{generation[1]}"', size_bytes) if generation else Identity.of_answer(answer, size_bytes)

    def refusal_of(self, request: Request, answer: HttpAnswer, body: bytes) -> GoogleRefusal:
        """See `ObjectStore`."""
        return GoogleRefusal.from_answer(answer, body)

    def listing_request(self, prefix: str, token: str, *, recursive: bool) -> Request:
        """See `ObjectStore`."""
        more = ({} if recursive else {"delimiter": "/"}) | ({"pageToken": token} if token else {})
        query = urlencode(
            {"prefix": prefix, "fields": "items(name),nextPageToken", "maxResults": _MAX_RESULTS, **more, **self._payer}
        )
        return Request(f"{self._objects}?{query}", self._authorization())

    def parse_page(self, answer: HttpAnswer, body: bytes) -> ListingPage:
        """See `ObjectStore`."""
        try:
            page: Any = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("no JSON") from None
        items: Any = page.get("items") if isinstance(page, dict) else 0
        # Emulators write null for no objects.
        items = [] if items is None else items
        if not isinstance(items, list) or not all(
            isinstance(each, dict) and isinstance(each.get("name"), str) for each in items
        ):
            raise ValueError("no list of objects")
        token: Any = page.get("nextPageToken") or ""
        if not isinstance(token, str) or len(token) > MAX_TOKEN_CHARS:
            raise ValueError("there is more, and no usable token that leads there")
        return ListingPage(tuple(each["name"] for each in items), token)

    def _authorization(self) -> dict[str, str]:
        return self._credentials.headers() if self._credentials else {}


def open_store(uri: str, settings: StorageSettings) -> GoogleStore:
    """The store of a `gs://` uri.

    Raises:
        SettingsError: It names no bucket, or STORAGE_EMULATOR_HOST is no address.
    """
    rest = uri.partition("://")[2]
    is_anonymous = settings.gs_unsigned or rest.startswith(_ANONYMOUS)
    bucket, _, prefix = rest.removeprefix(_ANONYMOUS).partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise SettingsError(f"{uri} names no bucket; give gs://BUCKET/PREFIX")
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    endpoint = (emulator if "://" in emulator else f"http://{emulator}") if emulator else _ENDPOINT
    if not is_http_address(endpoint) or "@" in urlsplit(endpoint).netloc:
        raise SettingsError("STORAGE_EMULATOR_HOST is no address; give http://HOST:PORT")
    has_credentials = not is_anonymous and not emulator
    return GoogleStore(
        endpoint=endpoint.rstrip("/"),
        bucket=bucket,
        prefix=prefix.rstrip("/"),
        credentials=GoogleCredentials(timeout_seconds=settings.credentials_timeout_seconds)
        if has_credentials
        else None,
        user_project=settings.gs_user_project or "",
    )
