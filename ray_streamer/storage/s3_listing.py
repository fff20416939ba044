"""Which keys does an answer of ListObjectsV2 name, and where does the listing go on?

Source: Amazon S3 API Reference, "ListObjectsV2".
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from ray_streamer.storage.listing import MAX_TOKEN_CHARS, ListingPage
from ray_streamer.storage.xml_page import XmlPage
from ray_streamer.units import counted, verb

if TYPE_CHECKING:
    from collections.abc import Mapping

_ROOT = "ListBucketResult"
_KEY = (_ROOT, "Contents", "Key")
_CONTENTS = (_ROOT, "Contents")


def parse_page(body: bytes) -> ListingPage:
    """What the XML says.

    Raises:
        ValueError: It is no such answer.
    """
    page = _Objects()
    page.feed(body)
    num_keys = len(page.keys)
    if page.num_contents != num_keys:
        raise ValueError(
            f"{counted(page.num_contents, 'entry', 'entries')} {verb(page.num_contents, 'has', 'have')} {counted(num_keys, 'key')}"
        )
    token = page.texts.get((_ROOT, "NextContinuationToken"), "")
    is_truncated = page.texts.get((_ROOT, "IsTruncated"), "").strip().lower() == "true"
    if is_truncated and not 0 < len(token) <= MAX_TOKEN_CHARS:
        raise ValueError("there is more, and no usable continuation token that leads there")
    is_encoded = page.texts.get((_ROOT, "EncodingType"), "").strip() == "url"
    keys = tuple(unquote_plus(key) for key in page.keys) if is_encoded else tuple(page.keys)
    return ListingPage(keys, token if is_truncated else "")


class _Objects(XmlPage):
    """Texts of the few elements that matter; some stores name them with a prefix."""

    ROOT = _ROOT
    WANTED = frozenset({(_ROOT, "IsTruncated"), (_ROOT, "NextContinuationToken"), (_ROOT, "EncodingType"), _KEY})

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[tuple[str, ...], str] = {}
        self.keys: list[str] = []
        self.num_contents = 0

    def name_of(self, name: str) -> str:
        return name.rpartition(":")[2]

    def begin(self, attributes: Mapping[str, str]) -> None:
        self.num_contents += self.path == _CONTENTS

    def take(self, text: str) -> None:
        if self.path == _KEY:
            self.keys.append(text)
        else:
            self.texts[self.path] = text
