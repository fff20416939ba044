"""How is a container of Azure Blob Storage asked: `az://CONTAINER/PREFIX`, `abfss://`, or the https address of an account?

Who asks is found where Azure's own tools and Run:ai's streamer look: a connection string, a SAS token, an account's key, and else
azure-identity's chain of credentials. Keys sign each request (see `azure_key`), a SAS token is part of each address, and tokens of
azure-identity are renewed before they end. Identity is the ETag, which each request names.
Sources: Azure Storage REST API, "Get Blob", "List Blobs", "Common REST API error codes", "Specifying conditional headers"; Azure Storage,
"Configure connection strings".
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from ray_streamer.errors import AccessError, SettingsError, StorageError
from ray_streamer.storage.azure_key import AccountKey
from ray_streamer.storage.azure_listing import parse_page
from ray_streamer.storage.bounded_call import find_credentials
from ray_streamer.storage.extras import missing_extra
from ray_streamer.storage.http_route import is_http_address
from ray_streamer.storage.object_store import ObjectStore, Request, if_match
from ray_streamer.storage.refusal import Refusal, skew_of, xml_element

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_streamer.storage.base import StorageSettings
    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.identity import Identity
    from ray_streamer.storage.listing import ListingPage
    from ray_streamer.storage.retry import PassingFault

_VERSION = "2023-11-03"
_SCOPE = "https://storage.azure.com/.default"
# A token that ends sooner is renewed, as azure-core does.
_RENEWED_BEFORE_SECONDS = 300
_CONTAINER = re.compile(r"\$root|\$web|[a-z0-9](?:-?[a-z0-9]){2,62}")
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_HOST = re.compile(r"([a-z0-9]{3,24})(?:\.z[0-9]+)?\.(?:blob|dfs)\.[a-z0-9.-]+(?::[0-9]+)?", re.IGNORECASE)
_SAS = re.compile(r"[!$-;=?-Z_a-z~]+")
# The account of every Azurite, which Azure documents with its key.
_EMULATOR = (
    "AccountName=devstoreaccount1;BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1;"
    "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
_WHO = (
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_ACCOUNT_KEY; or let azure-identity know: `az login`, "
    "AZURE_CLIENT_ID and its companions, or an identity of the machine or pod"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureRefusal(Refusal):
    """See `Refusal`."""

    THROTTLE_CODES: ClassVar[frozenset[str]] = frozenset({"ServerBusy", "TooManyRequests", "EgressIsOverAccountLimit"})
    FAILURE_CODES: ClassVar[frozenset[str]] = frozenset({"InternalError", "OperationTimedOut"})

    @classmethod
    def from_answer(cls, answer: HttpAnswer, body: bytes) -> AzureRefusal:
        """What a raw answer says, with the beginning of its body."""
        text, secrets = body.decode("utf-8", "replace"), answer.secrets
        code = secrets.clean(answer.header("x-ms-error-code"), max_chars=100)
        # It goes on with the request's id and time.
        message = xml_element(text, "Message", secrets, r".+")
        return cls(
            status=answer.status,
            code=code or xml_element(text, "Code", secrets, r"[\w.-]{1,100}"),
            message=message.partition(" RequestId:")[0].rstrip("."),
            request_id=secrets.clean(answer.header("x-ms-request-id"), max_chars=128),
            retry_after=answer.header("retry-after"),
            skew_seconds=skew_of(answer.header("date")) if answer.status in (401, 403) else 0.0,
        )

    def error(self, what: str, *, is_object: bool = True) -> StorageError | PassingFault:
        """See `Refusal`."""
        if self.code == "PublicAccessNotPermitted":
            return AccessError(f"access refused, {what}: {self}; {_WHO}")
        return super(AzureRefusal, self).error(what, is_object=is_object)

    @property
    def what_is_missing(self) -> str:
        """See `Refusal`."""
        return {"ContainerNotFound": "container", "ResourceNotFound": "container or blob"}.get(self.code, "blob")

    def advice(self, *, is_object: bool) -> list[str]:
        """See `Refusal`."""
        if self.code in ("AuthorizationPermissionMismatch", "AuthorizationFailure", "InsufficientAccountPermissions"):
            return ["who asks needs the role Storage Blob Data Reader, or a SAS token with the permissions r and l"]
        if self.code == "BlobArchived":
            return ["the blob is archived; rehydrate it, or copy it to another access tier"]
        return [_WHO] if self.status in (401, 403) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureAccount:
    """An account, and who asks there; at most one of key, SAS token and `is_anonymous`, else azure-identity is asked.

    Attributes:
        name: Of the account.
        endpoint: Of its blobs, without a "/" at its end.
        key: A secret.
        sas_token: A secret, without a "?" before it.
        is_anonymous: Whether nobody asks.
    """

    name: str
    endpoint: str
    key: AccountKey | None = field(default=None, repr=False)
    sas_token: str = field(default="", repr=False)
    is_anonymous: bool = False


class AzureTokens:
    """Who asks, by azure-identity; safe to call from many threads.

    Args:
        timeout_seconds: How long finding or renewing a token may take.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._credential: Any = None
        self._token: str | None = None
        self._is_refused = False
        self._renew_at = 0.0

    def token(self) -> str:
        """A token that is good for some minutes.

        Raises:
            AccessError: There are no credentials, or none in time.
            SettingsError: azure-identity is not installed.
        """
        with self._lock:
            if self._token is None or time.time() >= self._renew_at:
                self._renew()
            return self._token or ""

    def refuse(self, authorization: str) -> None:
        """The store did not take a request with this header; get another token, unless there is another one already."""
        with self._lock:
            if authorization == f"Bearer {self._token}":
                self._token, self._is_refused = None, True

    def _renew(self) -> None:
        try:
            from azure.core.exceptions import AzureError
            from azure.identity import DefaultAzureCredential
        except ImportError as error:
            raise missing_extra("Azure without a key or SAS token", "azure-identity", "azure") from error

        def find() -> Any:
            if self._credential and self._is_refused:
                # It remembers its token until shortly before the end.
                self._credential.close()
                self._credential = None
            self._credential = self._credential or DefaultAzureCredential()
            return self._credential.get_token(_SCOPE)

        found = find_credentials(
            "azure-identity", find, seconds=self._timeout_seconds, refusals=(AzureError,), advice=_WHO
        )
        self._token, self._is_refused = found.token, False
        self._renew_at = found.expires_on - _RENEWED_BEFORE_SECONDS


class AzureStore(ObjectStore):
    """One prefix of one container; see `ObjectStore`.

    Args:
        account: Where it is, and who asks.
        container: Its name.
        prefix: Without a "/" at its end.
        timeout_seconds: How long azure-identity may look for a token.
    """

    endpoint_advice = "is the name of the account right"

    def __init__(self, account: AzureAccount, *, container: str, prefix: str, timeout_seconds: float) -> None:
        self.endpoint = account.endpoint
        self.ca_file = os.environ.get("REQUESTS_CA_BUNDLE") or ""
        self.folder = f"{prefix}/" if prefix else ""
        self._account = account
        self._container = f"{account.endpoint}/{quote(container, safe='$')}"
        needs_tokens = not (account.key or account.sas_token or account.is_anonymous)
        self._tokens = AzureTokens(timeout_seconds=timeout_seconds) if needs_tokens else None

    def object_request(self, path: str, headers: Mapping[str, str], pinned: Identity | None) -> Request:
        """See `ObjectStore`."""
        condition = if_match(pinned)
        url = f"{self._container}/{quote(self.folder + path, safe='/~')}"
        return self._authorized(url, {}, {**headers, **condition}, is_conditional=bool(condition))

    def discard(self, path: str, request: Request) -> None:
        """See `ObjectStore`."""
        if self._tokens:
            self._tokens.refuse(request.headers.get("Authorization", ""))

    def refusal_of(self, request: Request, answer: HttpAnswer, body: bytes) -> AzureRefusal:
        """See `ObjectStore`."""
        return AzureRefusal.from_answer(answer, body)

    def listing_request(self, prefix: str, token: str, *, recursive: bool) -> Request:
        """See `ObjectStore`."""
        more = ({} if recursive else {"delimiter": "/"}) | ({"marker": token} if token else {})
        return self._authorized(self._container, {"restype": "container", "comp": "list", "prefix": prefix, **more}, {})

    def parse_page(self, answer: HttpAnswer, body: bytes) -> ListingPage:
        """See `ObjectStore`."""
        return parse_page(body)

    def _authorized(
        self, url: str, query: Mapping[str, str], headers: Mapping[str, str], *, is_conditional: bool = False
    ) -> Request:
        account, text = self._account, urlencode(query, quote_via=quote)
        lines = {**headers, "x-ms-version": _VERSION, "x-ms-date": formatdate(usegmt=True)}
        if account.key:
            lines["Authorization"] = account.key.sign(urlsplit(url).path, query, lines)
        elif self._tokens:
            lines["Authorization"] = f"Bearer {self._tokens.token()}"
        text = "&".join(filter(None, (text, account.sas_token)))
        return Request(f"{url}?{text}" if text else url, lines, is_conditional=is_conditional)


def open_store(uri: str, settings: StorageSettings) -> AzureStore:
    """The store of an `az://`, `abfss://` or https uri of an account.

    Raises:
        SettingsError: It names no container, nothing names an account, or what the environment says cannot be used.
    """
    scheme, _, rest = uri.partition("://")
    authority, _, path = rest.partition("/")
    host = ""
    if scheme.lower() in ("https", "http"):
        host, (container, _, prefix) = authority, path.partition("/")
    elif "@" in authority:
        container, _, host = authority.partition("@")
        prefix = path
    else:
        container, prefix = authority, path
    if not _CONTAINER.fullmatch(container):
        raise SettingsError(
            f"{uri} names no container; give az://CONTAINER/PREFIX, or abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX"
        )
    account = account_of(uri, host, is_anonymous=settings.azure_unsigned)
    return AzureStore(
        account,
        container=container,
        prefix=prefix.strip("/"),
        timeout_seconds=settings.s3_credentials_timeout_seconds,
    )


def account_of(uri: str, host: str, *, is_anonymous: bool) -> AzureAccount:
    """The account that a uri's host names, else the environment, with what the environment says of who asks.

    Raises:
        SettingsError: Nothing names an account, or what is said cannot be used.
    """
    said = _connection_string()
    named = _HOST.fullmatch(host)
    if host and not named:
        raise SettingsError(f"{uri}: {host} is no account of Azure; give ACCOUNT.blob.core.windows.net")
    name = (named[1].lower() if named else "") or said.get("accountname") or _variable("ACCOUNT_NAME", "ACCOUNT")
    if not name or not _ACCOUNT.fullmatch(name):
        raise SettingsError(
            f"{uri} names no storage account; set AZURE_STORAGE_ACCOUNT_NAME, or give "
            "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX"
        )
    # What a connection string says is of its own account only.
    said = said if said.get("accountname", name) == name else {}
    endpoint = said.get("blobendpoint") or _endpoint_of(host, name, said)
    sas_token = (said.get("sharedaccesssignature") or _variable("SAS_TOKEN")).lstrip("?")
    key = said.get("accountkey") or _variable("ACCOUNT_KEY", "KEY")
    endpoint = endpoint.rstrip("/")
    _refuse_unusable(endpoint, sas_token)
    if is_anonymous or sas_token:
        return AzureAccount(
            name=name, endpoint=endpoint, sas_token="" if is_anonymous else sas_token, is_anonymous=is_anonymous
        )
    return AzureAccount(name=name, endpoint=endpoint, key=AccountKey.parse(name, key) if key else None)


def _endpoint_of(host: str, name: str, said: Mapping[str, str]) -> str:
    """Where the blobs of an account are: at the host that was named, else where the environment's suffix says."""
    protocol = said.get("defaultendpointsprotocol") or "https"
    suffix = said.get("endpointsuffix") or _variable("ENDPOINT_SUFFIX") or "core.windows.net"
    return f"{protocol}://{host.lower().replace('.dfs.', '.blob.') if host else f'{name}.blob.{suffix}'}"


def _refuse_unusable(endpoint: str, sas_token: str) -> None:
    if not is_http_address(endpoint) or "@" in endpoint or "?" in endpoint:
        raise SettingsError("AZURE_STORAGE_CONNECTION_STRING (not shown) has a BlobEndpoint that is no address")
    if sas_token and not (_SAS.fullmatch(sas_token) and any(name == "sig" for name, _ in parse_qsl(sas_token))):
        raise SettingsError(
            "AZURE_STORAGE_SAS_TOKEN (not shown) is no SAS token; give what follows the ? of a signed address, with its sig="
        )


def _connection_string() -> dict[str, str]:
    """What the connection string says, by names in lower case."""
    text = os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "").strip()
    pairs = [part.partition("=") for part in text.split(";") if part]
    said = {name.strip().lower(): value.strip() for name, _, value in pairs}
    if said.get("usedevelopmentstorage", "").lower() == "true":
        pairs = [part.partition("=") for part in _EMULATOR.split(";")]
        return {name.lower(): value for name, _, value in pairs}
    if text and not all(separator for _, separator, _ in pairs):
        raise SettingsError(
            "AZURE_STORAGE_CONNECTION_STRING (not shown) is none; give NAME=VALUE;NAME=VALUE as Azure shows it"
        )
    if said and "accountname" not in said and "blobendpoint" in said:
        named = _HOST.fullmatch(urlsplit(said["blobendpoint"]).netloc)
        said["accountname"] = named[1].lower() if named else ""
    return said


def _variable(*names: str) -> str:
    """The first of Azure's variables that is set."""
    return next(filter(None, (os.environ.get(f"AZURE_STORAGE_{name}", "").strip() for name in names)), "")
