"""Where did a web server send requests for its files, and may a request go there?

Addresses are kept for the next requests, and asked for again when they are refused: they are often signed, and end. Redirects go
only where they are safe: https stays https, and addresses inside of a machine or its cloud, where metadata services give keys
away, are refused, by their names here and by what names lead to in `tcp`.

While one thread asks where a file is, the others wait for what it learns: a load has many requests under way, and servers that
send requests on, such as the Hugging Face Hub, count how often they are asked.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

from ray_streamer.errors import StorageError
from ray_streamer.storage.tcp import is_link_local, is_loopback

if TYPE_CHECKING:
    from urllib.parse import SplitResult

# By these names clouds give their machines metadata and keys.
_METADATA_HOSTS = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
)


class Redirects:
    """Where a server sent requests for its files; safe to call from many threads.

    Args:
        what: The folder, for messages.
        are_expected: Whether the server is known to send requests on; else that is learned from the first that it does.
        wait_seconds: How long to wait for another thread that asks the server for the same file.
    """

    def __init__(self, what: str, *, are_expected: bool, wait_seconds: float) -> None:
        self._what = what
        self._are_expected = are_expected
        self._wait_seconds = wait_seconds
        self._changed = threading.Condition()
        self._urls: dict[str, str] = {}
        self._answered_here: set[str] = set()
        self._asked: set[str] = set()

    def url_of(self, path: str) -> str | None:
        """Where a file is asked for now; None before the server has said, when the caller is to ask it.

        Waits while another thread asks, until `note`, `note_answer` or `end`.
        """
        with self._changed:
            if self._are_expected and path not in self._answered_here:
                self._changed.wait_for(lambda: path in self._urls or path not in self._asked, self._wait_seconds)
                if path not in self._urls:
                    self._asked.add(path)
            return self._urls.get(path)

    def note(self, path: str, *, asked: str, location: str) -> None:
        """The server answered to a request at `asked` that `path` is at `location`, a url as good as credentials.

        Raises:
            StorageError: No request may go there.
        """
        url = safe_target(f"{self._what}/{path}", asked=asked, location=location)
        with self._changed:
            self._are_expected = True
            self._urls[path] = url
        self.end(path)

    def note_answer(self, path: str) -> None:
        """The server gives this file itself."""
        with self._changed:
            self._answered_here.add(path)
        self.end(path)

    def end(self, path: str) -> None:
        """A request to the server for `path` is over, whatever became of it; another thread may ask."""
        with self._changed:
            if path in self._asked:
                self._asked.remove(path)
                self._changed.notify_all()

    def forget_all(self) -> None:
        """Ask the server again next time, for every file."""
        with self._changed:
            self._urls.clear()

    def forget(self, path: str, url: str) -> None:
        """Ask the server again next time, if `url` is still the one in use."""
        with self._changed:
            if self._urls.get(path) == url:
                del self._urls[path]


def safe_target(what: str, *, asked: str, location: str) -> str:
    """Where the answer to a request at `asked` leads, by its header `Location`; as good as credentials.

    Raises:
        StorageError: No request may go there. Begins with `what`.
    """
    try:
        url = urljoin(asked, location)
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise StorageError(f"{what}: the server sends the request on, to what is no address") from None
    reason = _unsafe(urlsplit(asked), parts)
    if reason:
        raise StorageError(
            f"{what}: the server sends the request on {reason}; redirects are followed only where they are safe"
        )
    # The header's own bytes, of which one is one character here.
    return quote(url.partition("#")[0], safe="%/:?#[]@!$&'()*+,;=~", encoding="latin-1")


def _unsafe(asked: SplitResult, to: SplitResult) -> str:
    """Why no request goes there; empty when it may."""
    if to.scheme not in ("http", "https") or not to.hostname:
        return f"to something other than a web server ({to.scheme or 'no scheme'})"
    if asked.scheme == "https" and to.scheme != "https":
        return "from https to http, where everybody on the way can change it"
    if "@" in to.netloc:
        return "with a user in the address"
    if is_link_local(to.hostname) or to.hostname.rstrip(".") in _METADATA_HOSTS:
        return "to a link-local or metadata address, which belongs to this machine and its cloud"
    if is_loopback(to.hostname) and not is_loopback(asked.hostname or ""):
        return "to this machine itself"
    return ""
