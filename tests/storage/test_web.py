"""Files of a web server are read as objects are: by ranges, from one version, wherever it is safe to be sent for them."""

from __future__ import annotations

import itertools
import logging
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256

import boto3
import pytest
from botocore.config import Config

import ray_streamer
from ray_streamer.api.files import cached
from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.errors import AccessError, ObjectChangedError, ObjectMissingError, SettingsError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.files.known import USUAL_NAMES
from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage, split_signature
from ray_streamer.storage.redaction import Secrets
from ray_streamer.storage.redirects import Redirects
from ray_streamer.storage.trust import context_trusting
from ray_streamer.testing.certificates import make_certificates
from ray_streamer.testing.faults import Fault, FaultProxy
from ray_streamer.testing.file_server import FileServer, file_bytes
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
        ("http://[::ffff:a9fe:a9fe]/x", "link-local or metadata"),
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


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]", "LOCALHOST."]
)
def test_this_machine_by_any_name(host):
    redirects = Redirects("http://host/m", are_expected=False, wait_seconds=1)
    with pytest.raises(StorageError, match="to this machine itself"):
        redirects.note("a", asked="http://host/m/a", location=f"http://{host}/m/a")


def test_an_address_is_taken_byte_for_byte(server, open_store):
    """Servers write names as they are, in whatever encoding; a header is one character for each byte."""
    server.files["模型/a"] = CONTENT
    raw = "/模型/a".encode().decode("latin-1")
    server.redirect = lambda asked: raw if asked.key == "/m/a" else None
    assert open_store(f"{server.url}/m").read_head("a", 4)[0] == CONTENT[:4]


@pytest.mark.parametrize("end", ["gone", "failing"])
def test_a_server_that_another_one_named_may_be_gone(server, shared_server, open_store, end):
    """The one that named it names another one then; a retry of the first would never end well."""
    shared_server.files["good"] = CONTENT
    mirror = FileServer({"first": CONTENT})
    addresses = iter([f"{mirror.url}/first", f"{shared_server.url}/good"])
    server.redirect = lambda _: next(addresses)
    with mirror:
        storage = open_store(f"{server.url}/m")
        etag = storage.read_head("a", 4)[1].etag
        if end == "failing":
            mirror.answer = lambda _: answer_bytes(502)
            assert read(storage, "a", Extent(7, 99), etag) == CONTENT[7:99]
    if end == "gone":
        mirror.answer = lambda _: None
        assert read(storage, "a", Extent(7, 99), etag) == CONTENT[7:99]
    assert len(server.requests) == 2


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


@pytest.mark.parametrize(
    "encoding", ["utf-8", "UTF8", "aws-chunked,", "aws-chunked, utf-8", "identity, identity", "binary"]
)
def test_bodies_are_plain_under_other_names_of_that(server, open_store, encoding):
    """People write the encoding of characters there, and stores keep it."""
    server.answer = lambda asked: file_bytes(CONTENT, asked).replace(
        b"ETag", f"Content-Encoding: {encoding}\r\nETag".encode()
    )
    assert open_store(f"{server.url}/m").read_head("a", 4)[0] == CONTENT[:4]


@pytest.mark.parametrize("encoding", ["gzip", "aws-chunked, gzip", "br", "zstd", "utf-8,deflate", "base64"])
def test_bodies_that_are_something_else_are_refused(server, open_store, encoding):
    server.answer = lambda asked: file_bytes(CONTENT, asked).replace(
        b"ETag", f"Content-Encoding: {encoding}\r\nETag".encode()
    )
    with pytest.raises(StorageError, match="Content-Encoding"):
        open_store(f"{server.url}/m").read_head("a", 4)


def test_a_server_without_ranges_is_refused_with_the_reason(server, open_store):
    server.has_ranges = False
    with pytest.raises(StorageError, match=r"expected 206 with a Content-Range, got 200.*ignores ranges"):
        open_store(f"{server.url}/m").read_head("a", 4)


def sending_all(asked):
    return answer_bytes(200, CONTENT, {"ETag": '"e"', "Accept-Ranges": "bytes"})


@pytest.mark.parametrize("max_bytes", [len(CONTENT), len(CONTENT) + 1])
def test_a_whole_file_is_as_good_as_the_part_that_is_all_of_it(server, open_store, max_bytes):
    """Some servers give ranges of large files only; of a small one they send all, as they may."""
    server.answer = sending_all
    head, info = open_store(f"{server.url}/m").read_head("a", max_bytes)
    assert (head, info.size_bytes) == (CONTENT, len(CONTENT))


@pytest.mark.parametrize(("start", "max_bytes"), [(0, len(CONTENT) - 1), (1, len(CONTENT))])
def test_a_whole_file_instead_of_another_part_is_refused(server, open_store, start, max_bytes):
    server.answer = sending_all
    with pytest.raises(StorageError, match="ignores ranges"):
        read(open_store(f"{server.url}/m"), "a", Extent(start, max_bytes), '"e"')


def test_a_page_that_is_no_file_is_refused(server, open_store):
    """One to log in, say: it would be taken for a tokenizer."""
    server.answer = lambda _: answer_bytes(
        200, b"<html>who are you?</html>", {"ETag": '"e"', "Content-Type": "text/html"}
    )
    with pytest.raises(StorageError, match="ignores ranges"):
        open_store(f"{server.url}/m").read_head("a", 4096)


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_not_let_in_is_told_what_to_set(server, open_store, status):
    server.answer = lambda asked: answer_bytes(status, f"no: {asked.target} {asked.headers}".encode())
    storage = open_store(f"{server.url}/m", http_authorization=TOKEN, http_query=QUERY)
    with pytest.raises(AccessError, match=rf"/m/a.*HTTP {status}.*http_authorization") as caught:
        storage.read_head("a", 4)
    assert not PLANTED.search(everything_said(caught.value))


def signed_only(server):
    """Gives each file to those who have its own signature; repeats what it refuses. Gives the addresses."""
    answer = server.answer

    def signature_of(key):
        return f"X-Amz-Signature=planted{sha256(key.encode()).hexdigest()}&X-Amz-Expires=900"

    def answer_signed(asked):
        if asked.target.partition("?")[2] != signature_of(asked.key):
            return answer_bytes(403, f"no: {asked.target}".encode(), {"ETag": asked.target})
        return answer(asked)

    server.answer = answer_signed
    return {path: f"{server.url}/{path}?{signature_of('/' + path)}" for path in server.files}


@pytest.fixture
def signed(server, tmp_path):
    """A checkpoint of two files, and the addresses of its files."""
    write_llama(tmp_path)
    server.files.clear()
    server.files.update({f"m/{path.name}": path.read_bytes() for path in tmp_path.iterdir()})
    return signed_only(server)


def test_a_list_of_signed_files(server, signed, tmp_path, caplog):
    """Each file has a signature of its own; nobody asks for others, and nothing that is said or kept has one."""
    caplog.set_level(logging.DEBUG)
    addresses = [*signed.values()]
    plan = ray_streamer.plan(addresses, 4)
    assert plan.index.uri == f"{server.url}/m"
    check_load(addresses, tmp_path, trace=tmp_path / "trace.json")
    assert ray_streamer.ls(addresses) == sorted(path.name for path in tmp_path.iterdir() if path.name != "trace.json")
    copies = ray_streamer.pull(addresses, tmp_path / "copies", allow="*.json")
    assert [copy.read_bytes() for copy in copies] == [(tmp_path / copy.name).read_bytes() for copy in copies]
    kept = str(sorted(tmp_path.rglob("*"))) + (tmp_path / "trace.json").read_text()
    assert not PLANTED.search(caplog.text + repr(plan) + repr(pickle.dumps(plan)) + kept)
    assert all(asked.target in "".join(addresses) for asked in server.requests)


def test_files_of_a_list_need_no_index(server, signed, tmp_path, open_store):
    """Names alone say which files a checkpoint has; what is not given is not there."""
    given = [address for path, address in signed.items() if "index" not in path]
    check_load(tuple(given), tmp_path)
    with pytest.raises(ObjectMissingError, match=r"1 file is missing.*model-00002-of-00002") as caught:
        ray_streamer.plan([address for address in given if "00002-of" not in address])
    assert not PLANTED.search(everything_said(caught.value))
    num_before = len(server.requests)
    with pytest.raises(ObjectMissingError, match=r"m/tokenizer.json: it is not among the 3 files that were given"):
        open_store(given).read_head("tokenizer.json", 4)
    assert len(server.requests) == num_before


def test_a_list_of_one_and_files_in_several_folders(server, signed, open_store):
    (address,) = [address for path, address in signed.items() if "00001-of" in path]
    with pytest.raises(ObjectMissingError, match="00002-of-00002"):
        ray_streamer.plan([address])
    server.files["one/odd #1%.safetensors"] = server.files["two/deep/b.safetensors"] = CONTENT
    names = ["one/odd%20%231%25.safetensors", "two/deep/b.safetensors"]
    storage = open_store([f"{server.url}/{signed_path}" for signed_path in names])
    assert storage.list(recursive=True) == ["one/odd #1%.safetensors", "two/deep/b.safetensors"]
    assert storage.list() == []


@pytest.mark.parametrize("form", ["{folder}?{query}", "{folder}/?{query}#part", " {folder}?{query}\n"])
def test_a_signature_of_a_folder_goes_with_each_file(server, open_store, form):
    server.files["m/b"] = b"other"
    others = {"http_query": "sig=of-other-folders", "http_authorization": "Bearer of-other-servers"}
    storage = open_store(form.format(folder=f"{server.url}/m", query=QUERY), **others)
    assert (storage.read_head("a", 4)[0], storage.read_head("b", 9)[0]) == (CONTENT[:4], b"other")
    assert [asked.target for asked in server.requests] == [f"/m/a?{QUERY}", f"/m/b?{QUERY}"]
    assert not any("authorization" in asked.headers for asked in server.requests)
    assert "?" not in storage.uri


def test_one_signed_file_is_loaded_without_what_lies_beside_it(server, tmp_path, caplog):
    """Config has another signature, so the server refuses it as if it were not there."""
    write_llama(tmp_path, num_files=1)
    server.files["m/my model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    address = signed_only(server)["m/my model.safetensors"].replace("my model", "my%20model")
    server.answer = (lambda answer: lambda asked: answer(replace(asked, target=asked.target.replace("%20", " "))))(
        server.answer
    )
    check_load(address, tmp_path)
    assert "config.json is not allowed to be read" in caplog.text
    assert not PLANTED.search(caplog.text)


def test_a_signature_goes_to_its_own_folder_only(server):
    named = NamedCheckpoint.of(f"{server.url}/m?{QUERY}", Settings())
    server.files |= {"other/a": CONTENT, "m/deep/a": CONTENT}
    for folder in ("other", "m/deep", "m-2"):
        other = NamedCheckpoint.of(f"{server.url}/{folder}", named.settings)
        storage = open_storage(other.uri, other.settings)
        assert "?" not in storage._store.object_request("a", {}, None).url
    assert named.settings.override(concurrency=3).http_signed == named.settings.http_signed


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("https://me:planted@host/m", "credentials"),
        (f"https://me:planted@host/m?{QUERY}", "credentials"),
        ("https://host/m#planted", "'#'"),
        (f"s3://bucket/m?{QUERY}", "begin with https://"),
        (f"bucket.s3.amazonaws.com/m?{QUERY}", "begin with https://"),
        (f"gs://bucket/m?{QUERY}", "begin with https://|credentials"),
        (f"htps://host/m?{QUERY}", "begin with https://"),
        ("ftp://host/m?token=planted", "ftp:// is not known"),
        ("huggingface://org/m?token=planted", "did you mean hf://org/m"),
        (f"https:/host/m?{QUERY}", "one slash"),
        (f"https://host/m?{QUERY} x", "cannot be sent"),
        ([], "empty list"),
        ([f"https://host/a?{QUERY}", f"https://other/b?{QUERY}"], "one server.*2: https://host, https://other"),
        ([f"https://host/a?{QUERY}", f"https://HOST/a?{QUERY}&x"], "a is given twice"),
        ([f"https://host/m/a?{QUERY}", f"https://host/m/../b?{QUERY}"], "no name of a file"),
        ([f"https://host/m/?{QUERY}"], "no name of a file"),
        ([f"https://host/m/a?{QUERY}", "s3://bucket/b"], r"one entry is none .s3."),
        ([f"https://host/m/a?{QUERY}", 3], r"one entry is none .int."),
        ([f"https://host/m/a?{QUERY}", "https://me:planted@host/b"], "credentials"),
        ([f"https://host/m/a?{QUERY}\r\nX: y"], "cannot be sent"),
    ],
)
def test_uris_with_secrets_that_mean_nothing_are_refused_unseen(uri, words, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(SettingsError, match=words) as caught:
        ray_streamer.plan(uri)
    assert not PLANTED.search(everything_said(caught.value) + caplog.text)


@pytest.mark.parametrize("text", ["planted", "{}", '["planted"]', '{"uri": 1, "query": 2, "files": 3}', "[" * 100_000])
def test_a_setting_of_signatures_that_is_none_is_refused_unseen(text):
    with pytest.raises(SettingsError, match=r"http_signed .not shown.") as caught:
        open_storage("https://host/m", Settings.resolve(http_signed=text))
    assert not PLANTED.search(everything_said(caught.value))


NAMED_BY_ITS_QUERY = [
    "response-content-disposition=attachment%3B+filename%3D%22model.safetensors%22",
    "response-content-disposition=inline%3B%20filename%2A%3DUTF-8%27%27model.safetensors%3B%20filename%3D%22odd%22",
    "rscd=attachment%3Bfilename%3Dmodel.safetensors",
    "response-content-disposition=attachment%3B+filename%3D%22..%2F..%2Fmodel.safetensors%22",
]


@pytest.mark.parametrize("said", NAMED_BY_ITS_QUERY)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_file_that_is_called_by_its_hash(server, tmp_path, open_store, said, as_list):
    """As networks for delivery do; the query says what it is called, so it is a file, and no folder."""
    write_llama(tmp_path, num_files=1)
    server.files["blobs/0123abcd"] = (tmp_path / "model.safetensors").read_bytes()
    address = f"{server.url}/blobs/0123abcd?{said}&{QUERY}"
    storage = open_store([address] if as_list else address)
    index = open_checkpoint(storage.uri, storage)
    assert (index.uri, [file.path for file in index.files]) == (f"{server.url}/blobs", ["model.safetensors"])
    assert {asked.target for asked in server.requests} == {f"/blobs/0123abcd?{said}&{QUERY}"}


@pytest.mark.parametrize(
    "query", ["response-content-disposition=inline", "rscd=attachment%3Bfilename%3Dreadme.txt", "sig=x"]
)
def test_an_address_that_says_no_name_is_a_folder(query):
    signature = split_signature(f"https://host/blobs/0123abcd?{query}")
    assert (signature.uri, signature.query, signature.files) == ("https://host/blobs/0123abcd", query, {})


def test_a_signature_of_one_file_that_was_taken_for_a_folders(server):
    """What the address says no name of cannot be known; the refusal says how to name it."""
    server.answer = lambda asked: answer_bytes(403) if asked.key != "/blobs/0123" else server.answer_file(asked)
    words = (
        rf"the signature was sent for each file of the folder {server.url}/blobs/0123;.*response-content-disposition"
    )
    with pytest.raises(AccessError, match=words) as caught:
        ray_streamer.plan(f"{server.url}/blobs/0123?{QUERY}")
    assert not PLANTED.search(everything_said(caught.value))


def test_names_of_addresses_come_before_those_of_queries():
    disposition = "rscd=attachment%3Bfilename%3Dother.safetensors"
    signature = split_signature(f"https://host/m/my%20model.safetensors?{disposition}")
    assert (signature.uri, signature.files) == ("https://host/m/my%20model.safetensors", {})
    listed = split_signature(
        [f"https://host/m/model.safetensors?{disposition}", f"https://host/m/deep/0123?{disposition}"]
    )
    assert sorted(listed.files) == ["deep/other.safetensors", "model.safetensors"]


ENDED = "2026-01-02T03:04:05Z"
ENDED_QUERIES = [
    "se=2026-01-02T03%3A04%3A05Z&sig=plantedsas0123456789",
    "X-Amz-Date=20260102T020405Z&X-Amz-Expires=3600&X-Amz-Signature=plantedsignature0123456789",
    "X-Goog-Date=20260102T020405Z&X-Goog-Expires=3600&X-Goog-Signature=plantedsignature0123456789",
    "Expires=1767323045&Signature=plantedsignature0123456789",
]


@pytest.mark.parametrize("query", ENDED_QUERIES)
@pytest.mark.parametrize("status", [400, 403])
def test_a_signature_that_has_ended_is_told(server, open_store, query, status):
    server.answer = lambda asked: answer_bytes(status, b"no", {"Date": "Fri, 02 Jan 2026 03:04:06 GMT"})
    with pytest.raises(StorageError, match=f"the signature of the address ended at {ENDED}: sign it again") as caught:
        open_store(f"{server.url}/m?{query}").read_head("a", 4)
    assert not PLANTED.search(everything_said(caught.value))


@pytest.mark.parametrize(
    "query", [*ENDED_QUERIES, "se=planted", "Expires=99999999999999", "X-Amz-Date=1&X-Amz-Expires=-1", "se=9999-99"]
)
def test_a_signature_that_has_not_ended_by_the_servers_clock(server, open_store, query):
    """Or does not say when it does."""
    server.answer = lambda asked: answer_bytes(403, b"no", {"Date": "Fri, 02 Jan 2026 03:04:04 GMT"})
    with pytest.raises(AccessError, match="HTTP 403") as caught:
        open_store(f"{server.url}/m?{query}").read_head("a", 4)
    assert "the signature of the address ended" not in str(caught.value)


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


def test_ls_and_pull_where_nothing_is_listed(server, tmp_path, caplog):
    """The index names the files of the model, others have usual names, and a name that is given is asked for."""
    write_llama(tmp_path / "there")
    server.files.update({f"l/{path.name}": path.read_bytes() for path in (tmp_path / "there").iterdir()})
    server.files |= {"l/tokenizer.json": b"[]", "l/modeling_own.py": b"pass", "l/odd/name.json": b"?"}
    model = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert ray_streamer.ls(f"{server.url}/l") == sorted([*model, "tokenizer.json"])
    assert re.search(rf"{server.url}/l cannot be listed; it was asked for \d+ names, and has 5 of them", caplog.text)
    pulled = ray_streamer.pull(f"{server.url}/l", tmp_path / "to", allow=["*.py", "modeling_own.py", "*token*"])
    assert {path.name: path.read_bytes() for path in pulled} == {"modeling_own.py": b"pass", "tokenizer.json": b"[]"}
    pulled = ray_streamer.pull(f"{server.url}/l", tmp_path / "whole", ignore="*.json")
    assert sorted(path.name for path in pulled) == [name for name in model if name.endswith(".safetensors")]
    with pytest.raises(AccessError, match="list no folders"):
        ray_streamer.ls(f"{server.url}/nothing")
    with pytest.raises(ObjectMissingError, match="no file matches"):
        ray_streamer.pull(f"{server.url}/l", tmp_path / "to", allow="absent.py")


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><title>Not found</title>", b"\n <HTML><body>Sorry</body></HTML>"])
def test_a_page_in_place_of_a_file_is_none(server, tmp_path, page):
    """A server that never says 404 has every name that is asked for."""
    server.files |= {f"l/{name}": page for name in USUAL_NAMES}
    server.files |= {"l/config.json": b"{}", "l/chat_template.jinja": b"<|begin|>{{ messages }}"}
    assert ray_streamer.ls(f"{server.url}/l") == ["chat_template.jinja", "config.json"]


@pytest.mark.parametrize(
    "index", [b"no json", b'{"weight_map": {"a": "../../x.safetensors"}}'], ids=["broken", "hostile"]
)
def test_ls_without_a_model_that_can_be_loaded(server, index):
    server.files |= {"l/config.json": b"{}", "l/model.safetensors.index.json": index}
    assert ray_streamer.ls(f"{server.url}/l") == ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("uri", ["https://127.0.0.1:1/m", "gs://anonymous@bucket/m", "az://models/m"])
@pytest.mark.parametrize(
    ("ca_file", "words"), [("/nosuch.pem", "No such file"), (__file__, "no certificate in PEM format")]
)
def test_authorities_that_cannot_be_used_are_told_at_once(open_store, monkeypatch, uri, ca_file, words):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", ca_file)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    with pytest.raises(SettingsError, match=rf"the CA file .* of REQUESTS_CA_BUNDLE cannot be used: .*{words}"):
        open_store(uri)


def test_authorities_of_a_folder_are_trusted(tmp_path):
    """As `openssl rehash` makes it, and distributions have it in /etc/ssl/certs."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here, which names files as OpenSSL looks for them")
    ca_file = make_certificates(tmp_path).ca_file
    folder = tmp_path / "folder"
    folder.mkdir()
    found = subprocess.run(
        ["openssl", "x509", "-hash", "-noout", "-in", ca_file], check=True, capture_output=True, text=True
    )
    (folder / f"{found.stdout.strip()}.0").write_bytes(ca_file.read_bytes())
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(tmp_path / "server.pem")
    ours, theirs = socket.socketpair()
    with theirs, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server_side.wrap_socket, theirs, server_side=True)
        with context_trusting(str(folder)).wrap_socket(ours, server_hostname="s3.localhost"):
            accepted.result(30).close()


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
    # The same address as people have it, and in a list.
    assert open_store([f"{address}?{query}"]).read_head(name, 4)[0] == CONTENT[:4]
    with pytest.raises(AccessError, match="HTTP 403") as caught:
        ray_streamer.plan(f"{address}?{query[:-3]}000", settings=Settings(retry_deadline_seconds=1))
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
