"""Which account of Azure is meant, and who asks there? What the environment says, where Azure's own tools and Run:ai's streamer look.

A SAS token that a uri itself was given with comes first; then a connection string, a SAS token and an account's key of the environment.
Each belongs to one account, and is not sent to another. SAS tokens of the environment and tokens of azure-identity are sent as they are, so
only Azure's own hosts get them, and the endpoint that the environment names; with a key requests are signed.
Source: Azure Storage, "Configure connection strings".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from ray_streamer.errors import SettingsError
from ray_streamer.storage.azure_key import AccountKey
from ray_streamer.storage.http_head import QUERY
from ray_streamer.storage.http_route import is_http_address

if TYPE_CHECKING:
    from collections.abc import Mapping

_ACCOUNT = re.compile(r"[a-z0-9]{3,24}")
_HOST = re.compile(r"([a-z0-9]{3,24})(?:\.z[0-9]+)?\.(?:blob|dfs)\.[a-z0-9.-]+(?::[0-9]+)?", re.IGNORECASE)
# Of Azure's clouds and of OneLake; German accounts are gone, and their suffix may belong to somebody else.
_OWN_HOST = re.compile(
    r"https://[a-z0-9.-]+\.(?:blob|dfs)\.(?:core\.(?:windows\.net|chinacloudapi\.cn|usgovcloudapi\.net)|storage\.azure\.net|"
    r"fabric\.microsoft\.com)(?::443)?"
)
# The account of every Azurite, which Azure documents with its key.
_EMULATOR = (
    "AccountName=devstoreaccount1;BlobEndpoint=http://127.0.0.1:10000/devstoreaccount1;"
    "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


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


def account_of(uri: str, host: str, *, is_anonymous: bool, signature: str = "") -> AzureAccount:
    """The account that a uri's host names, else the environment, with what the environment says of who asks.

    Args:
        uri: For messages.
        host: Of the uri; may be empty.
        is_anonymous: Whether nobody asks.
        signature: The SAS token that the uri itself was given with, if it was.

    Raises:
        SettingsError: Nothing names an account, or what is said cannot be used.
    """
    said, own = _connection_string(), _variable("ACCOUNT_NAME", "ACCOUNT")
    named = _HOST.fullmatch(host)
    if host and not named:
        raise SettingsError(f"{uri}: {host} is no account of Azure; give ACCOUNT.blob.core.windows.net")
    _refuse_capitals(AZURE_STORAGE_ACCOUNT_NAME=own, AZURE_STORAGE_CONNECTION_STRING=said.get("accountname", ""))
    name = (named[1].lower() if named else "") or said.get("accountname") or own
    if not name or not _ACCOUNT.fullmatch(name):
        raise SettingsError(
            f"{uri} names no storage account; set AZURE_STORAGE_ACCOUNT_NAME, or give "
            "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX"
        )
    # What a connection string says is of its own account only, and so are the variables beside AZURE_STORAGE_ACCOUNT_NAME.
    said = said if (said.get("accountname", own or name) or own) == name else {}
    has_variables = own in ("", name)
    endpoint = (said.get("blobendpoint") or _endpoint_of(host, name, said)).rstrip("/")
    sas_token = said.get("sharedaccesssignature") or (_variable("SAS_TOKEN") if has_variables else "")
    sas_token = signature or sas_token.lstrip("?")
    key = said.get("accountkey") or (_variable("ACCOUNT_KEY", "KEY") if has_variables else "")
    _refuse_unusable(endpoint, sas_token, given_as="the query of the uri" if signature else "AZURE_STORAGE_SAS_TOKEN")
    if not is_anonymous and not signature and (sas_token or not key):
        _refuse_to_send_tokens(uri, endpoint, name, said)
    if is_anonymous or sas_token:
        return AzureAccount(
            name=name, endpoint=endpoint, sas_token="" if is_anonymous else sas_token, is_anonymous=is_anonymous
        )
    return AzureAccount(name=name, endpoint=endpoint, key=AccountKey.parse(name, key) if key else None)


def _refuse_capitals(**names: str) -> None:
    """Azure's hosts are spelt either way, but its signatures are not."""
    for variable, name in names.items():
        if name != name.lower() and _ACCOUNT.fullmatch(name.lower()):
            raise SettingsError(
                f"{variable} names account {name}, and names of accounts are lower case; give {name.lower()}"
            )


def _refuse_to_send_tokens(uri: str, endpoint: str, name: str, said: Mapping[str, str]) -> None:
    """Nobody but Azure, and the server that the environment names, learns who asks."""
    suffix = said.get("endpointsuffix") or _variable("ENDPOINT_SUFFIX")
    is_named = bool(said.get("blobendpoint")) or (bool(suffix) and endpoint == _endpoint_of("", name, said))
    if is_named or _OWN_HOST.fullmatch(endpoint):
        return
    suffix = endpoint.partition(".blob.")[2]
    raise SettingsError(
        f"{uri}: {endpoint} is no https address of Azure's own, so it is sent neither a SAS token of the environment nor a token of azure-identity; if it is yours set "
        f"AZURE_STORAGE_ENDPOINT_SUFFIX={suffix}, or AZURE_STORAGE_CONNECTION_STRING for account {name}; else set azure_unsigned"
    )


def _endpoint_of(host: str, name: str, said: Mapping[str, str]) -> str:
    """Where the blobs of an account are: at the host that was named, else where the environment's suffix says."""
    protocol = said.get("defaultendpointsprotocol") or "https"
    suffix = said.get("endpointsuffix") or _variable("ENDPOINT_SUFFIX") or "core.windows.net"
    return f"{protocol}://{host.lower().replace('.dfs.', '.blob.') if host else f'{name}.blob.{suffix}'}"


def _refuse_unusable(endpoint: str, sas_token: str, *, given_as: str) -> None:
    if not is_http_address(endpoint) or "@" in endpoint or "?" in endpoint:
        raise SettingsError("AZURE_STORAGE_CONNECTION_STRING (not shown) has a BlobEndpoint that is no address")
    if sas_token and not (QUERY.fullmatch(sas_token) and any(name == "sig" for name, _ in parse_qsl(sas_token))):
        raise SettingsError(
            f"{given_as} (not shown) is no SAS token; give what follows the ? of a signed address, with its sig="
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
    if "accountname" not in said and is_http_address(said.get("blobendpoint", "")):
        said["accountname"] = _account_at(said["blobendpoint"])
    return said


def _account_at(endpoint: str) -> str:
    """The account of an endpoint: its host names it, or, for emulators, its path; empty for a domain of one's own.

    >>> _account_at("https://mine.blob.core.windows.net/"), _account_at("http://127.0.0.1:10000/devstoreaccount1")
    ('mine', 'devstoreaccount1')
    """
    parts = urlsplit(endpoint)
    named = _HOST.fullmatch(parts.netloc)
    path = parts.path.strip("/")
    return named[1].lower() if named else path if _ACCOUNT.fullmatch(path) else ""


def _variable(*names: str) -> str:
    """The first of Azure's variables that is set."""
    return next(filter(None, (os.environ.get(f"AZURE_STORAGE_{name}", "").strip() for name in names)), "")
