"""The contract again: over TLS, with the bucket in the host name, and against moto; and who pays."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from ray_streamer.errors import AccessError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.testing.s3_server import start_s3_server
from ray_streamer.testing.storage_suite import CONTENT, StorageContract, read


@pytest.fixture
def tls_settings(s3_server):
    if s3_server.tls_endpoint_url is None:
        pytest.skip("moto serves one port, and not over TLS")
    return {"s3_endpoint_url": s3_server.tls_endpoint_url, "s3_ca_bundle": str(s3_server.ca_file)}


class TestOverTls(StorageContract):
    @pytest.fixture
    def place(self, place):
        return place

    @pytest.fixture
    def settings(self, tls_settings):
        return Settings.resolve(retry_deadline_seconds=5.0, **tls_settings)


def test_an_authority_that_nobody_named_is_not_trusted(place, open_s3, tls_settings):
    storage = open_s3(place.uri, s3_endpoint_url=tls_settings["s3_endpoint_url"])
    for ask in (lambda: storage.read_head("a", 1), storage.list):
        with pytest.raises(StorageError, match=r"is not trusted.*s3_ca_bundle"):
            ask()


def test_the_authority_may_come_from_the_environment(place, open_s3, tls_settings, monkeypatch):
    place.write("a", b"abc")
    monkeypatch.setenv("AWS_CA_BUNDLE", tls_settings["s3_ca_bundle"])
    storage = open_s3(place.uri, s3_endpoint_url=tls_settings["s3_endpoint_url"])
    assert (storage.list(), storage.read_head("a", 2)[0]) == (["a"], b"ab")


@pytest.fixture
def names_of_buckets(monkeypatch):
    """Every name of the gateway is this machine, as a wildcard in a name server would say."""
    ask = socket.getaddrinfo
    asked = []

    def getaddrinfo(host, *args, **options):
        asked.append(host)
        return ask("127.0.0.1" if str(host).endswith("s3.localhost") else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


class TestBucketInTheHostName(StorageContract):
    @pytest.fixture
    def place(self, place):
        return place

    @pytest.fixture
    def settings(self, s3_server, names_of_buckets):
        port = urlsplit(s3_server.endpoint_url).port
        return Settings.resolve(
            retry_deadline_seconds=5.0, s3_endpoint_url=f"http://s3.localhost:{port}", s3_addressing="virtual"
        )

    def test_the_host_name_was_the_buckets(self, storage, names_of_buckets):
        storage.list()
        storage.read_head("model.safetensors", 1)
        assert set(names_of_buckets) == {"storage-tests.s3.localhost"}


def test_bucket_in_the_host_name_over_tls(place, open_s3, tls_settings, names_of_buckets):
    place.write("a", CONTENT)
    port = urlsplit(tls_settings["s3_endpoint_url"]).port
    settings = {**tls_settings, "s3_endpoint_url": f"https://s3.localhost:{port}", "s3_addressing": "virtual"}
    storage = open_s3(place.uri, **settings)
    assert storage.list() == ["a"]
    assert read(storage, "a", Extent(0, len(CONTENT)), storage.size_and_etag("a").etag) == CONTENT
    assert set(names_of_buckets) == {"storage-tests.s3.localhost"}


@pytest.fixture(scope="module")
def moto_client():
    with start_s3_server("moto") as server:
        client = server.client()
        client.create_bucket(Bucket="storage-tests")
        yield client
        client.close()


class TestMoto(StorageContract):
    @pytest.fixture
    def place(self, place, moto_client):
        place.client = moto_client
        return place

    @pytest.fixture
    def settings(self, moto_client):
        return Settings.resolve(retry_deadline_seconds=5.0, s3_endpoint_url=moto_client.meta.endpoint_url)


@pytest.mark.usefixtures("only_on_the_gateway")
def test_who_asks_pays(s3_server, place, open_s3):
    bucket = {"Bucket": "somebody-pays"}
    place.client.create_bucket(**bucket)
    place.client.put_object(**bucket, Key="a", Body=CONTENT, ACL="authenticated-read")
    place.client.put_bucket_acl(**bucket, ACL="authenticated-read")
    place.client.put_bucket_request_payment(**bucket, RequestPaymentConfiguration={"Payer": "Requester"})
    s3_server.add_user("guest", "guestaccesskey", "guestsecretkey0123456789")
    guest = {"s3_access_key_id": "guestaccesskey", "s3_secret_access_key": "guestsecretkey0123456789"}
    storage = open_s3("s3://somebody-pays", **guest)
    for ask in (storage.list, lambda: storage.read_head("a", 1)):
        with pytest.raises(AccessError, match="AccessDenied"):
            ask()
    storage = open_s3("s3://somebody-pays", **guest, s3_requester_pays=True)
    assert storage.list() == ["a"]
    assert read(storage, "a", Extent(5, 5000), storage.size_and_etag("a").etag) == CONTENT[5:5000]
