"""Which keys does an answer of ListObjectsV2 name, and where does the listing go on?

Parsed as it comes, without a tree: a hostile answer costs no more memory than its keys, and document types, which could
make a little text into a lot, are refused. Source: Amazon S3 API Reference, "ListObjectsV2".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote_plus
from xml.parsers import expat

from ray_streamer.storage.listing import MAX_TOKEN_CHARS, ListingPage
from ray_streamer.units import counted, verb

_MAX_DEPTH = 16
_ROOT = "ListBucketResult"
_KEY = (_ROOT, "Contents", "Key")
_CONTENTS = (_ROOT, "Contents")
_WANTED = {(_ROOT, "IsTruncated"), (_ROOT, "NextContinuationToken"), (_ROOT, "EncodingType"), _KEY}


def parse_page(body: bytes) -> ListingPage:
    """What the XML says.

    Raises:
        ValueError: It is no such answer.
    """
    reader = _Reader()
    try:
        reader.feed(body)
    except expat.ExpatError as error:
        raise ValueError(f"no XML: {expat.ErrorString(error.code)}, line {error.lineno}") from None
    token = reader.texts.get((_ROOT, "NextContinuationToken"), "")
    is_truncated = reader.texts.get((_ROOT, "IsTruncated"), "").strip().lower() == "true"
    if is_truncated and not 0 < len(token) <= MAX_TOKEN_CHARS:
        raise ValueError("there is more, and no usable continuation token that leads there")
    is_encoded = reader.texts.get((_ROOT, "EncodingType"), "").strip() == "url"
    keys = tuple(unquote_plus(key) for key in reader.keys) if is_encoded else tuple(reader.keys)
    return ListingPage(keys, token if is_truncated else "")


@dataclass(slots=True)
class _Reader:
    """Texts of the few elements that matter."""

    texts: dict[tuple[str, ...], str] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    _path: tuple[str, ...] = ()
    _text: list[str] | None = None
    _num_contents: int = 0

    def feed(self, body: bytes) -> None:
        parser = expat.ParserCreate()
        parser.StartDoctypeDeclHandler = self._refuse_document_type
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._add
        parser.Parse(body, True)
        if self._num_contents != len(self.keys):
            raise ValueError(
                f"{counted(self._num_contents, 'entry', 'entries')} {verb(self._num_contents, 'has', 'have')} {counted(len(self.keys), 'key')}"
            )

    def _refuse_document_type(self, *_: object) -> None:
        raise ValueError("a document type")

    def _start(self, name: str, _: object) -> None:
        self._path += (name.rpartition(":")[2],)
        if self._path[0] != _ROOT or len(self._path) > _MAX_DEPTH:
            raise ValueError(f"no {_ROOT}")
        self._num_contents += self._path == _CONTENTS
        self._text = [] if self._path in _WANTED else None

    def _add(self, text: str) -> None:
        if self._text is not None:
            self._text.append(text)

    def _end(self, _: str) -> None:
        if self._text is not None:
            text = "".join(self._text)
            if self._path == _KEY:
                self.keys.append(text)
            else:
                self.texts[self._path] = text
        self._text = None
        self._path = self._path[:-1]
