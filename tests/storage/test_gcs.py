"""Google's store keeps the contract over its JSON API, with generations as identities and tokens of google-auth."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import traceback
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
from pyarrow import fs

from ray_streamer.errors import (
    AccessError,
    CredentialsError,
    ObjectChangedError,
    ObjectMissingError,
    SettingsError,
    StorageError,
)
from ray_streamer.extent import Extent
from ray_streamer.storage import gcs
from ray_streamer.testing.faults import FaultProxy
from ray_streamer.testing.file_server import file_bytes
from ray_streamer.testing.google_tokens import TokenServer
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes
from ray_streamer.testing.storage_suite import (
    CONTENT,
    PASSING_FAULTS,
    StorageContract,
    check_load,
    check_read_through,
    read,
    write_llama,
)

PLANTED = re.compile("planted", re.IGNORECASE)
_numbers = itertools.count()


@dataclass
class GooglePlace:
    """A prefix of the emulator's bucket."""

    uri: str
    url: str
    prefix: str

    def write(self, path: str, content: bytes) -> None:
        address = self.url.removeprefix("http://")
        filesystem = fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=address)
        with filesystem.open_output_stream(f"models/{self.prefix}/{path}") as stream:
            stream.write(content)


@pytest.fixture(scope="module")
def google_url():
    command = [sys.executable, Path(__file__).with_name("google_server.py")]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True) as server:
        yield f"http://{server.stdout.readline().strip()}"
        server.stdin.close()


@pytest.fixture
def place(google_url, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google_url)
    prefix = f"prefix {next(_numbers)}/llama+ü"
    return GooglePlace(f"gs://models/{prefix}", google_url, prefix)


class TestGoogle(StorageContract):
    @pytest.fixture
    def place(self, place):
        return place


def test_the_store_itself_refuses_another_generation(place, open_store, monkeypatch):
    place.write("a", CONTENT)
    storage = open_store(place.uri)
    etag = storage.size_and_etag("a").etag
    place.write("a", CONTENT[::-1])
    with pytest.raises(ObjectChangedError, match=r"HTTP 412.*the store says now: ETag"):
        read(storage, "a", Extent(0, 100), etag)


@PASSING_FAULTS
def test_faults_end_bit_for_bit(place, open_store, monkeypatch, fault):
    place.write("a", CONTENT)
    with FaultProxy(place.url) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url.removeprefix("http://"))
        storage = open_store(place.uri, stall_timeout_seconds=0.5)
        check_read_through(storage, proxy, fault)


def test_a_checkpoint_is_loaded(place, tmp_path):
    write_llama(tmp_path)
    for path in tmp_path.iterdir():
        place.write(path.name, path.read_bytes())
    check_load(place.uri, tmp_path)


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    """A service account whose tokens come from this machine."""
    with TokenServer() as server:
        server.write_account(tmp_path / "account.json")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
        yield server


@pytest.fixture
def store(monkeypatch):
    """What stands at Google's address; gives an object to those whose token is in `good`."""

    def answer(asked):
        if asked.headers.get("authorization") not in store.good:
            return answer_bytes(401, f"Invalid Credentials {dict(asked.headers)}".encode())
        if "/o?" in asked.target:
            return answer_bytes(200, json.dumps({"items": [{"name": "m/a"}]}).encode())
        return file_bytes(CONTENT, asked).replace(b"\r\n", b"\r\nx-goog-generation: 17\r\n", 1)

    with HostileStore(answer) as store:
        store.good = {"Bearer planted-token-1", "Bearer planted-token-2"}
        monkeypatch.setattr(gcs, "_ENDPOINT", store.url)
        yield store


def test_tokens_of_a_service_account_are_used_and_renewed(tokens, store, open_store):
    storage = open_store("gs://models/m")
    assert storage.list() == ["a"]
    info = storage.size_and_etag("a")
    assert (info.size_bytes, info.etag) == (len(CONTENT), '"17"')
    assert read(storage, "a", Extent(5, 99), info.etag) == CONTENT[5:99]
    assert tokens.num_tokens == 1
    assert "ifGenerationMatch=17" in store.requests[-1].target
    # Google takes the token no longer.
    store.good = {"Bearer planted-token-2"}
    assert read(storage, "a", Extent(5, 99), info.etag) == CONTENT[5:99]
    assert tokens.num_tokens == 2


def test_many_threads_that_are_refused_get_one_new_token(tokens, store, open_store):
    storage = open_store("gs://models/m")
    etag = storage.size_and_etag("a").etag
    store.good = {"Bearer planted-token-2"}
    with ThreadPoolExecutor(8) as pool:
        for content in pool.map(lambda start: read(storage, "a", Extent(start, 99), etag), range(32)):
            assert content == CONTENT[99 - len(content) : 99]
    assert tokens.num_tokens == 2


def test_tokens_that_end_are_renewed_before(tokens, store, open_store):
    tokens.lifetime_seconds = 30
    storage = open_store("gs://models/m")
    for _ in range(2):
        storage.size_and_etag("a")
    assert tokens.num_tokens == 2


def test_a_token_is_used_to_its_end_if_it_cannot_be_renewed(tokens, store, open_store, caplog):
    tokens.lifetime_seconds = 30
    storage = open_store("gs://models/m")
    storage.size_and_etag("a")
    tokens.is_refusing = True
    for _ in range(3):
        storage.size_and_etag("a")
    assert "still good, and will be renewed later" in caplog.text
    storage._store._credentials._credentials.expiry = datetime(2000, 1, 1)
    with pytest.raises(CredentialsError, match=r"google-auth has no credentials \(RefreshError\)"):
        storage.size_and_etag("a")


def test_a_refusal_shows_no_token(tokens, store, open_store, caplog):
    store.good = set()
    for ask in (lambda storage: storage.size_and_etag("a"), lambda storage: storage.list()):
        with pytest.raises(
            AccessError, match=r"gs://models/m.*HTTP 401.*gcloud auth application-default login"
        ) as caught:
            ask(open_store("gs://models/m"))
        assert not PLANTED.search("".join(traceback.format_exception(caught.value)) + caplog.text)


@pytest.mark.parametrize("uri", ["gs://anonymous@models/m", "gcs://models/m"])
def test_nobody_asks(store, open_store, monkeypatch, uri):
    monkeypatch.setitem(sys.modules, "google.auth", None)
    store.good = {None}
    storage = open_store(uri, gs_unsigned=None if "@" in uri else True)
    assert (storage.list(), storage.read_head("a", 4)[0]) == (["a"], CONTENT[:4])


def test_who_asks_pays(store, open_store):
    store.good = {None}
    storage = open_store("gs://models/m", gs_unsigned=True, gs_user_project="the-project")
    storage.list()
    storage.read_head("a", 4)
    assert all("userProject=the-project" in asked.target for asked in store.requests)


def test_without_google_auth(open_store, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(SettingsError, match=re.escape("pip install 'ray_streamer[google]'")):
        open_store("gs://models/m").list()


EXTERNAL = {
    "type": "external_account",
    "audience": "a",
    "subject_token_type": "x",
    "token_url": "http://127.0.0.1:9/planted",
}
CREDENTIALS_THAT_ARE_NONE = {
    "empty": "{}",
    "no-json": "no json",
    "no-account": '{"type": "service_account", "private_key": "planted"}',
    "list": "[]",
    "null": "null",
    "text": '"planted"',
    "number": "5",
    "deep": "[" * 100_000,
    "deep-object": '{"type":' * 100_000,
    "type": '{"type": []}',
    "source": json.dumps({**EXTERNAL, "credential_source": []}),
    "impersonated": json.dumps({"type": "impersonated_service_account", "source_credentials": []}),
    "impersonation": json.dumps({"type": "impersonated_service_account", "source_credentials": {"type": "authorized_user", "client_id": "a", "client_secret": "planted", "refresh_token": "planted"}, "service_account_impersonation_url": 5}),
}  # fmt: skip


@pytest.mark.parametrize("content", CREDENTIALS_THAT_ARE_NONE.values(), ids=CREDENTIALS_THAT_ARE_NONE.keys())
def test_credentials_that_cannot_be_used(open_store, monkeypatch, tmp_path, content):
    (tmp_path / "account.json").write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    words = r"google-auth has no credentials.*look at .*account\.json, which GOOGLE_APPLICATION_CREDENTIALS names"
    with pytest.raises(CredentialsError, match=words) as caught:
        open_store("gs://models/m").list()
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("/nowhere/account.json", "names /nowhere/account.json, and there is no such file"),
        ('{"type": "service_account", "private_key": "planted"}', "names what is no path .not shown., and"),
    ],
    ids=["missing", "content"],
)
def test_a_file_of_credentials_that_is_not_there(open_store, monkeypatch, named, words):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", named)
    with pytest.raises(CredentialsError, match=f"GOOGLE_APPLICATION_CREDENTIALS {words}") as caught:
        open_store("gs://models/m").list()
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"<html>planted",
        b'{"access_token": null, "expires_in": 3600}',
        b'{"access_token": 5, "expires_in": 3600}',
        b'{"access_token": "", "expires_in": 3600}',
        b'{"access_token": "planted\\ntoken", "expires_in": 3600}',
        b'{"access_token": "planted\xc3\xa9", "expires_in": 3600}',
        b'{"access_token": "planted", "expires_in": 1e300}',
        b'{"access_token": "planted", "expires_in": []}',
    ],
)
def test_token_endpoints_that_answer_no_token(tokens, store, open_store, monkeypatch, answer):
    monkeypatch.setattr(tokens, "answer", answer)
    with pytest.raises(CredentialsError, match=r"google-auth.*GOOGLE_APPLICATION_CREDENTIALS.*token_uri") as caught:
        open_store("gs://models/m").list()
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))
    assert not store.requests


def test_a_token_endpoint_that_answers_no_token_any_more(tokens, store, open_store, monkeypatch):
    storage = open_store("gs://models/m")
    assert storage.read_head("a", 4)[0] == CONTENT[:4]
    monkeypatch.setattr(tokens, "answer", b'{"access_token": null, "expires_in": 3600}')
    store.good = {"Bearer planted-token-2"}
    for _ in range(2):
        with pytest.raises(CredentialsError, match="gave no token that can be sent"):
            storage.read_head("a", 4)
    monkeypatch.setattr(tokens, "answer", None)
    assert storage.read_head("a", 4)[0] == CONTENT[:4]


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (404, {"message": "The specified bucket does not exist."}, ObjectMissingError, "no such bucket"),
        (404, {"message": "No such object: models/m/a"}, ObjectMissingError, "no such object"),
        (403, {"message": "me does not have storage.objects.get access"}, AccessError, "Storage Object Viewer"),
        (400, {"message": "Bucket is a requester pays bucket but no user project"}, StorageError, "gs_user_project"),
        (418, {"message": "odd", "errors": [{"reason": "teapot"}]}, StorageError, "HTTP 418 teapot"),
    ],
)
def test_what_google_says_is_told(store, open_store, status, body, error, words):
    store.answer = lambda _: answer_bytes(status, json.dumps({"error": body}).encode())
    with pytest.raises(error, match=words) as caught:
        open_store("gs://models/m", gs_unsigned=True).size_and_etag("a")
    assert body["message"].rstrip(".") in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"items": 1}', b'{"items": [{}]}', b'{"nextPageToken": 1}', b"[" * 100_000],
    ids=["empty", "list", "number", "nameless", "token", "deep"],
)  # fmt: skip
def test_listings_that_are_none(store, open_store, body):
    store.answer = lambda _: answer_bytes(200, body)
    with pytest.raises(StorageError, match="expected the keys"):
        open_store("gs://models/m", gs_unsigned=True).list()


@pytest.mark.parametrize("body", [b"{}", b'{"items": null}', b'{"items": [], "nextPageToken": null}'])
def test_listings_of_nothing(store, open_store, body):
    store.answer = lambda _: answer_bytes(200, body)
    assert open_store("gs://models/m", gs_unsigned=True).list() == []


@pytest.mark.parametrize(
    "framing", [{}, {"Content-Length": None, "Connection": "close"}], ids=["length", "until-close"]
)
def test_a_page_that_would_take_much_memory_is_not_read(store, open_store, framing):
    """Two million values in four million bytes; a real page holds 500 names."""
    store.answer = lambda _: answer_bytes(200, b'{"items":[' + b"{}," * 1_400_000 + b"{}]}", framing)
    storage = open_store("gs://models/m", gs_unsigned=True)
    tracemalloc.start()
    try:
        with pytest.raises(StorageError, match="a page of more than 1 MiB"):
            storage.list()
        # The server's own copy is in this process, too.
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("host", ["http://", "http://user:planted@host", "host:99999999", "ftp://host"])
def test_an_emulator_that_is_none(open_store, monkeypatch, host):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    with pytest.raises(SettingsError, match="STORAGE_EMULATOR_HOST is no address") as caught:
        open_store("gs://models/m")
    assert not PLANTED.search(str(caught.value))


@pytest.mark.parametrize("uri", ["gs://", "gs:///m", "gs://UPPER/m", "gs://anonymous@/m"])
def test_uris_that_name_no_bucket(open_store, uri):
    with pytest.raises(SettingsError, match="names no bucket"):
        open_store(uri)
