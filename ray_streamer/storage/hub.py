"""How is a repository of the Hugging Face Hub asked: `hf://ORG/MODEL[@REVISION]`?

huggingface_hub reads the uri, and knows the Hub's address (`HF_ENDPOINT`) and who asks (`HF_TOKEN`, or `hf auth login`). Files are
asked for at the Hub, which sends large ones on to its content delivery network, by addresses that end after a while (see `web`).

A revision is a commit from the first answer on, so that all files are of one (see `hub_commit`). Identity is the hash of the content that
the Hub tells: what a network for delivery calls a file may differ from place to place. What that network calls it is compared besides, as
long as one address lasts.
Source: huggingface_hub 2.4, `get_hf_file_metadata`, `list_repo_tree`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from ray_streamer.errors import ObjectChangedError, SettingsError
from ray_streamer.storage.bounded_call import OneAtATime
from ray_streamer.storage.extras import missing_extra
from ray_streamer.storage.hub_account import find_token, usable_endpoint
from ray_streamer.storage.hub_commit import PinnedCommit
from ray_streamer.storage.hub_refusal import HubRefusal
from ray_streamer.storage.identity import Identity
from ray_streamer.storage.listing import MAX_JSON_BYTES, MAX_TOKEN_CHARS, ListingPage
from ray_streamer.storage.object_store import Request
from ray_streamer.storage.redaction import NO_SECRETS
from ray_streamer.storage.redirects import safe_target
from ray_streamer.storage.refusal import skew_of
from ray_streamer.storage.web import WebStore, origin_of, seconds_of_one_head
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_streamer.storage.base import StorageSettings
    from ray_streamer.storage.http_connection import HttpAnswer

_NEXT = re.compile(r'<([^<>]*)>;\s*rel="?next"?')
_RESET = re.compile(r"\bt=(\d{1,6})\b")
_ETAG = re.compile(r'(?:W/)?"?([!#-~]+?)"?')


class _Linked(NamedTuple):
    """What the Hub says of a file that it sends on.

    Attributes:
        etag: Made from the content's hash.
        size_bytes: None when it does not say.
    """

    etag: str
    size_bytes: int | None


class HubStore(WebStore):
    """A folder of one revision of one repository; see `ObjectStore`.

    Args:
        uri: As given.
        endpoint: The Hub's address, without a "/" at its end.
        repository: ORG/MODEL.
        revision: A branch, tag or commit.
        folder: In the repository, without a "/" at its end; empty for all of it.
        token: Who asks, a secret; empty for whom huggingface_hub finds.
        timeout_seconds: How long huggingface_hub may take to find a token, which it may have to renew.
        wait_seconds: See `Redirects` and `PinnedCommit`.
    """

    endpoint_advice = "is HF_ENDPOINT right"
    max_page_bytes = MAX_JSON_BYTES

    def __init__(
        self,
        uri: str,
        *,
        endpoint: str,
        repository: str,
        revision: str,
        folder: str,
        token: str,
        timeout_seconds: float,
        wait_seconds: float,
    ) -> None:
        super().__init__(uri, root=endpoint, sends_on=True, wait_seconds=wait_seconds)
        self.folder = f"{folder}/" if folder else ""
        self._repository = repository
        self._timeout_seconds = timeout_seconds
        self._commit = PinnedCommit(uri, revision, wait_seconds=wait_seconds)
        self._finding = OneAtATime()
        self._given_token = token
        self._token: str | None = None
        self._has_asked_for_token = False
        self._linked: dict[str, _Linked] = {}
        # By address, what the network for delivery calls its file.
        self._etags_there: dict[str, str] = {}

    def object_request(self, path: str, headers: Mapping[str, str], pinned: Identity | None) -> Request:
        """See `ObjectStore`."""
        self._authorize()
        self._commit.take_turn()
        request = super().object_request(path, headers, None)
        there = Identity(self._etags_there.get(request.url, "")).condition if pinned else ""
        if not there:
            return request
        return replace(request, headers={**request.headers, "If-Match": there}, is_conditional=True)

    def discard(self, path: str, request: Request) -> None:
        """See `ObjectStore`."""
        super().discard(path, request)
        with self._finding.turn():
            # Servers that the Hub names are told nothing, and others of its threads may have found another token already.
            said = request.headers.get("Authorization")
            if self._is_own(request.url) and said == self._authorization.get("Authorization"):
                self._has_asked_for_token = False

    def follow(self, path: str, request: Request, answer: HttpAnswer) -> bool:
        """See `ObjectStore`."""
        etag = _content_etag(answer.header("x-linked-etag"))
        # Of a repository that was renamed the Hub says first where that is now, and nothing of the file.
        self._note_commit(answer, has_files=bool(etag))
        if not super().follow(path, request, answer):
            return False
        if etag:
            size = answer.header("x-linked-size")
            self._linked[path] = _Linked(etag, int(size) if size.isdecimal() and len(size) < 19 else None)
        return True

    def identity_of(self, path: str, request: Request, answer: HttpAnswer, size_bytes: int) -> Identity:
        """See `ObjectStore`."""
        self._note_commit(answer, has_files=True)
        found = super().identity_of(path, request, answer, size_bytes)
        linked = self._linked.get(path)
        if self._is_own(request.url):
            # A weak ETag of a mirror's own promises nothing about bytes.
            etag = _content_etag(answer.header("x-linked-etag") or (found.etag if found.is_exact else ""))
            return Identity(etag, size_bytes) if etag else found
        if found.is_exact and self._etags_there.setdefault(request.url, found.etag) != found.etag:
            raise ObjectChangedError(f"{self._uri}/{path}: the file behind one address of the Hub became another one")
        if linked is None:
            return found
        if linked.size_bytes not in (None, size_bytes):
            raise ObjectChangedError(
                f"{self._uri}/{path}: the Hub's content delivery network has {exact_bytes(size_bytes)}, and the Hub "
                f"says {exact_bytes(linked.size_bytes)}"
            )
        return Identity(linked.etag, size_bytes)

    def end(self, path: str, request: Request) -> None:
        """See `ObjectStore`."""
        super().end(path, request)
        self._commit.end()

    def end_page(self) -> None:
        """See `ObjectStore`."""
        self._commit.end()

    def refusal_of(self, request: Request, answer: HttpAnswer, body: bytes) -> HubRefusal:
        """See `ObjectStore`."""
        self._note_commit(answer, has_files=False)
        reset = _RESET.search(answer.header("ratelimit"))
        return HubRefusal(
            status=answer.status,
            code=answer.secrets.clean(answer.header("x-error-code"), max_chars=64),
            message=answer.secrets.clean(answer.header("x-error-message")).rstrip("."),
            retry_after=answer.header("retry-after") or (reset[1] if reset else ""),
            skew_seconds=skew_of(answer.header("date")) if answer.status in (401, 403) else 0.0,
            was_sent_on=request.is_sent_on and not self._is_own(request.url),
            repository=self._repository,
            page=f"{self._root}/{self._repository}",
            has_token=self._token is not None,
        )

    def listing_request(self, prefix: str, token: str, *, recursive: bool) -> Request:
        """See `ObjectStore`; the Hub lists folders."""
        self._authorize()
        self._commit.take_turn()
        folder = quote(prefix.rpartition("/")[0], safe="")
        query = urlencode({"recursive": str(recursive).lower(), **({"cursor": token} if token else {})})
        address = f"{self._root}/api/models/{self._repository}/tree/{self._revision}"
        return Request(f"{address}/{folder}?{query}" if folder else f"{address}?{query}", self._authorization)

    def follow_page(self, request: Request, answer: HttpAnswer, what: str) -> Request | None:
        """See `ObjectStore`; the Hub sends listings on of repositories that were renamed."""
        location = answer.header("location")
        if not location:
            return None
        url = safe_target(what, asked=request.url, location=location)
        return Request(url, self._authorization if self._is_own(url) else {}, is_sent_on=True)

    def parse_page(self, answer: HttpAnswer, body: bytes) -> ListingPage:
        """See `ObjectStore`."""
        self._note_commit(answer, has_files=False)
        try:
            entries: Any = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("no JSON") from None
        if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
            raise ValueError("no list of files")
        keys = tuple(entry["path"] for entry in entries if entry["type"] == "file")
        return ListingPage(keys, _cursor(answer.header("link")))

    def _own_url(self, path: str) -> str:
        return f"{self._root}/{self._repository}/resolve/{self._revision}/{quote(self.folder + path, safe='/~')}"

    @property
    def _revision(self) -> str:
        return quote(self._commit.revision, safe="")

    def _is_own(self, url: str) -> bool:
        return origin_of(url) == origin_of(self._root)

    def _note_commit(self, answer: HttpAnswer, *, has_files: bool) -> None:
        if self._commit.note(answer.header("x-repo-commit"), has_files=has_files):
            # Addresses that name the branch, as those of a repository that was renamed.
            self._redirects.forget_all()

    def _authorize(self) -> None:
        """Find who asks, once, and again after a refusal."""
        with self._finding.turn():
            if self._has_asked_for_token:
                return
            self._token = find_token(self._given_token, timeout_seconds=self._timeout_seconds)
            self._has_asked_for_token = True
            self._authorization = {"Authorization": f"Bearer {self._token}"} if self._token else {}


def _content_etag(header: str) -> str:
    """A strong ETag: the Hub's are hashes of the content, whatever a proxy made of the form of `X-Linked-Etag`."""
    match = _ETAG.fullmatch(header)
    return f'"{match[1]}"' if match and match[1] != "*" else ""


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("path"), str) and isinstance(entry.get("type"), str)


def _cursor(link: str) -> str:
    """Where a listing goes on, by its header Link (RFC 8288)."""
    match = _NEXT.search(link)
    if match is None:
        return ""
    cursor = parse_qs(urlsplit(match[1]).query).get("cursor", [""])[0]
    if not 0 < len(cursor) <= MAX_TOKEN_CHARS:
        raise ValueError("there is more, and no usable cursor that leads there")
    return cursor


def open_store(uri: str, settings: StorageSettings) -> HubStore:
    """The store of an `hf://` uri.

    Raises:
        SettingsError: huggingface_hub is not installed, cannot use its variables, is told to stay offline, or the uri names no model.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import HfUriError
        from huggingface_hub.utils import parse_hf_uri
    except ImportError as error:
        raise missing_extra("hf://", "huggingface_hub", "hub") from error
    except ValueError as error:
        # It reads its variables when it is imported, the address of the Hub among them.
        usable_endpoint(os.environ.get("HF_ENDPOINT", ""))
        raise SettingsError(
            f"huggingface_hub cannot be imported: {NO_SECRETS.clean(str(error))}; look at the variables HF_HUB_..., whose "
            "timeouts are whole seconds"
        ) from None
    endpoint = usable_endpoint(constants.ENDPOINT)
    try:
        parsed = parse_hf_uri(f"hf://{uri.partition('://')[2].rstrip('/')}")
    except HfUriError as error:
        reason = NO_SECRETS.clean(str(error.args[-1] if error.args else error))
        raise SettingsError(f"{uri} names no model of the Hub; give hf://ORG/MODEL[@REVISION]: {reason}") from None
    if parsed.type != "model":
        raise SettingsError(f"{uri} is a {parsed.type} of the Hub; give a model, hf://ORG/MODEL[@REVISION]")
    if constants.is_offline_mode():
        raise SettingsError(
            f"{uri}: HF_HUB_OFFLINE is set, and hf:// reads from the Hub; {_in_the_cache(parsed.id, parsed.revision)}"
        )
    return HubStore(
        uri,
        endpoint=endpoint,
        repository=parsed.id,
        revision=parsed.revision or constants.DEFAULT_REVISION,
        folder=parsed.path_in_repo.strip("/"),
        token=settings.hf_token.get_secret_value() if settings.hf_token else "",
        timeout_seconds=settings.credentials_timeout_seconds,
        wait_seconds=seconds_of_one_head(settings),
    )


def _in_the_cache(repository: str, revision: str | None) -> str:
    """What to do offline: a snapshot in huggingface_hub's cache is a folder like any other."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repository, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return (
            f"unset it, or fetch the model where there is a network by `hf download {repository}`, and give the folder"
        )
    return f"unset it, or give the folder of its cache, {folder}"
