"""How does a TCP connection to one of a name's addresses come about, quickly, even when some of them are dead?

Object stores answer at many addresses. Connections are spread over all of them, the least used first; an address that
did not answer is left alone for a while; and when one is slow to answer the next is tried beside it. Source of the last:
RFC 8305, "Happy Eyeballs Version 2", section 5.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.storage.bounded_call import call_within

if TYPE_CHECKING:
    from collections.abc import Iterable

_NEXT_AFTER_SECONDS = 0.25
_DEAD_FOR_SECONDS = 30.0
# A firewall forgets idle connections after minutes; without probes neither end would know.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
# Of Amazon's machines over IPv6, and of Alibaba's.
_METADATA_ADDRESSES = frozenset({"fd00:ec2::254", "100.100.100.200"})


@dataclass(frozen=True, slots=True)
class Address:
    """One place to connect to."""

    family: int
    sockaddr: Any

    @property
    def place(self) -> str:
        """The address without its port."""
        return str(self.sockaddr[0])


class ForbiddenAddressError(OSError):
    """A name leads where no request may go; says so."""


class Dialer:
    """Opens connections and remembers which addresses were used and which were dead; safe to call from many threads.

    Args:
        timeout_seconds: How long looking a name up may take, and one connection, over all addresses.
        closing: Ends attempts under way when it is set.
        named_by: The host that may name others, which somebody else has chosen then: none of the addresses where clouds keep the
            metadata and keys of a machine, and routers their own services, nor of this machine unless that host is on it, too.
            None where nobody names others, and every address is allowed.
    """

    def __init__(self, *, timeout_seconds: float, closing: threading.Event, named_by: str | None = None) -> None:
        self._named_by = named_by
        self._timeout_seconds = timeout_seconds
        self._closing = closing
        self._lock = threading.Lock()
        self._num_uses: Counter[Address] = Counter()
        self._dead_until: dict[Address, float] = {}

    def connect(self, host: str, port: int, *, is_proxy: bool = False) -> socket.socket:
        """A connection to the first address that answers, ready to use, with a timeout of `timeout_seconds`.

        Args:
            host: Its name or address.
            port: There.
            is_proxy: Whether the environment names it, which may name whatever it likes.

        Raises:
            OSError: No address answers, in time; the last one's error.
            ForbiddenAddressError: The name leads where no request may go.
        """
        addresses = self._look_up(host, port)
        if not is_proxy:
            self._refuse_forbidden(host, addresses)
        with _Attempts() as attempts:
            connected = self._race(attempts, self._in_order(addresses))
        connected.settimeout(self._timeout_seconds)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        return connected

    def _look_up(self, host: str, port: int) -> dict[Address, None]:
        """The addresses of a name, each once, in the system's order."""
        try:
            # The system's resolver knows other limits only, see resolv.conf, or none.
            found = call_within(
                self._timeout_seconds,
                lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
                what=f"address of {host}",
            )
        except TimeoutError as error:
            raise TimeoutError(error.errno, f"{error.strerror} (connect_timeout_seconds)") from None
        except UnicodeError:
            # Raised for labels that are empty or longer than 63 characters, as a bucket before a host name may be.
            raise socket.gaierror(socket.EAI_NONAME, f"{host} cannot be a host name") from None
        return dict.fromkeys(Address(info[0], info[4]) for info in found)

    def _refuse_forbidden(self, host: str, addresses: Iterable[Address]) -> None:
        if self._named_by is None:
            return
        if any(is_link_local(each.place) for each in addresses):
            raise ForbiddenAddressError(
                f"{host} is a link-local or metadata address, which belongs to this machine and its cloud; no request is sent there"
            )
        is_here = host != self._named_by and any(is_loopback(each.place) for each in addresses)
        if is_here and not all(is_loopback(each.place) for each in self._look_up(self._named_by, 0)):
            raise ForbiddenAddressError(
                f"{host} is this machine itself, and {self._named_by} is not on it; no request is sent there"
            )

    def _in_order(self, addresses: Iterable[Address]) -> list[Address]:
        """Living addresses first, then the less used; the first of them counts as used from now on."""
        now = time.monotonic()
        with self._lock:
            ordered = sorted(addresses, key=lambda each: (self._dead_until.get(each, 0.0) > now, self._num_uses[each]))
            self._num_uses[ordered[0]] += 1
        return ordered

    def _race(self, attempts: _Attempts, addresses: list[Address]) -> socket.socket:
        waiting = deque(addresses)
        deadline = time.monotonic() + self._timeout_seconds
        connected: socket.socket | None = None
        error: OSError = TimeoutError(
            errno.ETIMEDOUT, f"no connection in {self._timeout_seconds:g} s (connect_timeout_seconds)"
        )
        while waiting or attempts:
            if waiting:
                attempts.start(waiting.popleft())
            left_seconds = deadline - time.monotonic()
            if left_seconds <= 0:
                break
            if self._closing.is_set():
                raise ConnectionAbortedError("the storage is closed")
            connected = attempts.wait(min(left_seconds, _NEXT_AFTER_SECONDS))
            for address, reason in attempts.refused():
                error = reason
                self._bury(address)
            if connected is not None:
                break
        # What has not answered by now is slow at best.
        for address in attempts.addresses():
            self._bury(address)
        if connected is None:
            raise error
        return connected

    def _bury(self, address: Address) -> None:
        with self._lock:
            self._dead_until[address] = time.monotonic() + _DEAD_FOR_SECONDS


def is_link_local(address: str) -> bool:
    """Whether an address belongs to this machine's link or its cloud's metadata service.

    >>> is_link_local("169.254.169.254"), is_link_local("::ffff:169.254.169.254"), is_link_local("203.0.113.7")
    (True, True, False)
    """
    parsed = _parsed(address)
    return parsed is not None and (parsed.is_link_local or str(parsed) in _METADATA_ADDRESSES)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address; 0.0.0.0 leads there, too.

    >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("::ffff:127.0.0.1"), is_loopback("203.0.113.7")
    (True, True, True, False)
    """
    parsed = _parsed(host)
    if parsed is None:
        return host.lower().rstrip(".") == "localhost"
    return parsed.is_loopback or parsed.is_unspecified


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, of IPv4 even where it is written as one of IPv6; None for a name."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return (parsed.ipv4_mapped or parsed) if isinstance(parsed, ipaddress.IPv6Address) else parsed


class _Attempts:
    """Connections that are being made; those that are left at the end of the `with` block are given up."""

    def __init__(self) -> None:
        self._sockets: dict[int, tuple[socket.socket, Address]] = {}
        self._refused: list[tuple[Address, OSError]] = []
        self._poll = select.poll()

    def __len__(self) -> int:
        return len(self._sockets) + len(self._refused)

    def addresses(self) -> list[Address]:
        return [address for _, address in self._sockets.values()]

    def start(self, address: Address) -> None:
        try:
            connecting = socket.socket(address.family, socket.SOCK_STREAM)
        except OSError as error:  # a machine without IPv6, for one
            self._refused.append((address, error))
            return
        self._sockets[connecting.fileno()] = connecting, address
        connecting.setblocking(False)
        code = connecting.connect_ex(address.sockaddr)
        if code in (0, errno.EINPROGRESS):
            self._poll.register(connecting, select.POLLOUT)
        else:
            self._refuse(connecting.fileno(), code)

    def wait(self, seconds: float) -> socket.socket | None:
        """The first connection that is made within so long, which is the caller's now."""
        # What failed already makes room for the next address at once.
        for fileno, _ in self._poll.poll(0 if self._refused else 1000 * seconds):
            self._poll.unregister(fileno)
            code = self._sockets[fileno][0].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not code:
                return self._sockets.pop(fileno)[0]
            self._refuse(fileno, code)
        return None

    def refused(self) -> list[tuple[Address, OSError]]:
        """Attempts that failed since this was asked last."""
        refused, self._refused = self._refused, []
        return refused

    def _refuse(self, fileno: int, code: int) -> None:
        refused, address = self._sockets.pop(fileno)
        refused.close()
        # The class that fits the code, such as ConnectionRefusedError.
        self._refused.append((address, OSError(code, os.strerror(code))))

    def __enter__(self) -> _Attempts:
        return self

    def __exit__(self, *_: object) -> None:
        for connecting, _address in self._sockets.values():
            connecting.close()
