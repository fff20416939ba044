"""Is this answer about the object that the index saw?

    strong ETag       it alone decides; `If-Match` makes the store look, too
    weak ETag, none   what there is: the weak ETag, the size of the whole object, `Last-Modified`

A weak ETag stays the same for content that means the same, so it promises nothing about bytes (RFC 9110, section 8.8.1).
An identity travels with the index as one string: a strong ETag as the store wrote it, or what there is instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.storage.http_date import parse_http_date
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from ray_streamer.storage.http_connection import HttpAnswer

# What some servers send for every object.
_EMPTY_ETAGS = frozenset({"", "*", '""', 'W/""', "W/"})
_TOKEN = re.compile(r"(.*)\bsize=([0-9]{1,19}) modified=([0-9]{0,19})")
# What may be sent back: one strong ETag in ASCII, by the rules or by the habit of some stores without its quotes.
_CONDITION = re.compile(r'"[!#-~]+"|[!#-)+\--~]+')


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known about one version of an object.

    Attributes:
        etag: As the store wrote it; empty when there is none.
        size_bytes: Of the whole object; None when it is not known.
        modified: Seconds since 1970; None when it is not known.
    """

    etag: str
    size_bytes: int | None = None
    modified: int | None = None

    @classmethod
    def of_answer(cls, answer: HttpAnswer, size_bytes: int) -> Identity:
        """The identity that an answer's headers tell."""
        etag, modified = answer.header("etag"), parse_http_date(answer.header("last-modified"))
        if etag in _EMPTY_ETAGS:
            etag = ""
        return cls(etag, size_bytes, int(modified) if modified is not None and modified >= 0 else None)

    @classmethod
    def parse(cls, token: str) -> Identity:
        """What `token` says.

        >>> Identity.parse('"e"'), Identity.parse('W/"e" size=7 modified=')
        (Identity(etag='"e"', size_bytes=None, modified=None), Identity(etag='W/"e"', size_bytes=7, modified=None))
        """
        match = _TOKEN.fullmatch(token)
        if match is None:
            return cls(token)
        return cls(match[1].rstrip(), int(match[2]), int(match[3]) if match[3] else None)

    @property
    def token(self) -> str:
        """The identity as one string, see `ObjectInfo.etag`."""
        if self.is_exact:
            return self.etag
        modified = "" if self.modified is None else self.modified
        return f"{self.etag} size={self.size_bytes} modified={modified}".lstrip()

    @property
    def is_exact(self) -> bool:
        """Whether other bytes would have another identity."""
        return bool(self.etag) and not self.etag.startswith("W/")

    @property
    def condition(self) -> str:
        """What to send as `If-Match`; empty where that cannot work."""
        return self.etag if self.is_exact and _CONDITION.fullmatch(self.etag) else ""

    def difference(self, now: Identity) -> str:
        """Why `now` is another object than this one; empty when nothing speaks for it."""
        if not self.etag and self.size_bytes is None:
            # The caller knows nothing.
            return ""
        if self.etag and not now.etag:
            return f"the answer has no ETag, expected {self.etag}"
        if self.etag and _opaque(self.etag) != _opaque(now.etag):
            return f"ETag {now.etag}, not {self.etag}"
        if self.size_bytes is not None and now.size_bytes is not None and self.size_bytes != now.size_bytes:
            return f"{exact_bytes(now.size_bytes)}, not {exact_bytes(self.size_bytes)}"
        if not self.is_exact and self.modified is not None and self.modified != now.modified:
            return "another Last-Modified" if now.modified is not None else "the answer has no Last-Modified"
        return ""


def _opaque(etag: str) -> str:
    """An ETag but for its weakness: a proxy that may change bodies makes a strong one weak."""
    return etag.removeprefix("W/")
