"""How is a container of Azure Blob Storage asked: `az://CONTAINER/PREFIX`, `abfss://`, or the https address of an account?

Who asks is said by the environment (see `azure_account`), else by azure-identity's chain of credentials. Keys sign each request (see
`azure_key`), a SAS token is part of each address, and tokens of azure-identity are renewed before they end. Identity is the ETag, which
each request names.
Sources: Azure Storage REST API, "Get Blob", "List Blobs", "Common REST API error codes", "Specifying conditional headers".
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, unquote, urlencode, urlsplit

from ray_streamer.errors import AccessError, SettingsError, StorageError
from ray_streamer.storage import web
from ray_streamer.storage.azure_account import account_of
from ray_streamer.storage.azure_listing import parse_page
from ray_streamer.storage.bounded_call import find_credentials
from ray_streamer.storage.expiry import ended_signature
from ray_streamer.storage.extras import missing_extra
from ray_streamer.storage.http_date import http_date_now
from ray_streamer.storage.object_store import ObjectStore, Request, if_match
from ray_streamer.storage.refusal import Refusal, skew_of, xml_element
from ray_streamer.storage.renewal import Freshness, Renewal
from ray_streamer.storage.signed import Signature
from ray_streamer.storage.trust import ca_file_of_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ray_streamer.storage.azure_account import AzureAccount
    from ray_streamer.storage.base import StorageSettings
    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.identity import Identity
    from ray_streamer.storage.listing import ListingPage
    from ray_streamer.storage.retry import PassingFault

_VERSION = "2023-11-03"
# Azure's own 5000 blobs, with all that it says of each, are longer than any page that is read.
_MAX_RESULTS = "1000"
_SCOPE = "https://storage.azure.com/.default"
# A token that ends sooner is renewed, as azure-core does.
_RENEWED_BEFORE_SECONDS = 300
_CONTAINER = re.compile(r"\$root|\$web|[a-z0-9](?:-?[a-z0-9]){2,62}")
# Workspaces of OneLake are called as people like it.
_WORKSPACES = re.compile(r"[a-z0-9-]+\.(?:blob|dfs)\.fabric\.microsoft\.com", re.IGNORECASE)
_WHO = (
    "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_SAS_TOKEN or AZURE_STORAGE_ACCOUNT_KEY; or let azure-identity know: `az login`, "
    "AZURE_CLIENT_ID and its companions, or an identity of the machine or pod"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureRefusal(Refusal):
    """See `Refusal`.

    Attributes:
        ended: What to do about the SAS token, if it has ended.
    """

    THROTTLE_CODES: ClassVar[frozenset[str]] = frozenset({"ServerBusy", "TooManyRequests", "EgressIsOverAccountLimit"})
    CREDENTIALS_CODES: ClassVar[frozenset[str]] = frozenset({"AuthenticationFailed", "InvalidAuthenticationInfo"})
    FAILURE_CODES: ClassVar[frozenset[str]] = frozenset({"InternalError", "OperationTimedOut"})

    ended: tuple[str, ...] = ()

    @classmethod
    def from_answer(cls, request: Request, answer: HttpAnswer, body: bytes) -> AzureRefusal:
        """What a raw answer to a request says, with the beginning of its body."""
        text, secrets = body.decode("utf-8", "replace"), answer.secrets
        code = secrets.clean(answer.header("x-ms-error-code"), max_chars=100)
        # It goes on with the request's id and time.
        message = xml_element(text, "Message", secrets, r".+")
        is_refused = answer.status in (401, 403)
        skew_seconds = skew_of(answer.header("date")) if is_refused else 0.0
        return cls(
            status=answer.status,
            code=code or xml_element(text, "Code", secrets, r"[\w.-]{1,100}"),
            message=message.partition(" RequestId:")[0].rstrip("."),
            request_id=secrets.clean(answer.header("x-ms-request-id"), max_chars=128),
            retry_after=answer.header("retry-after"),
            skew_seconds=skew_seconds,
            ended=ended_signature(request.url, skew_seconds=skew_seconds) if is_refused else (),
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
        if self.ended:
            return [*self.ended]
        if self.code in ("AuthorizationPermissionMismatch", "AuthorizationFailure", "InsufficientAccountPermissions"):
            return ["who asks needs the role Storage Blob Data Reader, or a SAS token with the permissions r and l"]
        if self.code == "BlobArchived":
            return ["the blob is archived; rehydrate it, or copy it to another access tier"]
        return [_WHO] if self.status in (401, 403) else []


class AzureTokens:
    """Who asks, by azure-identity; safe to call from many threads.

    Args:
        timeout_seconds: How long finding or renewing a token may take.
    """

    def __init__(self, *, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._renewal = Renewal(self._freshness, self._renew)
        self._credential: Any = None
        self._token = ""
        self._is_refused = False
        self._ends_at = 0.0

    def token(self) -> str:
        """A token that is good for some minutes where it could be renewed.

        Raises:
            CredentialsError: There are no credentials, or none in time.
            SettingsError: azure-identity is not installed.
        """
        self._renewal.ensure()
        return self._token

    def refuse(self, authorization: str) -> None:
        """The store did not take a request with this header; get another token, unless there is another one already."""
        with self._renewal.finding.turn():
            if authorization == f"Bearer {self._token}":
                self._is_refused = True

    def _freshness(self) -> Freshness:
        seconds = self._ends_at - time.time()
        if self._is_refused or seconds <= 0:
            return Freshness.ENDED
        return Freshness.FRESH if seconds > _RENEWED_BEFORE_SECONDS else Freshness.ENDS_SOON

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
        self._token, self._ends_at, self._is_refused = found.token, found.expires_on, False


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
        self.ca_file = ca_file_of_environment("REQUESTS_CA_BUNDLE", endpoint=self.endpoint)
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
        return AzureRefusal.from_answer(request, answer, body)

    def listing_request(self, prefix: str, token: str, *, recursive: bool) -> Request:
        """See `ObjectStore`."""
        more = ({} if recursive else {"delimiter": "/"}) | ({"marker": token} if token else {})
        query = {"restype": "container", "comp": "list", "maxresults": _MAX_RESULTS, "prefix": prefix, **more}
        return self._authorized(self._container, query, {})

    def parse_page(self, answer: HttpAnswer, body: bytes) -> ListingPage:
        """See `ObjectStore`."""
        return parse_page(body)

    def _authorized(
        self, url: str, query: Mapping[str, str], headers: Mapping[str, str], *, is_conditional: bool = False
    ) -> Request:
        account, text = self._account, urlencode(query, quote_via=quote)
        lines = {**headers, "x-ms-version": _VERSION, "x-ms-date": http_date_now()}
        if account.key:
            lines["Authorization"] = account.key.sign(urlsplit(url).path, query, lines)
        elif self._tokens:
            lines["Authorization"] = f"Bearer {self._tokens.token()}"
        text = "&".join(filter(None, (text, account.sas_token)))
        return Request(f"{url}?{text}" if text else url, lines, is_conditional=is_conditional)


def open_store(uri: str, settings: StorageSettings) -> ObjectStore:
    """The store of an `az://`, `abfss://` or https uri of an account.

    Raises:
        SettingsError: It names no container, nothing names an account, or what the environment says cannot be used.
    """
    scheme, _, rest = uri.partition("://")
    authority, _, path = rest.partition("/")
    host, signature = "", Signature.at(uri, settings)
    if signature.files:
        return web.open_store(uri, settings)
    if scheme.lower() in ("https", "http"):
        # An address, in which names are encoded.
        host, (container, _, prefix) = authority, unquote(path).partition("/")
    elif "@" in authority:
        container, _, host = authority.partition("@")
        prefix = path
    else:
        container, prefix = authority, path
    if not _CONTAINER.fullmatch(container) and not (container and _WORKSPACES.fullmatch(host)):
        raise SettingsError(
            f"{uri} names no container; give az://CONTAINER/PREFIX, or abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX"
        )
    account = account_of(uri, host, is_anonymous=settings.azure_unsigned, signature=signature.query)
    return AzureStore(
        account,
        container=container,
        prefix=prefix.strip("/"),
        timeout_seconds=settings.credentials_timeout_seconds,
    )
