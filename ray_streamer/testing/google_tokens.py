"""Who gives a service account of Google its tokens? A server on 127.0.0.1, one token after the other, as Google's OAuth answers.

Source: Google Identity, "Using OAuth 2.0 for Server to Server Applications".
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self, cast
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from pathlib import Path

_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"


class TokenServer(ThreadingHTTPServer):
    """Gives `planted-token-1`, `planted-token-2` and so on, for the length of a `with` block.

    Attributes:
        num_tokens: That were given.
        lifetime_seconds: Of the tokens from now on.
        answer: What is answered in place of a token, if anything is.
        is_refusing: Whether it gives none at present.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.num_tokens = 0
        self.lifetime_seconds = 3600
        self.answer: bytes | None = None
        self.is_refusing = False
        self._lock = threading.Lock()

    def next_token(self) -> str:
        """A token that nobody had before."""
        with self._lock:
            self.num_tokens += 1
            return f"planted-token-{self.num_tokens}"

    def next_answer(self) -> bytes:
        """A token that nobody had before, as JSON."""
        token = {"access_token": self.next_token(), "expires_in": self.lifetime_seconds, "token_type": "Bearer"}
        return json.dumps(token).encode()

    def write_account(self, path: Path) -> None:
        """Write the key file of a service account that asks this server; `GOOGLE_APPLICATION_CREDENTIALS` names it."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account",
            "project_id": "project",
            "private_key_id": "plantedkeyid",
            "private_key": key.decode(),
            "client_email": "me@project.iam.gserviceaccount.com",
            "token_uri": f"http://127.0.0.1:{self.server_port}/token",
        }
        path.write_text(json.dumps(account))

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = cast(TokenServer, self.server)
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        assert asked["grant_type"] == [_GRANT]
        if server.is_refusing:
            self.send_error(400)
            return
        body = server.answer if server.answer is not None else server.next_answer()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
