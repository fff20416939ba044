"""What do the servers of the tests have in common? A thread that accepts connections on 127.0.0.1, for the length of a `with` block."""

from __future__ import annotations

import socketserver
import ssl
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path


class LoopbackServer:
    """Listens from its making on, accepts in the `with` block.

    Args:
        handler: Serves one connection; finds this object as `server.owner`.
        tls_file: Chain and key, see `certificates`: TLS is spoken then.

    Attributes:
        address: Host and port.
    """

    def __init__(self, handler: type[socketserver.BaseRequestHandler], *, tls_file: Path | None = None) -> None:
        self._listener = Listener(self, handler, tls_file)
        self.address = "{}:{}".format(*self._listener.server_address)
        self._thread = threading.Thread(
            target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()


class Listener(socketserver.ThreadingTCPServer):
    """The socket of a `LoopbackServer`; connections that are left at its end have threads that end with the process."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, owner: LoopbackServer, handler: type[socketserver.BaseRequestHandler], tls_file: Path | None
    ) -> None:
        self.owner = owner
        self._tls: ssl.SSLContext | None = None
        if tls_file is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(tls_file)
        super().__init__(("127.0.0.1", 0), handler)

    def get_request(self) -> tuple[Any, Any]:
        """The next connection; hands are shaken by whoever reads first, not here, where all others would wait."""
        connection, address = super().get_request()
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address
