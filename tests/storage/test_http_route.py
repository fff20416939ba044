"""Requests go through the proxy that the environment names, and its password goes nowhere else."""

from __future__ import annotations

import urllib.request

import pytest

from ray_streamer.errors import AccessError, SettingsError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.storage.http_route import Route, route_of
from ray_streamer.testing.forward_proxy import ForwardProxy
from ray_streamer.testing.storage_suite import CONTENT, read


@pytest.fixture
def proxy():
    with ForwardProxy() as proxy:
        yield proxy


def test_plain_requests_through_a_proxy(place, open_s3, proxy, s3_server, monkeypatch):
    place.write("a", CONTENT)
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    storage = open_s3(place.uri)
    etag = storage.size_and_etag("a").etag
    assert read(storage, "a", Extent(5, 100_000), etag) == CONTENT[5:100_000]
    assert {request.partition("prefix")[0] for request in proxy.requests} == {
        f"GET {s3_server.endpoint_url}/storage-tests/"
    }


def test_a_tunnel_for_tls(place, open_s3, proxy, s3_server, monkeypatch):
    if s3_server.tls_endpoint_url is None:
        pytest.skip("moto serves one port, and not over TLS")
    place.write("a", CONTENT)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    storage = open_s3(place.uri, s3_endpoint_url=s3_server.tls_endpoint_url, s3_ca_bundle=str(s3_server.ca_file))
    etag = storage.size_and_etag("a").etag
    assert read(storage, "a", Extent(5, 100_000), etag) == CONTENT[5:100_000]
    assert proxy.requests == [f"CONNECT {s3_server.tls_endpoint_url.removeprefix('https://')}"]


def test_a_proxy_is_passed_by(place, open_s3, proxy, monkeypatch):
    place.write("a", CONTENT)
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.1")
    assert open_s3(place.uri).read_head("a", 5)[0] == CONTENT[:5]
    assert proxy.requests == []


def test_a_proxy_that_wants_a_password(place, open_s3, proxy, s3_server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://me:wrong-password@{proxy.address}")
    monkeypatch.setenv("HTTPS_PROXY", proxy.address)
    with pytest.raises(AccessError, match=r"HTTP 407.*HTTP_PROXY") as caught:
        open_s3(place.uri).read_head("a", 5)
    assert "wrong-password" not in str(caught.value)
    if s3_server.tls_endpoint_url is not None:
        with pytest.raises(StorageError, match=r"the proxy answered 407 to CONNECT"):
            open_s3(place.uri, s3_endpoint_url=s3_server.tls_endpoint_url).read_head("a", 5)


def test_a_proxy_that_cannot_be_used(place, open_s3, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "socks5://me:wrong-password@127.0.0.1:1")
    with pytest.raises(SettingsError, match=r"HTTP_PROXY begins with socks5://") as caught:
        open_s3(place.uri).read_head("a", 5)
    assert "wrong-password" not in str(caught.value)


def test_the_environment_is_looked_at_once_for_each_server(place, open_s3, monkeypatch):
    """It may have hundreds of variables, and a load sends thousands of requests."""
    place.write("a", CONTENT)
    storage = open_s3(place.uri)
    etag = storage.size_and_etag("a").etag
    monkeypatch.setattr(urllib.request, "getproxies", lambda: pytest.fail("looked at again"))
    assert read(storage, "a", Extent(5, 100_000), etag) == CONTENT[5:100_000]


def test_routes(monkeypatch):
    assert route_of("https://s3.eu-west-1.amazonaws.com/a?b") == Route(
        "https", "s3.eu-west-1.amazonaws.com", "s3.eu-west-1.amazonaws.com", 443
    )
    assert route_of("http://[::1]:9000/a") == Route("http", "[::1]:9000", "::1", 9000)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@corp:3128")
    route = route_of("https://[::1]/a")
    assert (route.host, route.port, route.server_host, route.server_address) == ("corp", 3128, "::1", "[::1]:443")
    assert route.is_tunnelled
    assert "secret" not in repr(route)
    assert route.authorization == "Basic bWU6c2VjcmV0"
