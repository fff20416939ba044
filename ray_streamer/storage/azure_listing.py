"""Which blobs does an answer of List Blobs name, and where does the listing go on?

Accounts with a hierarchical namespace list folders among the blobs. Source: Azure Storage REST API, "List Blobs".
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

from ray_streamer.storage.listing import MAX_TOKEN_CHARS, ListingPage
from ray_streamer.storage.xml_page import XmlPage

if TYPE_CHECKING:
    from collections.abc import Mapping

_ROOT = "EnumerationResults"
_BLOB = (_ROOT, "Blobs", "Blob")
_NAME = (*_BLOB, "Name")
_KINDS = {(*_BLOB, "Properties", "ResourceType"), (*_BLOB, "Metadata", "hdi_isfolder")}
_MARKER = (_ROOT, "NextMarker")


def parse_page(body: bytes) -> ListingPage:
    """What the XML says.

    Raises:
        ValueError: It is no such answer.
    """
    page = _Blobs()
    # Azure begins with a mark of the encoding, which the parser knows.
    page.feed(body)
    if len(page.marker) > MAX_TOKEN_CHARS:
        raise ValueError("there is more, and no usable marker that leads there")
    return ListingPage(tuple(page.names), page.marker)


class _Blobs(XmlPage):
    """Names of the blobs that are files."""

    ROOT = _ROOT
    WANTED = frozenset({_NAME, _MARKER} | _KINDS)

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.marker = ""
        self._name: str | None = None
        self._is_encoded = False
        self._is_folder = False

    def begin(self, attributes: Mapping[str, str]) -> None:
        if self.path == _BLOB:
            self._name, self._is_folder = None, False
        if self.path == _NAME:
            self._is_encoded = attributes.get("Encoded", "").lower() == "true"

    def take(self, text: str) -> None:
        if self.path == _NAME:
            self._name = unquote(text) if self._is_encoded else text
        elif self.path == _MARKER:
            self.marker = text.strip()
        else:
            self._is_folder = self._is_folder or text.strip().lower() in ("directory", "true")

    def end(self) -> None:
        if self.path != _BLOB:
            return
        if self._name is None:
            raise ValueError("a blob without a name")
        if not self._is_folder:
            self.names.append(self._name)
