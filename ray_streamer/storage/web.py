"""How is a web server asked for a checkpoint's files: `https://`, and `http://` inside of a trusted network?

A folder's files are asked for by name: web servers list nothing. Identity is the ETag, or what there is instead (see `identity`).

A server may send a request elsewhere, as the front of a content delivery network does; see `redirects`. Credentials stay with
the host that they were given for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from ray_streamer.errors import AccessError, ObjectMissingError, SettingsError, StorageError
from ray_streamer.storage.expiry import ended_signature
from ray_streamer.storage.http_head import QUERY
from ray_streamer.storage.http_route import is_http_address
from ray_streamer.storage.object_store import ObjectStore, Request, if_match
from ray_streamer.storage.redirects import Redirects
from ray_streamer.storage.refusal import Refusal, skew_of
from ray_streamer.storage.retry import PassingFault
from ray_streamer.storage.signed import Signature
from ray_streamer.storage.trust import ca_file_of_environment
from ray_streamer.units import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import SecretStr

    from ray_streamer.storage.base import StorageSettings
    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.identity import Identity

_PRINTABLE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_BELOW = re.compile(rf"[^?\x00-\x1f\x7f]+(?:\?{QUERY.pattern})?")
# What an address that was good for a while answers when that is over, besides 401 and 403.
_ENDED = frozenset({400, 404, 410})
# Each request for a file asks for that of the same address several times.
_MAX_KNOWN_ORIGINS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WebRefusal(Refusal):
    """See `Refusal`; what the bodies of unknown servers say is not repeated.

    Attributes:
        was_sent_on: Whether another server had named this one, by an address that may have ended.
        hints: What to do about the signature of the address, if it is to blame.
    """

    was_sent_on: bool = False
    hints: tuple[str, ...] = ()

    def error(self, what: str, *, is_object: bool = True) -> StorageError | PassingFault:
        """See `Refusal`."""
        if self.was_sent_on and self.status in _ENDED:
            return PassingFault(
                f"the address that the server gave is no longer good, {what}: {self}",
                error_class=ObjectMissingError if self.status in (404, 410) else StorageError,
                is_worth_one_retry=True,
            )
        return super(WebRefusal, self).error(what, is_object=is_object)

    @property
    def what_is_missing(self) -> str:
        """See `Refusal`."""
        return "file"

    def advice(self, *, is_object: bool) -> list[str]:
        """See `Refusal`."""
        if self.hints:
            return [*self.hints]
        if self.status in (401, 403):
            return [
                "if it is not public set http_authorization, or give a signed address; signed addresses end after a while"
            ]
        if 300 <= self.status < 400:
            return ["it sends the request on, and does not say where"]
        return []

    def __str__(self) -> str:
        return status_text(self.status)


def status_text(status: int) -> str:
    """A status with its words.

    >>> status_text(404)
    'HTTP 404 Not Found'
    """
    known = status in HTTPStatus.__members__.values()
    return f"HTTP {status} {HTTPStatus(status).phrase}" if known else f"HTTP {status}"


class WebStore(ObjectStore):
    """The files below one url; see `ObjectStore`.

    Args:
        uri: The folder.
        root: Where its files are asked for, without a "/" at its end.
        signature: What is sent behind the addresses of its files.
        is_signed_folder: Whether the caller gave the folder with that signature.
        authorization: Header of requests to that server, and to no other; a secret.
        sends_on: Whether the server is known to send requests for large files elsewhere.
        wait_seconds: See `Redirects`.
    """

    endpoint_advice = "is the name of the server right"
    is_public_web = True

    def __init__(
        self,
        uri: str,
        *,
        root: str,
        signature: Signature | None = None,
        is_signed_folder: bool = False,
        authorization: str = "",
        sends_on: bool = False,
        wait_seconds: float,
    ) -> None:
        parts = urlsplit(root)
        self.endpoint = f"{parts.scheme}://{parts.netloc}"
        self.ca_file = ca_file_of_environment("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", endpoint=self.endpoint)
        self._uri = uri.rstrip("/")
        self._root = root
        self._query = f"?{signature.query}" if signature and signature.query else ""
        self._is_signed_folder = is_signed_folder
        self._files = signature.files if signature else {}
        self.keys = tuple(self._files) or None
        self._authorization = {"Authorization": authorization} if authorization else {}
        self._redirects = Redirects(self._uri, are_expected=sends_on, wait_seconds=wait_seconds)

    def object_request(self, path: str, headers: Mapping[str, str], pinned: Identity | None) -> Request:
        """See `ObjectStore`."""
        condition = if_match(pinned)
        noted = self._redirects.url_of(path)
        url = noted or self._own_url(path)
        credentials = self._authorization if origin_of(url) == origin_of(self._root) else {}
        lines = {**headers, **condition, **credentials}
        return Request(url, lines, is_conditional=bool(condition), is_sent_on=noted is not None)

    def discard(self, path: str, request: Request) -> None:
        """See `ObjectStore`."""
        self._redirects.forget(path, request.url)

    def follow(self, path: str, request: Request, answer: HttpAnswer) -> bool:
        """See `ObjectStore`."""
        location = answer.header("location")
        if location:
            self._redirects.note(path, asked=request.url, location=location)
        return bool(location)

    def end(self, path: str, request: Request) -> None:
        """See `ObjectStore`."""
        if not request.is_sent_on:
            self._redirects.end(path)

    def identity_of(self, path: str, request: Request, answer: HttpAnswer, size_bytes: int) -> Identity:
        """See `ObjectStore`."""
        if not request.is_sent_on:
            self._redirects.note_answer(path)
        return super().identity_of(path, request, answer, size_bytes)

    def place_of(self, request: Request) -> str:
        """See `ObjectStore`."""
        scheme, host, port = origin_of(request.url)
        return f"{scheme}://{host}:{port}"

    def refusal_of(self, request: Request, answer: HttpAnswer, body: bytes) -> Refusal:
        """See `ObjectStore`."""
        skew_seconds = skew_of(answer.header("date"))
        is_own = not request.is_sent_on
        return WebRefusal(
            status=answer.status,
            retry_after=answer.header("retry-after"),
            skew_seconds=skew_seconds if answer.status in (401, 403) else 0.0,
            was_sent_on=request.is_sent_on,
            hints=self._hints(request.url, skew_seconds) if is_own and answer.status in (400, 401, 403) else (),
        )

    def listing_request(self, prefix: str, token: str, *, recursive: bool) -> Request:
        """See `ObjectStore`; web servers list nothing."""
        raise AccessError(f"{self._uri}: web servers list no folders, so their files are asked for by name")

    def _hints(self, url: str, skew_seconds: float) -> tuple[str, ...]:
        """What a refused address itself says about the refusal."""
        ended = ended_signature(url, skew_seconds=skew_seconds)
        if ended or not self._is_signed_folder:
            return ended
        return (
            f"the signature was sent for each file of the folder {self._uri}; if it is that of one file, sign an address that ends in "
            ".safetensors, or that says the name by response-content-disposition",
        )

    def _own_url(self, path: str) -> str:
        if not self._files:
            return f"{self._root}/{quote(path, safe='/~')}{self._query}"
        if path not in self._files:
            given = counted(len(self._files), "file")
            raise ObjectMissingError(f"no such file, {self._uri}/{path}: it is not among the {given} that were given")
        below = self._files[path]
        return f"{self._root}/{below}{'' if '?' in below else self._query}"


@lru_cache(_MAX_KNOWN_ORIGINS)
def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a url: to whom credentials belong (RFC 6454)."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]


def open_store(uri: str, settings: StorageSettings) -> WebStore:
    """The store of an `https://` or `http://` uri.

    Raises:
        SettingsError: It names no server, or `http_query` or `http_authorization` cannot be sent.
    """
    if not is_http_address(uri):
        raise SettingsError(f"{uri} names no server; give https://HOST/FOLDER")
    parts, own = urlsplit(uri), Signature.at(uri, settings)
    return WebStore(
        uri,
        root=_sendable(f"{parts.scheme.lower()}://{parts.netloc}{parts.path}".rstrip("/")),
        signature=_signature_at(own, settings),
        is_signed_folder=bool(own.query) and own.uri.rstrip("/") == uri.rstrip("/"),
        # A signature of its own says who asks; stores refuse requests that say it twice.
        authorization=""
        if own.as_setting
        else _usable("http_authorization", _secret(settings.http_authorization), _PRINTABLE),
        wait_seconds=seconds_of_one_head(settings),
    )


def seconds_of_one_head(settings: StorageSettings) -> float:
    """How long it may take until a request is answered, or has failed."""
    return settings.connect_timeout_seconds + settings.first_byte_timeout_seconds


def _signature_at(own: Signature, settings: StorageSettings) -> Signature:
    """What signs the addresses of a folder: its own signature comes before the setting for all."""
    query = _usable("the query of the uri", own.query, QUERY) or _usable(
        "http_query", _secret(settings.http_query).lstrip("?"), QUERY
    )
    files = {name: _sendable(_usable("an address of the list", below, _BELOW)) for name, below in own.files.items()}
    return Signature(own.uri, query, files)


def _secret(secret: SecretStr | None) -> str:
    return secret.get_secret_value().strip() if secret else ""


def _sendable(address: str) -> str:
    """An address as people write it, with everything encoded that has to be."""
    return quote(address, safe="%/:?#[]@!$&'()*+,;=~")


def _usable(name: str, text: str, form: re.Pattern[str]) -> str:
    if text and not form.fullmatch(text):
        raise SettingsError(
            f"{name} (not shown) has characters that cannot be sent; give it as the server's own tools print it"
        )
    return text
