"""Are an answer's bytes those that were asked for, and what do the faults of sockets and TLS mean?

`Content-Range`: RFC 9110, section 14.4. What answers mean that bring no bytes: see `refusal`.
"""

from __future__ import annotations

import re
import socket
import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import h11

from ray_streamer.errors import SettingsError, ShortReadError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.storage.lateness import LateBodyError
from ray_streamer.storage.redaction import NO_SECRETS
from ray_streamer.storage.retry import PassingFault
from ray_streamer.storage.tcp import ForbiddenAddressError
from ray_streamer.units import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.storage.http_connection import HttpAnswer

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", re.IGNORECASE)
# How emulators of Azure and Google say that nothing is left, where 416 should stand: the range begins where the object ends.
_NOTHING = re.compile(r"bytes ([0-9]{1,19})-(?:-1|[0-9]{1,19})/\1", re.IGNORECASE)
_MAX_OBJECT_BYTES = 1 << 62
# Some stores keep the framing of an upload, and some people write the encoding of characters, as if it were the object's; bodies are plain.
_PLAIN_ENCODINGS = frozenset({"", "identity", "none", "binary", "aws-chunked", "utf-8", "utf8", "us-ascii"})
_NOBODY_THERE = (ConnectionRefusedError, socket.gaierror)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """Which part of an object a body is.

    Attributes:
        extent: The bytes of the body.
        size_bytes: Length of the whole object.
    """

    extent: Extent
    size_bytes: int

    @classmethod
    def parse(cls, header: str | None) -> ContentRange | None:
        """The header's meaning, or None when it has none.

        >>> ContentRange.parse("bytes 8-23/100")
        ContentRange(extent=Extent(start=8, stop=24), size_bytes=100)
        """
        match = _CONTENT_RANGE.fullmatch(header or "")
        if match is None:
            return None
        first, last, size_bytes = map(int, match.groups())
        if not first <= last < size_bytes <= _MAX_OBJECT_BYTES:
            return None
        return cls(Extent(first, last + 1), size_bytes)


def content_range_of(answer: HttpAnswer, *, asked: Extent, what: str) -> ContentRange:
    """Which bytes an answer brings: a part, or a whole object where no more than a part of that length was asked for.

    Servers may send the whole instead (RFC 9110, section 14.2). Those that give no ranges at all do so for pages, too, that are no
    file, such as one to log in; so they have to say that they give some.

    Raises:
        StorageError: The answer does not say, or its body is not the object's own bytes.
        ShortReadError: The object is empty, or ends where the range begins.
    """
    if answer.status == 200 and answer.length == 0:
        # An object without bytes has no range to give.
        raise ShortReadError(f"{what}: the object is empty")
    if answer.status == 206 and answer.length == 0 and _NOTHING.fullmatch(answer.header("content-range")):
        raise ShortReadError(f"{what}: the object ends before the extent begins")
    given = ContentRange.parse(answer.header("content-range")) if answer.status == 206 else _whole_object(answer, asked)
    if given is None:
        shown = answer.secrets.clean(answer.header("content-range"), max_chars=100)
        raise StorageError(
            f"{what}: expected 206 with a Content-Range, got {answer.status} with {shown!r}; the server or a proxy "
            "ignores ranges"
        )
    refuse_encoded(answer, what=what)
    return given


def _whole_object(answer: HttpAnswer, asked: Extent) -> ContentRange | None:
    gives_ranges = answer.header("accept-ranges").lower() == "bytes"
    size_bytes = answer.length
    if answer.status == 200 and gives_ranges and not asked.start and size_bytes and size_bytes <= asked.stop:
        return ContentRange(Extent(0, size_bytes), size_bytes)
    return None


def refuse_encoded(answer: HttpAnswer, *, what: str) -> None:
    """Refuse a body of which a proxy or the store made something else.

    Raises:
        StorageError: It is compressed, say.
    """
    encoding = answer.header("content-encoding").strip().lower()
    if not _PLAIN_ENCODINGS.issuperset(each.strip() for each in encoding.split(",")):
        raise StorageError(
            f"{what}: the body comes with Content-Encoding {answer.secrets.clean(encoding, max_chars=100)!r}, expected the object's own "
            "bytes; upload the object without that header, or keep proxies from compressing"
        )


def check_extent(answer: HttpAnswer, given: ContentRange, *, asked: Extent, what: str) -> None:
    """Refuse bytes other than those asked for, up to the end of the object.

    Raises:
        StorageError: The server answered with other bytes.
    """
    if given.extent != Extent(asked.start, max(asked.start, min(asked.stop, given.size_bytes))):
        raise StorageError(f"{what}: the server answered with other bytes, {given.extent} of {given.size_bytes}")
    if answer.length not in (None, given.extent.num_bytes):
        raise StorageError(
            f"{what}: the server announced {exact_bytes(answer.length)} for {exact_bytes(given.extent.num_bytes)} of the object"
        )


@contextmanager
def faults_translated(
    what: str, *, endpoint: str, endpoint_advice: str, ca_advice: str, has_answered: bool
) -> Iterator[None]:
    """Turn what sockets and TLS say about `what` into `PassingFault` or this package's errors.

    Args:
        what: Object and extent, for messages.
        endpoint: Where requests go, for messages.
        endpoint_advice: What to look at when nobody is there.
        ca_advice: What to set when the server is not trusted.
        has_answered: Whether the endpoint ever answered; if not, a refused connection, or another protocol, is taken for a wrong
            address.
    """
    try:
        yield
    except (StorageError, SettingsError, LateBodyError):
        # These are OSErrors or ValueErrors too, some of them.
        raise
    except ForbiddenAddressError as error:
        raise StorageError(f"{what}: {error}") from None
    except ssl.SSLCertVerificationError as error:
        raise StorageError(f"{endpoint} is not trusted, {what}: {reason_of(error)}; {ca_advice}") from error
    except (OSError, h11.RemoteProtocolError) as error:
        message = f"no answer from {endpoint}, {what}: {reason_of(error)}"
        if isinstance(error, _NOBODY_THERE) and not has_answered:
            raise StorageError(f"{message}; {endpoint_advice}, and the proxy if there is one?") from error
        if _speaks_otherwise(error) and not has_answered:
            raise PassingFault(
                f"{message}; {endpoint_advice}, and does the server speak {endpoint.partition('://')[0]}?",
                is_worth_one_retry=True,
            ) from error
        raise PassingFault(message) from error
    except h11.LocalProtocolError as error:
        raise StorageError(f"cannot ask for {what}: {NO_SECRETS.clean(str(error))}") from None


def _speaks_otherwise(error: Exception) -> bool:
    """Whether the other end speaks something else than HTTP, or than TLS as this end does; its end in the middle of it says nothing."""
    is_end = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
    return isinstance(error, ssl.SSLError | h11.RemoteProtocolError) and not is_end


def reason_of(error: Exception) -> str:
    """The kind of an error and its own words, unless these could quote a signed url."""
    if isinstance(error, h11.RemoteProtocolError):
        return f"{type(error).__name__}: {error}"
    words = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
