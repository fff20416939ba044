"""What does one kind of object store do in its own way?

    asks      where an object is asked for, and with which credentials      `object_request`, `discard`
    identity  what tells one version of an object from another one          `identity_of`
    answers   what an answer means that brings no bytes                     `refusal_of`, `follow`, `end`
    listing   how the keys below a prefix are asked for                     `listing_request`, `parse_page`, `follow_page`, `end_page`

Everything else is done once for all stores, in `object_storage`: connections, TLS, retries, resumed bodies, hedged requests, the
number of requests under way, bandwidth, and the comparison of every answer with the object that the index saw. A store is a
subclass of `ObjectStore` in a module of its own, and a row in `stores`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray_streamer.storage.identity import Identity
from ray_streamer.storage.listing import MAX_PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from ray_streamer.storage.http_connection import HttpAnswer
    from ray_streamer.storage.listing import ListingPage
    from ray_streamer.storage.refusal import Refusal


@dataclass(frozen=True, slots=True)
class Request:
    """One GET, ready to be sent; its url and headers may be as good as credentials.

    Attributes:
        url: Where to.
        headers: Besides those that every request has.
        is_conditional: Whether the store was told which version of the object is wanted.
        is_sent_on: Whether a server named this address, in answer to an earlier request.
    """

    url: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)
    is_conditional: bool = False
    is_sent_on: bool = False


class ObjectStore:
    """One folder or prefix of one store; every method may be called from many threads at once.

    Attributes:
        ca_file: By which https servers are trusted; empty for those that the system trusts.
        endpoint: Where requests go, for messages; no secret.
        endpoint_advice: What to look at when nobody answers there.
        ca_advice: What to set when the server is not trusted.
        folder: What the keys of this folder begin with, as listings write them.
        max_page_bytes: Length of the longest page of a listing that is read.
        keys: Of all objects that there are, where the store was told instead of asked; else None.
        is_public_web: Whether servers may send requests elsewhere, so that addresses inside of a machine or its cloud are refused.
    """

    ca_file: str = ""
    endpoint: str = ""
    endpoint_advice: str = ""
    ca_advice: str = "set REQUESTS_CA_BUNDLE"
    folder: str = ""
    max_page_bytes: int = MAX_PAGE_BYTES
    keys: tuple[str, ...] | None = None
    is_public_web: bool = False

    def object_request(self, path: str, headers: Mapping[str, str], pinned: Identity | None) -> Request:
        """How to ask for an object.

        Args:
            path: Relative to the folder.
            headers: To be sent, `Range` among them; part of what some stores sign.
            pinned: The version that is wanted, if the store is to look at it, too.

        Raises:
            AccessError: There are no credentials, or none in time.
        """
        raise NotImplementedError

    def discard(self, path: str, request: Request) -> None:
        """The store refused who asks; what was found for this request is not used again."""

    def follow(self, path: str, request: Request, answer: HttpAnswer) -> bool:
        """Whether a redirect was noted, so that the next request for `path` goes where it leads.

        Raises:
            StorageError: It leads where no request may go.
        """
        return False

    def end(self, path: str, request: Request) -> None:
        """A request for an object is over: its answer was read, sent it on or refused it, or none came."""

    def follow_page(self, request: Request, answer: HttpAnswer, what: str) -> Request | None:
        """Where a redirect leads a request for a page of a listing; None where listings are not sent on.

        Raises:
            StorageError: It leads where no request may go. Begins with `what`.
        """
        return None

    def end_page(self) -> None:
        """The same for a page of a listing, in the thread that asked for it."""

    def place_of(self, request: Request) -> str:
        """Which server a request goes to, for messages; no secret."""
        return self.endpoint

    def identity_of(self, path: str, request: Request, answer: HttpAnswer, size_bytes: int) -> Identity:
        """Which version of the object an answer is about."""
        return Identity.of_answer(answer, size_bytes)

    def refusal_of(self, request: Request, answer: HttpAnswer, body: bytes) -> Refusal:
        """What an answer says that is no success, with the beginning of its body."""
        raise NotImplementedError

    def listable(self, prefix: str) -> str:
        """What to list for the paths that begin with `prefix`."""
        return self.folder + prefix

    def listing_request(self, prefix: str, token: str, *, recursive: bool) -> Request:
        """How to ask for one page of the keys that begin with `prefix`.

        Args:
            prefix: As `listable` gives it.
            token: From the page before; empty for the first page.
            recursive: Whether keys with a further "/" are wanted.

        Raises:
            AccessError: There are no credentials, or the store lists nothing.
        """
        raise NotImplementedError

    def parse_page(self, answer: HttpAnswer, body: bytes) -> ListingPage:
        """The keys that an answer names.

        Raises:
            ValueError: It is no such answer.
        """
        raise NotImplementedError

    def faults_translated(self, what: str, *, has_answered: bool) -> AbstractContextManager[None]:
        """Turns what the store's own library says about `what` into `PassingFault` or this package's errors.

        Args:
            what: Object and extent, for messages.
            has_answered: Whether the store ever answered; if not, a refused connection is taken for a wrong address.
        """
        return nullcontext()

    def close(self) -> None:
        """Give back what the store's own library holds."""


def if_match(pinned: Identity | None) -> dict[str, str]:
    """The header of a condition by ETag; none where that cannot work."""
    return {"If-Match": pinned.condition} if pinned and pinned.condition else {}
