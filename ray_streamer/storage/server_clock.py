"""How far is this clock from the server's? By the `Date` of an answer to a request that needs no permission."""

from __future__ import annotations

import urllib.error
import urllib.request

from ray_streamer.storage.refusal import skew_of
from ray_streamer.storage.trust import context_trusting


def clock_skew_seconds(endpoint: str, *, ca_file: str, timeout_seconds: float) -> float | None:
    """Seconds by which this clock is ahead of the server's; None where it says no date.

    Args:
        endpoint: The server's address, http or https.
        ca_file: By which an https server is trusted; empty for those that the system trusts.
        timeout_seconds: For its answer.

    Raises:
        OSError: The server does not answer.
        SettingsError: The CA file cannot be used.
    """
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        context = context_trusting(ca_file) if endpoint.startswith("https:") else None
        with urllib.request.urlopen(request, timeout=timeout_seconds, context=context) as answer:
            date = answer.headers.get("date")
    except urllib.error.HTTPError as refusal:
        # Any answer has a date.
        with refusal:
            date = refusal.headers.get("date")
    return None if date is None else skew_of(date)
