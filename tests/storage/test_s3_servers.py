"""The contract again: over TLS, with the bucket in the host name, and against moto; who asks, and who pays."""

from __future__ import annotations

import datetime
import json
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


@pytest.mark.usefixtures("only_on_the_gateway")
def test_keys_that_end_are_replaced_within_a_read(s3_server, place, open_s3, tmp_path, monkeypatch):
    """The store refuses the first signature; boto3 asks for keys again, since these end soon, and gets good ones."""
    place.write("a", CONTENT)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    for name, secret_key in (("next", "wrongsecretkey0123456789"), ("later", s3_server.secret_key)):
        keys = {"AccessKeyId": s3_server.access_key, "SecretAccessKey": secret_key, "Expiration": soon.isoformat()}
        (tmp_path / name).write_text(json.dumps({"Version": 1, **keys}))
    (tmp_path / "give-keys").write_text(f"cd {tmp_path} && cat next && cp later next")
    (tmp_path / "config").write_text(f"[profile rotating]\ncredential_process = sh {tmp_path}/give-keys\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    storage = open_s3(place.uri, s3_profile="rotating")
    assert storage.read_head("a", 10)[0] == CONTENT[:10]


def test_a_web_identity_is_exchanged_for_keys(place, open_s3, moto_client, tmp_path, monkeypatch):
    place.client = moto_client
    place.write("a", CONTENT)
    (tmp_path / "token").write_text("header.payload.signature")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name, value in {
        "AWS_ENDPOINT_URL": moto_client.meta.endpoint_url,
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/reader",
    }.items():
        monkeypatch.setenv(name, value)
    storage = open_s3(place.uri)
    assert storage.list() == ["a"]
    assert read(storage, "a", Extent(0, 10), storage.size_and_etag("a").etag) == CONTENT[:10]
