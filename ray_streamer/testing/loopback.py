"""What do the servers of the tests have in common? A thread that accepts connections on 127.0.0.1, for the length of a `with` block."""

from __future__ import annotations

import socketserver
import threading
from typing import Self


class LoopbackServer:
    """Listens from its making on, accepts in the `with` block.

    Args:
        handler: Serves one connection; finds this object as `server.owner`.

    Attributes:
        address: Host and port.
    """

    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        self._listener = Listener(self, handler)
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

    def __init__(self, owner: LoopbackServer, handler: type[socketserver.BaseRequestHandler]) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), handler)
