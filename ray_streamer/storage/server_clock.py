"""How far is this clock from the server's? By the `Date` of an answer to a request that needs no permission."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ray_streamer.storage.refusal import skew_of
from ray_streamer.storage.uri import scheme_of

if TYPE_CHECKING:
    from ray_streamer.storage.base import StorageSettings


def clock_skew_seconds(uri: str, settings: StorageSettings) -> float | None:
    """Seconds by which this clock is ahead of the server's; None where no HTTP server is asked, or it says no date.

    Raises:
        OSError: The server does not answer.
        StorageError: There are no credentials to find the server with.
    """
    scheme = scheme_of(uri)
    if scheme == "s3":
        from ray_streamer.storage.s3_client import open_access

        access = open_access(uri, settings)
        address, ca_file = access.endpoint, access.ca_file
        access.client.close()
    elif scheme in ("http", "https"):
        parts = urlsplit(uri)
        address, ca_file = f"{parts.scheme}://{parts.netloc}/", None
    else:
        return None
    request = urllib.request.Request(address, method="HEAD")
    try:
        context = ssl.create_default_context(cafile=ca_file) if address.startswith("https:") else None
        with urllib.request.urlopen(request, timeout=settings.connect_timeout_seconds, context=context) as answer:
            date = answer.headers.get("date")
    except urllib.error.HTTPError as refusal:
        # Any answer has a date.
        with refusal:
            date = refusal.headers.get("date")
    return None if date is None else skew_of(date)
