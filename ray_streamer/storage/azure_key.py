"""How does the key of an Azure account sign a request?

Source: Azure Storage REST API, "Authorize with Shared Key", "Blob Storage and Files signature string" for versions from 2015 on.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_streamer.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

# In the order in which they are signed; a GET has no others.
_SIGNED = (
    *("content-encoding", "content-language", "content-length", "content-md5", "content-type", "date"),
    *("if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range"),
)


@dataclass(frozen=True, slots=True)
class AccountKey:
    """A secret that signs; shown nowhere.

    Attributes:
        account: Whose it is.
    """

    account: str
    _key: bytes = field(repr=False)

    @classmethod
    def parse(cls, account: str, text: str) -> AccountKey:
        """A key as Azure shows it, in base64.

        Raises:
            SettingsError: It is none; does not show it.
        """
        try:
            return cls(account, base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            raise SettingsError(
                "AZURE_STORAGE_ACCOUNT_KEY (not shown) is no key; give it as Azure shows it, in base64"
            ) from None

    def sign(self, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> str:
        """The header Authorization of a GET.

        >>> key = AccountKey.parse("account", "c2VjcmV0")
        >>> key.sign("/models/a", {}, {"Range": "bytes=0-7", "x-ms-version": "2023-11-03"})
        'SharedKey account:FoDx8V/CZoexEWmhMwTnkx4Z0voJ94koZ9LMLtCbsOI='

        Args:
            path: Of the url, percent-encoded.
            query: Its names and values, not percent-encoded.
            headers: All that will be sent, but for those that name the client and the server.
        """
        by_name = {name.lower(): value for name, value in headers.items()}
        standard = [by_name.get(name, "") for name in _SIGNED]
        own = [f"{name}:{' '.join(by_name[name].split())}" for name in sorted(by_name) if name.startswith("x-ms-")]
        resource = [f"/{self.account}{path}", *(f"{name.lower()}:{query[name]}" for name in sorted(query))]
        text = "\n".join(["GET", *standard, *own, *resource])
        signature = hmac.digest(self._key, text.encode(), "sha256")
        return f"SharedKey {self.account}:{base64.b64encode(signature).decode()}"
