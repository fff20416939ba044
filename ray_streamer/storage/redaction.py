"""What of a server's words may be repeated in a message?

Servers and proxies may repeat the request, in any header or body. A request holds its signature, an access key id, perhaps
a session token or a proxy's password: as good as credentials while they last. So words are left out that hold an access key id
or password, or twelve characters in a row of a signature or token, and so are control characters, which a terminal would obey.
"""

from __future__ import annotations

import base64
import binascii
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_RUN_CHARS = 12
_FEWEST_CHARS = 4
_MAX_CHARS = 400
_LEFT_OUT = "(not shown)"
_TOKENS = frozenset({"x-amz-signature", "x-amz-security-token", "x-amz-s3session-token", "signature", "sig"})
_KEY_IDS = frozenset({"x-amz-credential", "awsaccesskeyid"})
# What queries of listings, and of signed addresses besides their signatures, say; anything else that is long may be a secret.
_HARMLESS = frozenset(
    {
        "list-type",
        "prefix",
        "delimiter",
        "continuation-token",
        "max-keys",
        "encoding-type",
        "marker",
        "pagetoken",
        "cursor",
    }
    | {"comp", "restype", "include", "alt", "fields", "recursive", "expand", "limit", "generation", "ifgenerationmatch"}
    | {"userproject", "versionid", "x-id", "expires", "response-content-disposition", "response-content-type"}
    | {f"x-amz-{name}" for name in ("algorithm", "date", "expires", "signedheaders", "content-sha256", "checksum-mode")}
)
# Of a credential only the access key id is secret; day, region and service follow it.
_AUTHORIZATION = re.compile(
    r"Credential=(?P<id>[^/,\s]+)|Signature=(?P<token>\w+)|AWS (?P<old_id>[^:\s]+):(?P<old_token>\S+)|Basic (?P<basic>\S+)"
)
# C0, DEL and C1, and what turns the direction of writing.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


class Secrets:
    """What one request was sent with and nobody may read.

    >>> secrets = Secrets("/b/k?X-Amz-Credential=AKIAEXAMPLE%2F20260101&X-Amz-Signature=0123456789abcdef", {})
    >>> secrets.clean("AKIAEXAMPLE may not read /b/k?X-Amz-Signature=0123456789abcdef")
    '(not shown) may not read (not shown)'

    Args:
        target: Path and query of the request.
        headers: Header lines of the request.
    """

    def __init__(self, target: str, headers: Mapping[str, str]) -> None:
        self._target, self._headers = target, headers

    @cached_property
    def _runs(self) -> set[str]:
        """Looked for when somebody has something to say, which most requests never have."""
        return {run for secret in _secrets_of(self._target, self._headers) for run in secret.runs}

    def are_in(self, text: str) -> bool:
        """Whether the text repeats one of them, percent-encoded or not."""
        plain, decoded = text.lower(), unquote(text).lower()
        return any(run in plain or run in decoded for run in self._runs)

    def clean(self, text: str, *, max_chars: int = _MAX_CHARS) -> str:
        """The text on one line, without them and without control characters, cut off where it gets long."""
        # Longer texts are not looked through to their end, since nobody would see it.
        words = _CONTROLS.sub(" ", text[: 16 * max_chars]).split()
        if self.are_in("".join(words)):
            words = [_LEFT_OUT if self.are_in(word) else word for word in words]
            if self.are_in("".join(words)):
                # Broken up by spaces.
                return _LEFT_OUT
        clean = " ".join(words)
        return clean if len(clean) <= max_chars else f"{clean[:max_chars]}..."


NO_SECRETS = Secrets("", {})
"""For words about a request that was sent with none."""


@dataclass(frozen=True, slots=True)
class _Secret:
    """One secret; short ones could be part of any word, so that they are not looked for.

    Attributes:
        text: As it was before it was encoded.
        is_whole: Whether parts of it say nothing, as with names and passwords.
    """

    text: str
    is_whole: bool = False

    @property
    def runs(self) -> list[str]:
        """What to look for, in lower case."""
        text = self.text.lower()
        if len(text) < _FEWEST_CHARS:
            return []
        if self.is_whole:
            return [text]
        return [text[start : start + _RUN_CHARS] for start in range(max(1, len(text) - _RUN_CHARS + 1))]


def _secrets_of(target: str, headers: Mapping[str, str]) -> Iterator[_Secret]:
    query = parse_qsl(target.partition("?")[2])
    for name, value in query:
        if name.lower() not in _HARMLESS | _TOKENS | _KEY_IDS and len(value) >= _RUN_CHARS:
            yield _Secret(value)
    for name, value in [*query, *headers.items()]:
        if name.lower() in _TOKENS:
            yield _Secret(value)
        elif name.lower() in _KEY_IDS:
            yield _Secret(value.partition("/")[0], is_whole=True)
        elif name.lower() == "authorization" and not value.startswith("AWS"):
            yield from _secrets_of_authorization(value)
        elif name.lower() in ("authorization", "proxy-authorization"):
            for match in _AUTHORIZATION.finditer(value):
                yield from _secrets_in(match.groupdict())


def _secrets_of_authorization(value: str) -> Iterator[_Secret]:
    """Secrets of schemes whose words are all secret but the first: Basic, Bearer, SharedKey and others."""
    scheme, _, words = value.partition(" ")
    for word in (words or scheme).split():
        yield _Secret(word)
        if scheme.lower() == "basic":
            yield from _secrets_in({"basic": word})


def _secrets_in(found: Mapping[str, str | None]) -> Iterator[_Secret]:
    """Secrets in one part of an authorization."""
    for name, text in found.items():
        if text:
            yield _Secret(text, is_whole=name.endswith("id"))
        if text and name == "basic":
            with suppress(binascii.Error):
                password = base64.b64decode(text).decode("utf-8", "replace").partition(":")[2]
                yield _Secret(password, is_whole=True)
