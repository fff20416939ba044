"""Connections go to every address of a name, past dead ones, and nobody waits for one that hangs."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import ExitStack

import pytest

from ray_streamer.storage import tcp
from ray_streamer.storage.tcp import Dialer, ForbiddenAddressError


@pytest.fixture
def owned():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def dialer():
    return Dialer(timeout_seconds=30, closing=threading.Event())


@pytest.fixture
def resolve(monkeypatch):
    """A function that makes a name of addresses; the port is the test's."""
    names = {}

    def getaddrinfo(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]]

    monkeypatch.setattr(tcp.socket, "getaddrinfo", getaddrinfo)
    return names.__setitem__


def listen(owned, *addresses):
    """Listeners on one port of several addresses of this machine, beside those where other tests have Rays with ports of their own."""
    first = owned.enter_context(socket.create_server((addresses[0], 0)))
    port = first.getsockname()[1]
    for address in addresses[1:]:
        owned.enter_context(socket.create_server((address, port)))
    return port


def hang(owned, port, address):
    """A listener that answers nobody any more: its queue is full."""
    listener = owned.enter_context(socket.create_server((address, port), backlog=0))
    for _ in range(4):
        waiting = owned.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex((address, port))
    return listener


def test_connections_are_spread(owned, dialer, resolve):
    addresses = ["127.0.0.1", "127.0.1.2", "127.0.1.3"]
    port = listen(owned, *addresses)
    resolve("store", addresses)
    connections = [owned.enter_context(dialer.connect("store", port)) for _ in range(9)]
    assert Counter(each.getpeername()[0] for each in connections) == dict.fromkeys(addresses, 3)
    assert all(each.gettimeout() == 30 for each in connections)
    assert all(each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for each in connections)


def test_a_dead_address_is_left_alone(owned, dialer, resolve, monkeypatch):
    port = listen(owned, "127.0.0.1")
    resolve("store", ["127.0.1.2", "127.0.0.1"])
    tried = []
    start = tcp._Attempts.start
    monkeypatch.setattr(tcp._Attempts, "start", lambda self, address: (tried.append(address), start(self, address)))
    for _ in range(3):
        assert owned.enter_context(dialer.connect("store", port)).getpeername()[0] == "127.0.0.1"
    assert [address.sockaddr[0] for address in tried] == ["127.0.1.2", "127.0.0.1", "127.0.0.1", "127.0.0.1"]


def test_nobody_waits_for_an_address_that_hangs(owned, dialer, resolve):
    port = listen(owned, "127.0.0.1")
    hang(owned, port, "127.0.1.2")
    resolve("store", ["127.0.1.2", "127.0.0.1"])
    for _ in range(2):
        assert owned.enter_context(dialer.connect("store", port)).getpeername()[0] == "127.0.0.1"
    assert [address.sockaddr[0] for address in dialer._dead_until] == ["127.0.1.2"]


def test_all_addresses_are_dead(owned, dialer, resolve):
    port = listen(owned, "127.0.0.1")
    resolve("store", ["127.0.1.2", "127.0.1.3"])
    with pytest.raises(ConnectionRefusedError):
        dialer.connect("store", port)


def test_all_addresses_hang(owned, resolve):
    port = listen(owned, "127.0.0.1")
    hang(owned, port, "127.0.1.2")
    resolve("store", ["127.0.1.2"])
    with pytest.raises(TimeoutError):
        Dialer(timeout_seconds=0.1, closing=threading.Event()).connect("store", port)


def test_closing_ends_an_attempt(owned, resolve):
    port = listen(owned, "127.0.0.1")
    hang(owned, port, "127.0.1.2")
    resolve("store", ["127.0.1.2"])
    closing = threading.Event()
    closing.set()
    with pytest.raises(ConnectionAbortedError):
        Dialer(timeout_seconds=3600, closing=closing).connect("store", port)


def test_a_family_that_this_machine_lacks_is_passed_over(owned, dialer, monkeypatch):
    port = listen(owned, "127.0.0.1")
    found = [
        (socket.AF_APPLETALK, socket.SOCK_STREAM, 6, "", ("nowhere", port)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
    ]
    monkeypatch.setattr(tcp.socket, "getaddrinfo", lambda *_, **__: found)
    assert owned.enter_context(dialer.connect("store", port)).getpeername()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("named_by", "host", "words"),
    [
        ("front", "front", None),
        ("front", "mirror", None),
        ("front", "here", "is this machine itself, and front is not on it"),
        ("front", "anywhere", "is this machine itself"),
        ("front", "both", "is this machine itself"),
        ("front", "metadata", "link-local or metadata"),
        ("here", "here", None),
        ("here", "anywhere", None),
        ("here", "metadata", "link-local or metadata"),
        (None, "here", None),
    ],
)
def test_names_lead_to_this_machine_from_itself_only(dialer, resolve, named_by, host, words):
    """Whatever the address is called that a server names; 203.0.113.0/24 is nobody's."""
    names = {"front": ["203.0.113.7"], "mirror": ["203.0.113.8"], "here": ["127.0.0.1"], "anywhere": ["0.0.0.0"]}
    names |= {"both": ["203.0.113.9", "127.1.2.3"], "metadata": ["169.254.169.254"]}
    for name, addresses in names.items():
        resolve(name, addresses)
    dialer = Dialer(timeout_seconds=30, closing=threading.Event(), named_by=named_by)
    if words is None:
        dialer._refuse_forbidden(host, dialer._look_up(host, 80))
    else:
        with pytest.raises(ForbiddenAddressError, match=words):
            dialer.connect(host, 80)


def test_a_proxy_is_where_the_environment_says(owned, resolve):
    resolve("front", ["203.0.113.7"])
    resolve("proxy", ["127.0.0.1"])
    dialer = Dialer(timeout_seconds=30, closing=threading.Event(), named_by="front")
    owned.enter_context(dialer.connect("proxy", listen(owned, "127.0.0.1"), is_proxy=True))


def test_ipv6(owned, dialer):
    try:
        listener = owned.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    connected = owned.enter_context(dialer.connect("::1", listener.getsockname()[1]))
    assert connected.getpeername()[0] == "::1"
