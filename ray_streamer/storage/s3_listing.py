"""Which keys does an answer of ListObjectsV2 name, and where does the listing go on?

Parsed as it comes, without a tree: a hostile answer costs no more memory than its keys, and document types, which could
make a little text into a lot, are refused. Source: Amazon S3 API Reference, "ListObjectsV2".
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus
from xml.parsers import expat

from ray_streamer.errors import StorageError
from ray_streamer.units import counted, verb

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PAGE_BYTES = 4 << 20
"""Longer than any page of 1000 keys."""

# A page has up to 1000 entries, folders included.
_MAX_PAGES = 200
_MAX_KEYS = 100_000
_MAX_KEY_CHARS = 8 << 20
_MAX_TOKEN_CHARS = 8192
_MAX_DEPTH = 16
_ROOT = "ListBucketResult"
_KEY = (_ROOT, "Contents", "Key")
_CONTENTS = (_ROOT, "Contents")
_WANTED = {(_ROOT, "IsTruncated"), (_ROOT, "NextContinuationToken"), (_ROOT, "EncodingType"), _KEY}


@dataclass(frozen=True, slots=True)
class ListingPage:
    """One answer.

    Attributes:
        keys: In the order of the answer.
        next_token: What the next request names; empty after the last page.
    """

    keys: tuple[str, ...]
    next_token: str

    @classmethod
    def parse(cls, body: bytes) -> ListingPage:
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
        if is_truncated and not 0 < len(token) <= _MAX_TOKEN_CHARS:
            raise ValueError("there is more, and no usable continuation token that leads there")
        is_encoded = reader.texts.get((_ROOT, "EncodingType"), "").strip() == "url"
        keys = tuple(unquote_plus(key) for key in reader.keys) if is_encoded else tuple(reader.keys)
        return cls(keys, token if is_truncated else "")


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


def list_keys(ask: Callable[[str], ListingPage], *, what: str, timeout_seconds: float) -> list[str]:
    """The keys of all pages.

    Args:
        ask: Gives the page of a continuation token, the first one's being empty.
        what: The listing, for messages.
        timeout_seconds: No page is asked for later than that after the first.

    Raises:
        StorageError: The listing goes round in circles, never ends, or takes too long; or what `ask` raises.
    """
    deadline = time.monotonic() + timeout_seconds
    keys: list[str] = []
    # Hashes: tokens may be long.
    seen: set[int] = set()
    num_chars = 0
    token = ""
    while True:
        page = ask(token)
        keys += page.keys
        token = page.next_token
        if not token:
            return keys
        if hash(token) in seen:
            raise StorageError(f"{what}: the store repeats a continuation token after {counted(len(keys), 'key')}")
        seen.add(hash(token))
        num_chars += sum(map(len, page.keys))
        if len(seen) >= _MAX_PAGES or len(keys) > _MAX_KEYS or num_chars > _MAX_KEY_CHARS:
            raise StorageError(
                f"{what}: there is more after {counted(len(seen), 'page')} and {counted(len(keys), 'key')}; is this the folder of one checkpoint?"
            )
        if time.monotonic() >= deadline:
            raise StorageError(
                f"{what}: the listing has no end in {timeout_seconds:g} s (list_timeout_seconds), after "
                f"{counted(len(seen), 'page')} and {counted(len(keys), 'key')}"
            )
