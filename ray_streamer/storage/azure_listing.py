"""Which blobs does an answer of List Blobs name, and where does the listing go on?

Parsed as it comes, without a tree; document types are refused. Accounts with a hierarchical namespace list folders among the blobs.
Source: Azure Storage REST API, "List Blobs".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote
from xml.parsers import expat

from ray_streamer.storage.listing import MAX_TOKEN_CHARS, ListingPage

_ROOT = "EnumerationResults"
_BLOB = (_ROOT, "Blobs", "Blob")
_NAME = (*_BLOB, "Name")
_KINDS = {(*_BLOB, "Properties", "ResourceType"), (*_BLOB, "Metadata", "hdi_isfolder")}
_MARKER = (_ROOT, "NextMarker")
_WANTED = {_NAME, _MARKER} | _KINDS
_MAX_DEPTH = 16


def parse_page(body: bytes) -> ListingPage:
    """What the XML says.

    Raises:
        ValueError: It is no such answer.
    """
    reader = _Reader()
    try:
        # Azure begins with a mark of the encoding, which the parser knows.
        reader.feed(body)
    except expat.ExpatError as error:
        raise ValueError(f"no XML: {expat.ErrorString(error.code)}, line {error.lineno}") from None
    if len(reader.marker) > MAX_TOKEN_CHARS:
        raise ValueError("there is more, and no usable marker that leads there")
    return ListingPage(tuple(reader.names), reader.marker)


@dataclass(slots=True)
class _Reader:
    """Names of the blobs that are files."""

    names: list[str] = field(default_factory=list)
    marker: str = ""
    _path: tuple[str, ...] = ()
    _text: list[str] | None = None
    _name: str | None = None
    _is_encoded: bool = False
    _is_folder: bool = False

    def feed(self, body: bytes) -> None:
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = self._refuse_document_type
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._add
        parser.Parse(body, True)

    def _refuse_document_type(self, *_: object) -> None:
        raise ValueError("a document type")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path += (name,)
        if self._path[0] != _ROOT or len(self._path) > _MAX_DEPTH:
            raise ValueError(f"no {_ROOT}")
        if self._path == _BLOB:
            self._name, self._is_folder = None, False
        if self._path == _NAME:
            self._is_encoded = attributes.get("Encoded", "").lower() == "true"
        self._text = [] if self._path in _WANTED else None

    def _add(self, text: str) -> None:
        if self._text is not None:
            self._text.append(text)

    def _end(self, _: str) -> None:
        if self._text is not None:
            self._take("".join(self._text))
        if self._path == _BLOB:
            if self._name is None:
                raise ValueError("a blob without a name")
            if not self._is_folder:
                self.names.append(self._name)
        self._text = None
        self._path = self._path[:-1]

    def _take(self, text: str) -> None:
        if self._path == _NAME:
            self._name = unquote(text) if self._is_encoded else text
        elif self._path == _MARKER:
            self.marker = text.strip()
        else:
            self._is_folder = self._is_folder or text.strip().lower() in ("directory", "true")
