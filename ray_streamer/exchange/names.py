"""Under which name does a rank listen, and who has it? Abstract Unix sockets: nothing on disk, nothing left by a killed process."""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import secrets
import socket
from pathlib import Path

from ray_streamer.errors import ClusterError
from ray_streamer.exchange.peer import PeerProcess, is_same_user

logger = logging.getLogger(__name__)

_MAX_NAME_BYTES = 64
_PLAIN_NAME = re.compile(r"[\w./:-]+", re.ASCII)
_BACKLOG = 128
_LONGER = b"+"
"""What follows a name that was taken; in no session's own name, which may go on with a slash as another session's."""


def socket_name_of(name: str, local_rank: int) -> bytes:
    """The name under which a rank of session `name` listens."""
    # A socket's name has room for 107 bytes; a session is as long as whoever named it liked.
    if len(name.encode()) > _MAX_NAME_BYTES or not _PLAIN_NAME.fullmatch(name):
        name = hashlib.sha256(name.encode()).hexdigest()
    return f"\0ray_streamer/{name}/{local_rank}".encode()


def longer_names(address: bytes) -> list[bytes]:
    """Names that ranks chose because `address` was taken; none where the kernel shows no names."""
    try:
        text = Path("/proc/net/unix").read_bytes()
    except OSError:
        return []
    prefix = b"@" + address[1:] + _LONGER
    names = {line.split(b" ")[-1] for line in text.splitlines() if prefix in line}
    return sorted(b"\0" + name[1:] for name in names if name.startswith(prefix))


def listen(address: bytes) -> socket.socket:
    """A socket that listens under `address`, or under a longer name when somebody else has taken that one.

    Raises:
        ClusterError: A live process of this user listens there: the session is in use.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.setblocking(False)
    try:
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _refuse_twin(address)
            listener.bind(address + _LONGER + secrets.token_hex(8).encode())
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ClusterError(f"cannot listen for the other ranks of this node: {error}") from error
    except BaseException:
        listener.close()
        raise
    return listener


def _refuse_twin(address: bytes) -> None:
    """Raises when the name is taken by a live process of this user; anybody else's taking it is gone around."""
    connection = connect(address)
    if connection is None:
        return
    with connection:
        if not is_same_user(connection):
            logger.warning("another user has taken the name %s; listening under a longer one", _shown(address))
            return
        process = PeerProcess.of(connection)
        try:
            if process.has_ended():
                return
            pid = process.pid
        finally:
            process.close()
    raise ClusterError(
        f"{_shown(address)}: process {pid} waits under this name already: give every load a session of its own"
    )


def _shown(address: bytes) -> str:
    return address[1:].decode()


def connect(address: bytes) -> socket.socket | None:
    """A non-blocking connection to whoever listens under `address`; None while nobody does."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.connect(address)
    except OSError:
        # Not listening yet; a rank that never will is the deadline's matter.
        connection.close()
        return None
    return connection
