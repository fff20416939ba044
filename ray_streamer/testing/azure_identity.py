"""Who gives a machine of Azure its tokens? A server on 127.0.0.1 that answers as the managed identity of App Service does.

Source: Microsoft, "How to use managed identities for App Service", REST endpoint reference.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

from ray_streamer.testing.hostile_store import HostileStore, answer_bytes

if TYPE_CHECKING:
    from ray_streamer.testing.hostile_store import Asked

_HEADER = "plantedheader"


class MachineIdentity(HostileStore):
    """Gives `planted-token-1`, `planted-token-2` and so on to those who know its header.

    Attributes:
        num_tokens: That were given.
        lifetime_seconds: Of the tokens from now on.
    """

    def __init__(self) -> None:
        super().__init__(self.give)
        self.num_tokens = 0
        self.lifetime_seconds = 86400
        self._counting = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which azure-identity finds it."""
        return {"IDENTITY_ENDPOINT": f"{self.url}/token", "IDENTITY_HEADER": _HEADER}

    def give(self, asked: Asked) -> bytes:
        """The answer to one request."""
        assert asked.headers["x-identity-header"] == _HEADER
        assert "resource=https://storage.azure.com" in asked.target
        with self._counting:
            self.num_tokens += 1
            number = self.num_tokens
        token = {
            "access_token": f"planted-token-{number}",
            "expires_on": str(int(time.time()) + self.lifetime_seconds),
            "resource": "https://storage.azure.com",
            "token_type": "Bearer",
        }
        headers = {"Content-Type": "application/json", "Connection": "close"}
        return answer_bytes(200, json.dumps(token).encode(), headers)
