"""How is TLS spoken over a connection that another thread may end? By a socket of the standard library, with a plain socket's manners.

Its reads decrypt into the caller's memory with the interpreter lock released, system calls included. Ciphertext that is received in
larger parts and decrypted out of memory saves system calls, but more of the work then holds the lock, which many streams share.
"""

from __future__ import annotations

import socket
import ssl


class TlsStream:
    """The part of a socket's methods that an HTTP client needs, over TLS.

    Args:
        connected: It is taken over, and empty afterwards. Its timeout is that of the handshake.
        context: How the server proves who it is.
        server_name: Who it should be.

    Raises:
        OSError: That cannot be a host's name.
    """

    def __init__(self, connected: socket.socket, context: ssl.SSLContext, server_name: str) -> None:
        try:
            server_name.encode("idna")
        except UnicodeError:
            # A name that only a proxy has looked at so far.
            raise socket.gaierror(socket.EAI_NONAME, f"{server_name} cannot be a host name") from None
        self._tls = context.wrap_socket(connected, server_hostname=server_name, do_handshake_on_connect=False)
        self.settimeout, self.sendall = self._tls.settimeout, self._tls.sendall
        self.fileno, self.close = self._tls.fileno, self._tls.close
        self.recv_into = self._tls.recv_into

    def shake_hands(self) -> None:
        """To be called once, before anything else.

        Raises:
            OSError: It failed; `ssl.SSLCertVerificationError` when the server is not trusted.
        """
        self._tls.do_handshake()

    def recv(self, max_bytes: int) -> bytes:
        """As a socket's: `BlockingIOError` where a timeout of 0 finds nothing."""
        try:
            return self._tls.recv(max_bytes)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None

    def shutdown(self, how: int) -> None:
        """As a socket's, from any thread: a thread that reads goes on to decrypt what has come, or finds the end."""
        # That of `SSLSocket` makes a plain socket of it, whose next read would be ciphertext.
        socket.socket.shutdown(self._tls, how)
