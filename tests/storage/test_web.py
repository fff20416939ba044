"""Files of a web server are read as objects are: by ranges, from one version, wherever it is safe to be sent for them."""

from __future__ import annotations

import itertools
import logging
import re
import traceback
from dataclasses import dataclass

import boto3
import pytest
from botocore.config import Config

import ray_streamer
from ray_streamer.api.files import cached
from ray_streamer.errors import AccessError, ObjectChangedError, ObjectMissingError, SettingsError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.redaction import Secrets
from ray_streamer.storage.redirects import Redirects
from ray_streamer.testing.faults import Fault, FaultProxy
from ray_streamer.testing.file_server import FileServer
from ray_streamer.testing.hostile_store import answer_bytes
from ray_streamer.testing.storage_suite import (
    CONTENT,
    StorageContract,
    check_load,
    check_read_through,
    read,
    write_llama,
)

QUERY = "X-Amz-Signature=plantedsignature0123456789&sig=plantedsas0123456789%3D"
TOKEN = "Bearer plantedtoken0123456789"
PLANTED = re.compile("planted", re.IGNORECASE)
_numbers = itertools.count()


@dataclass
class FilePlace:
    """A folder of a server that runs in this process."""

    uri: str
    server: FileServer
    folder: str

    def write(self, path: str, content: bytes) -> None:
        self.server.files[f"{self.folder}/{path}"] = content


@pytest.fixture(scope="module")
def shared_server():
    with FileServer() as server:
        yield server


@pytest.fixture
def server():
    with FileServer({"m/a": CONTENT}) as server:
        yield server


class TestWebServer(StorageContract):
    @pytest.fixture
    def place(self, shared_server):
        folder = f"folder {next(_numbers)}/llama"
        return FilePlace(f"{shared_server.url}/{folder.replace(' ', '%20')}", shared_server, folder)

    def test_list(self, storage):
        with pytest.raises(AccessError, match=r"list no folders.*asked for by name"):
            storage.list()


class TestSentOn(TestWebServer):
    """Each file is at another server, by an address that is not its own."""

    @pytest.fixture
    def place(self, shared_server, server):
        server.redirect = lambda asked: f"{shared_server.url}/elsewhere{asked.key}?{QUERY}"
        folder = f"folder-{next(_numbers)}"
        return FilePlace(f"{server.url}/{folder}", shared_server, f"elsewhere/{folder}")

    def test_the_way_is_asked_for_once(self, storage, server):
        etag = storage.size_and_etag("model.safetensors").etag
        for start in range(5):
            assert read(storage, "model.safetensors", Extent(start, 100), etag) == CONTENT[start:100]
        assert len(server.requests) == 1


def everything_said(error) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


def test_credentials_go_to_their_own_server_only(server, shared_server, open_store):
    server.authorization = TOKEN
    settings = {"http_authorization": TOKEN, "http_query": QUERY}
    storage = open_store(f"{server.url}/m", **settings)
    assert storage.read_head("a", 4)[0] == CONTENT[:4]
    assert server.requests[-1].target == f"/m/a?{QUERY}"
    shared_server.files["other"] = CONTENT
    num_before = len(shared_server.requests)
    server.redirect = lambda _: f"{shared_server.url}/other"
    storage = open_store(f"{server.url}/m", **settings)
    assert storage.read_head("a", 4)[0] == CONTENT[:4]
    (asked,) = shared_server.requests[num_before:]
    assert "authorization" not in asked.headers
    assert asked.target == "/other"


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://169.254.169.254/latest/meta-data", "link-local or metadata"),
        ("http://[fe80::1]/", "link-local or metadata"),
        ("http://[::ffff:169.254.169.254]/", "link-local or metadata"),
        ("http://metadata.google.internal./x", "link-local or metadata"),
        ("http://2852039166/x", "link-local or metadata"),
        ("http://user:plantedpassword@127.0.0.1/", "a user in the address"),
        ("file:///etc/passwd", "other than a web server"),
        ("ftp://127.0.0.1/a", "other than a web server"),
        ("http://127.0.0.1:99999999/", "no address"),
        ("http://[", "no address"),
    ],
)
def test_redirects_that_are_not_safe_are_refused(server, open_store, location, words):
    server.redirect = lambda _: location
    with pytest.raises(StorageError, match=words) as caught:
        open_store(f"{server.url}/m").read_head("a", 4)
    assert "m/a" in str(caught.value)
    assert len(server.requests) == 1
    assert not PLANTED.search(everything_said(caught.value))


def test_https_is_not_left(open_store):
    redirects = Redirects("https://host/m", are_expected=False, wait_seconds=1)
    with pytest.raises(StorageError, match="from https to http"):
        redirects.note("a", asked="https://host/m/a", location="http://host/m/a")
    with pytest.raises(StorageError, match="to this machine itself"):
        redirects.note("a", asked="https://host/m/a", location="https://localhost/m/a")
    redirects.note("a", asked="https://host/m/a", location="//other/b c#d")
    assert redirects.url_of("a") == "https://other/b%20c"


def test_who_waits_for_another_thread_does_not_wait_for_ever():
    redirects = Redirects("https://host/m", are_expected=True, wait_seconds=0.01)
    assert redirects.url_of("a") is None
    assert redirects.url_of("a") is None
    redirects.note("a", asked="https://host/m/a", location="https://other/a")
    assert redirects.url_of("a") == "https://other/a"


def test_a_circle_ends(server, open_store):
    server.redirect = lambda asked: f"{asked.key}?x"
    with pytest.raises(StorageError, match="more than 5 times"):
        open_store(f"{server.url}/m").read_head("a", 4)
    assert len(server.requests) == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_an_address_that_ended_is_asked_for_again(server, shared_server, open_store, status):
    shared_server.files["good"] = CONTENT
    with FileServer({"first": CONTENT}) as other:
        addresses = iter([f"{other.url}/first?{QUERY}", f"{shared_server.url}/good", f"{shared_server.url}/never"])
        server.redirect = lambda _: next(addresses)
        storage = open_store(f"{server.url}/m")
        etag = storage.read_head("a", 4)[1].etag
        other.answer = lambda _: answer_bytes(status, b"Request has expired")
        assert read(storage, "a", Extent(7, 99), etag) == CONTENT[7:99]
    assert len(server.requests) == 2


def test_an_address_that_is_never_good_is_an_error_without_it(server, shared_server, open_store):
    server.redirect = lambda _: f"{shared_server.url}/nothing?{QUERY}"
    with pytest.raises(ObjectMissingError, match=r"no longer good.*/m/a") as caught:
        open_store(f"{server.url}/m").read_head("a", 4)
    assert not PLANTED.search(everything_said(caught.value))


def test_a_server_without_ranges_is_refused_with_the_reason(server, open_store):
    server.has_ranges = False
    with pytest.raises(StorageError, match=r"expected 206 with a Content-Range, got 200.*ignores ranges"):
        open_store(f"{server.url}/m").read_head("a", 4)


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_not_let_in_is_told_what_to_set(server, open_store, status):
    server.answer = lambda asked: answer_bytes(status, f"no: {asked.target} {asked.headers}".encode())
    storage = open_store(f"{server.url}/m", http_authorization=TOKEN, http_query=QUERY)
    with pytest.raises(AccessError, match=rf"/m/a.*HTTP {status}.*http_authorization") as caught:
        storage.read_head("a", 4)
    assert not PLANTED.search(everything_said(caught.value))


@pytest.mark.parametrize(
    "uri",
    [
        f"https://host/m/a.safetensors?{QUERY}",
        f"HTTPS://host/?{QUERY}",
        f"http://host/m?{QUERY}#x",
        "https://me:planted@host/m",
    ],
)
def test_secrets_in_a_uri_are_refused_and_not_repeated(uri):
    with pytest.raises(SettingsError, match=r"http_query|credentials") as caught:
        ray_streamer.plan(uri)
    assert not PLANTED.search(everything_said(caught.value))


@pytest.mark.parametrize("setting", ["http_query", "http_authorization"])
@pytest.mark.parametrize("value", ["planted\r\nX-Evil: 1", "planted\x00", "plan\u2028ted"])
def test_secrets_that_cannot_be_sent_are_refused_unseen(setting, value):
    with pytest.raises(SettingsError, match=f"{setting}.*cannot be sent") as caught:
        open_storage("https://host/m", Settings.resolve(**{setting: value}))
    assert not PLANTED.search(everything_said(caught.value))


def test_secrets_of_any_kind_are_left_out_of_what_is_said():
    headers = {"Authorization": "Token plantedword0123456789", "X-Other": "harmless"}
    secrets = Secrets(f"/a?{QUERY}&Policy=plantedpolicy0123456789&prefix=some-long-prefix-of-keys", headers)
    for said in (*QUERY.split("&"), "plantedpolicy0123456789", "plantedword0123456789", "plantedsas0123456789="):
        assert not PLANTED.search(secrets.clean(f"you said {said}, which is wrong"))
    assert secrets.clean("nothing below some-long-prefix-of-keys") == "nothing below some-long-prefix-of-keys"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=429, headers=(("Retry-After", "0"),)),
        Fault(body_bytes=1000),
        Fault(body_bytes=1000, end="reset"),
        Fault(body_bytes=1000, end="stall"),
    ],
    ids=["503", "429", "truncated", "reset", "stalled"],
)
def test_faults_end_bit_for_bit(server, open_store, fault):
    with FaultProxy(server.url) as proxy:
        storage = open_store(f"{proxy.url}/m", stall_timeout_seconds=0.5)
        check_read_through(storage, proxy, fault)
        assert storage.statistics().num_retries == 2


def test_a_file_that_is_replaced_during_a_read_is_noticed(server, open_store):
    with FaultProxy(server.url) as proxy:
        storage = open_store(f"{proxy.url}/m")
        etag = storage.size_and_etag("a").etag
        proxy.fail_next(Fault(body_bytes=1000))
        server.files["m/a"] = CONTENT[::-1]
        with pytest.raises(ObjectChangedError, match="m/a"):
            read(storage, "a", Extent(0, 5000), etag)


@pytest.mark.parametrize("num_files", [1, 2])
def test_a_checkpoint_is_loaded_from_a_web_server(server, shared_server, tmp_path, caplog, num_files):
    caplog.set_level(logging.DEBUG)
    write_llama(tmp_path, num_files=num_files)
    for path in tmp_path.iterdir():
        shared_server.files[f"to/{num_files}/{path.name}"] = path.read_bytes()
    server.redirect = lambda asked: f"{shared_server.url}/to{asked.key}?{QUERY}"
    settings = Settings.resolve(http_authorization=TOKEN, http_query=QUERY)
    uri = f"{server.url}/{num_files}"
    plan = ray_streamer.plan(uri, settings=settings)
    check_load(uri, tmp_path, settings=settings)
    assert not PLANTED.search(caplog.text + repr(plan) + repr(settings))
    if num_files == 1:
        one = ray_streamer.load_rank(f"{uri}/model.safetensors", rank=0, world_size=1, settings=settings)
        assert one.keys() == ray_streamer.load_rank(str(tmp_path), rank=0, world_size=1).keys()


def test_config_and_tokenizer_are_asked_for_by_their_usual_names(server, tmp_path):
    server.files |= {"m/config.json": b"{}", "m/tokenizer.json": b"[]", "m/odd.json": b"?", "m/model.safetensors": b"x"}
    folder = cached(f"{server.url}/m", settings=Settings(cache_dir=str(tmp_path)))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "tokenizer.json": b"[]",
    }
    with pytest.raises(AccessError, match="list no folders"):
        cached(f"{server.url}/empty", settings=Settings(cache_dir=str(tmp_path)))


def test_a_signed_address_of_a_real_store_over_tls(s3_server, boto3_client, open_store, monkeypatch):
    if s3_server.tls_endpoint_url is None:
        pytest.skip("moto serves one port, and not over TLS")
    boto3_client.put_object(Bucket="storage-tests", Key="signed/a.safetensors", Body=CONTENT)
    what = {"Bucket": "storage-tests", "Key": "signed/a.safetensors"}
    keys = {"aws_access_key_id": s3_server.access_key, "aws_secret_access_key": s3_server.secret_key}
    config = Config(signature_version="s3v4", s3={"addressing_style": "path"})
    signer = boto3.client(
        "s3", endpoint_url=s3_server.tls_endpoint_url, region_name=s3_server.region, config=config, **keys
    )
    address, _, query = signer.generate_presigned_url("get_object", Params=what).partition("?")
    signer.close()
    folder, _, name = address.rpartition("/")
    with pytest.raises(StorageError, match="is not trusted"):
        open_store(folder, http_query=query).read_head(name, 4)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(s3_server.ca_file))
    storage = open_store(folder, http_query=query)
    etag = storage.size_and_etag(name).etag
    assert read(storage, name, Extent(5, len(CONTENT)), etag) == CONTENT[5:]
    signature = query.partition("Signature=")[2][:64]
    with pytest.raises(AccessError, match="HTTP 403") as caught:
        open_store(folder, http_query=query[:-3] + "000").read_head(name, 4)
    assert signature[:12] not in everything_said(caught.value)
    boto3_client.put_object(Bucket="storage-tests", Key="signed/a.safetensors", Body=CONTENT[::-1])
    with pytest.raises(ObjectChangedError):
        read(storage, name, Extent(5, 99), etag)


def test_a_metadata_service_is_not_asked_even_by_the_user(open_store):
    with pytest.raises(StorageError, match="link-local or metadata"):
        open_store("http://169.254.169.254/latest").read_head("meta-data", 4)


def test_a_folder_that_has_neither_index_nor_model_is_told_so(server):
    with pytest.raises(ObjectMissingError, match=r"/m: neither .*index\.json nor model\.safetensors.*cannot be listed"):
        ray_streamer.plan(f"{server.url}/m")
