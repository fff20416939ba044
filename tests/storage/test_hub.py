"""Repositories of the Hub are read from one commit, by addresses that end, with the token of huggingface_hub, and nobody else learns it."""

from __future__ import annotations

import itertools
import logging
import os
import re
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from huggingface_hub import constants

import ray_streamer
from ray_streamer.errors import (
    AccessError,
    ObjectChangedError,
    ObjectMissingError,
    SettingsError,
    StorageError,
    ThrottledError,
)
from ray_streamer.extent import Extent
from ray_streamer.storage.hub_commit import PinnedCommit
from ray_streamer.testing.faults import FaultProxy
from ray_streamer.testing.file_server import file_bytes
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes
from ray_streamer.testing.hub_server import HubServer
from ray_streamer.testing.storage_suite import CONTENT, PASSING_FAULTS, StorageContract, check_load, read, write_llama

PLANTED = re.compile("planted")
_numbers = itertools.count()


@dataclass
class HubPlace:
    """A repository to which a test pushes."""

    uri: str
    server: HubServer
    repository: str

    def write(self, path: str, content: bytes) -> None:
        self.server.push(self.repository, {path: content})


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose address huggingface_hub has; this machine has no token."""
    with HubServer() as server:
        use_hub(monkeypatch, server.url)
        yield server


def use_hub(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def place(hub):
    repository = f"org/model-{next(_numbers)}"
    return HubPlace(f"hf://{repository}", hub, repository)


class TestHub(StorageContract):
    @pytest.fixture
    def place(self, place):
        return place

    def test_changed_before_it_was_read(self, storage, place, open_store):
        """A commit stays as it is: who has begun goes on with it, and who comes later is refused."""
        etag = storage.size_and_etag("model.safetensors").etag
        place.write("model.safetensors", CONTENT[::-1])
        assert read(storage, "model.safetensors", Extent(0, 100), etag) == CONTENT[:100]
        with pytest.raises(ObjectChangedError, match=r"model\.safetensors"):
            read(open_store(place.uri), "model.safetensors", Extent(0, 100), etag)

    def test_changed_between_two_reads(self, storage, place, open_store):
        etag = storage.read_head("model.safetensors", 8)[1].etag
        assert read(storage, "model.safetensors", Extent(0, 100), etag) == CONTENT[:100]
        place.write("model.safetensors", CONTENT[::-1])
        assert storage.read_head("model.safetensors", 100)[1].etag == etag
        new = open_store(place.uri).read_head("model.safetensors", 100)
        assert new[0] == CONTENT[::-1][:100]
        assert new[1].etag != etag

    @pytest.mark.parametrize("path", ["a b+ü%20#?&.json", "sub/inner.json", "sub/inner #1.safetensors"])
    def test_odd_names(self, storage, place, path):
        place.write(path, path.encode())
        content, info = storage.read_head(path, 100)
        assert content == path.encode()
        assert read(storage, path, Extent(0, 2), info.etag) == path.encode()[:2]


def test_more_than_one_page_of_names(place, open_store):
    names = [f"part-{number:04}" for number in range(7)]
    place.server.push(place.repository, dict.fromkeys(names, b"x"))
    place.server.page_size = 3
    assert open_store(place.uri).list() == names
    assert [asked.target.partition("?")[2] for asked in place.server.requests] == [
        f"recursive=false{more}" for more in ("", "&cursor=3", "&cursor=6")
    ]


def test_a_revision_and_a_folder(place, open_store):
    first = place.server.push(place.repository, {"sub/a.safetensors": b"first", "b": b"first"})
    place.server.push(place.repository, {"sub/a.safetensors": b"second"}, branch="refs/pr/1")
    place.server.push(place.repository, {"sub/a.safetensors": b"third"}, branch="odd/branch")
    place.server.push(place.repository, {"sub/a.safetensors": b"fourth"})
    for revision, content in (
        (f"@{first}", b"first"),
        ("@refs/pr/1", b"second"),
        ("@odd%2Fbranch", b"third"),
        ("", b"fourth"),
    ):
        storage = open_store(f"{place.uri}{revision}/sub")
        assert storage.list() == ["a.safetensors"]
        assert storage.read_head("a.safetensors", 10)[0] == content


def test_all_files_are_of_one_commit(place, open_store):
    place.server.push(place.repository, {"a.json": b"old", "b.safetensors": b"old"})
    storage = open_store(place.uri)
    assert storage.read_head("a.json", 10)[0] == b"old"
    place.server.push(place.repository, {"a.json": b"new", "b.safetensors": b"new", "c": b"new"})
    assert storage.read_head("b.safetensors", 10)[0] == b"old"
    assert storage.list() == ["a.json", "b.safetensors"]


def test_the_first_requests_of_many_threads_get_files_of_one_commit(place, open_store):
    """Somebody pushes while they are under way; only one of them asks for the branch."""
    names = [f"{number}.json" for number in range(8)]
    place.server.push(place.repository, dict.fromkeys(names, b"old"))
    hub, answer, has_pushed = place.server, place.server.answer, threading.Event()

    def answer_and_push(asked):
        answered = answer(asked)
        if not has_pushed.is_set():
            has_pushed.set()
            hub.push(place.repository, dict.fromkeys(names, b"new"))
            # Long enough for the other threads to ask, too, if they do.
            hub.wait(0.3)
        return answered

    hub.answer = answer_and_push
    storage = open_store(place.uri)
    with ThreadPoolExecutor(8) as pool:
        assert {head for head, _ in pool.map(lambda name: storage.read_head(name, 10), names)} == {b"old"}
    assert ["/main/" in asked.target for asked in hub.requests] == [True] + [False] * 7


def test_requests_are_under_way_together_once_the_commit_is_known(place, open_store):
    names = [f"{number}.json" for number in range(4)]
    place.server.push(place.repository, dict.fromkeys(names, b"x"))
    storage = open_store(place.uri)
    storage.read_head(names[0], 10)
    answer, meeting = place.server.answer, threading.Barrier(4, timeout=30)

    def meet_and_answer(asked):
        meeting.wait()
        return answer(asked)

    place.server.answer = meet_and_answer
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: storage.read_head(name, 10), names))


def test_a_server_that_names_no_commit_is_asked_by_all(place, open_store):
    meeting = threading.Barrier(4, timeout=30)

    def answer(asked):
        if asked.number:
            meeting.wait()
        return file_bytes(b"x", asked, etag='"e"')

    place.server.answer = answer
    storage = open_store(place.uri)
    storage.read_head("a", 10)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: storage.read_head(name, 10), "bcde"))


@pytest.mark.parametrize("first", ["missing", "listing"])
def test_every_first_answer_says_which_commit_it_is(place, open_store, first):
    commit = place.server.push(place.repository, {"a.json": b"old"})
    named = f"\r\nX-Repo-Commit: {commit}\r\n".encode()
    storage, answer = open_store(place.uri), place.server.answer
    if first == "missing":
        with pytest.raises(ObjectMissingError):
            storage.read_head("b.json", 10)
    else:
        place.server.answer = lambda asked: answer(asked).replace(b"\r\n", named, 1)
        storage.list()
        place.server.answer = answer
    place.server.push(place.repository, {"a.json": b"new"})
    assert storage.read_head("a.json", 10)[0] == b"old"


@pytest.mark.parametrize("path", ["b.json", "b.safetensors", "missing", None])
def test_an_answer_of_another_commit_is_refused(place, open_store, path):
    first = place.server.push(place.repository, dict.fromkeys(["a.json", "b.json", "b.safetensors"], b"x"))
    storage, answer = open_store(place.uri), place.server.answer
    storage.read_head("a.json", 10)
    other = "f" * 40

    def answer_of_another(asked):
        lines = answer(asked).replace(first.encode(), other.encode())
        return (
            lines if other.encode() in lines else lines.replace(b"\r\n", f"\r\nX-Repo-Commit: {other}\r\n".encode(), 1)
        )

    place.server.answer = answer_of_another
    with pytest.raises(
        ObjectChangedError, match=rf"{place.uri}: an answer is of commit {other}.*hf://ORG/MODEL@{first}"
    ):
        storage.list() if path is None else storage.read_head(path, 10)


def test_a_commit_that_was_given_is_held_to(place, open_store):
    first = place.server.push(place.repository, {"a.json": b"x"})
    storage, answer = open_store(f"{place.uri}@{first}"), place.server.answer
    place.server.answer = lambda asked: answer(asked).replace(first.encode(), b"f" * 40)
    with pytest.raises(
        ObjectChangedError, match=f"an answer is of commit {'f' * 40}, and the files are read of {first}"
    ):
        storage.read_head("a.json", 10)


def test_who_waits_too_long_for_the_commit_asks_himself():
    commit = PinnedCommit("hf://org/model", "main", wait_seconds=0.05)
    other = threading.Thread(target=commit.take_turn)
    other.start()
    other.join()
    commit.take_turn()
    assert commit.note("a" * 40, has_files=True)
    assert commit.revision == "a" * 40


def test_a_first_request_that_fails_lets_the_next_one_try(place, open_store):
    names = [f"{number}.json" for number in range(4)]
    place.server.push(place.repository, dict.fromkeys(names, b"x"))
    answer = place.server.answer
    place.server.answer = lambda asked: answer_bytes(400) if asked.number == 0 else answer(asked)
    storage = open_store(place.uri)

    def ask(name):
        try:
            return storage.read_head(name, 10)[0]
        except StorageError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, names))
    assert found.count(b"x") == 3


@pytest.fixture
def renamed(place):
    """The uri of a repository by the name that it had; only those with the token see it."""
    files = {"a.json": b"old", "b.safetensors": CONTENT, "c.json": b"old"}
    place.server.push(place.repository, files)
    place.server.renamed["old-org/model"] = place.repository
    place.server.private.add(place.repository)
    return "hf://old-org/model"


def test_a_renamed_repository_is_listed_and_read_from_one_commit(place, renamed, open_store):
    storage = open_store(renamed, hf_token=place.server.token)
    place.server.page_size = 2
    assert storage.list() == ["a.json", "b.safetensors", "c.json"]
    assert storage.read_head("a.json", 10)[0] == b"old"
    place.server.push(place.repository, {"a.json": b"new", "c.json": b"new"})
    etag = storage.size_and_etag("b.safetensors").etag
    assert read(storage, "b.safetensors", Extent(5, 5000), etag) == CONTENT[5:5000]
    assert [storage.read_head(name, 10)[0] for name in ("a.json", "c.json")] == [b"old", b"old"]
    with pytest.raises(ObjectMissingError, match=r"no such file.*attempt 1$"):
        storage.read_head("missing", 10)
    assert not any("authorization" in asked.headers for asked in place.server.delivery.requests)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://169.254.169.254/x", "link-local or metadata address"),
        ("ftp://host/x", "something other than a web server"),
        ("/api/models/org/model/tree/main", "more than 5 times"),
    ],
    ids=["metadata", "ftp", "loop"],
)
def test_a_listing_is_sent_on_only_where_it_is_safe(hub, open_store, location, words):
    hub.answer = lambda _: answer_bytes(307, b"", {"Location": location})
    with pytest.raises(StorageError, match=rf"listing hf://org/model.*{words}"):
        open_store("hf://org/model").list()
    assert len(hub.requests) == (6 if "times" in words else 1)


def test_nobody_but_the_hub_is_told_who_lists(hub, open_store):
    with HostileStore(lambda _: answer_bytes(200, b"[]")) as other:
        hub.answer = lambda _: answer_bytes(307, b"", {"Location": f"{other.url}/x"})
        assert open_store("hf://org/model", hf_token=hub.token).list() == []
    assert "authorization" in hub.requests[0].headers
    assert "authorization" not in other.requests[0].headers


def test_an_address_that_ended_is_asked_for_again(place, open_store):
    place.write("a.safetensors", CONTENT)
    storage = open_store(place.uri)
    etag = storage.read_head("a.safetensors", 4)[1].etag
    for start in range(4):
        if start % 2:
            place.server.end_addresses()
        assert read(storage, "a.safetensors", Extent(start, 5000), etag) == CONTENT[start:5000]
    assert len(place.server.requests) == 3
    assert len(place.server.delivery.requests) == 1 + 4 + 2


def read_by_many(storage, etag):
    with ThreadPoolExecutor(16) as pool:
        starts = range(0, 4000, 100)
        for start, content in zip(
            starts,
            pool.map(lambda start: read(storage, "a.safetensors", Extent(start, 5000), etag), starts),
            strict=True,
        ):
            assert content == CONTENT[start:5000]


def test_one_of_many_threads_asks_the_hub(place, open_store):
    place.write("a.safetensors", CONTENT)
    etag = open_store(place.uri).read_head("a.safetensors", 4)[1].etag
    storage = open_store(place.uri)
    for num_asked in (2, 3):
        read_by_many(storage, etag)
        assert len(place.server.requests) == num_asked
        place.server.end_addresses()


def test_a_hub_that_does_not_answer_one_thread_is_asked_by_the_next(place, open_store):
    place.write("a.safetensors", CONTENT)
    etag = open_store(place.uri).read_head("a.safetensors", 4)[1].etag
    answer, mute = place.server.answer, iter([True, True])
    place.server.answer = lambda asked: None if next(mute, False) else answer(asked)
    storage = open_store(place.uri)
    read_by_many(storage, etag)
    assert storage.statistics().num_retries == 2


def test_an_address_that_ends_under_another_read_changes_nothing(place, open_store):
    """A slow answer comes by an address that another thread has given up meanwhile."""
    place.write("a.safetensors", CONTENT)
    storage = open_store(place.uri)
    etag = storage.read_head("a.safetensors", 4)[1].etag
    answer = place.server.delivery.answer

    def give_up_and_answer(asked):
        storage._store._redirects._urls.clear()
        return answer(asked)

    place.server.delivery.answer = give_up_and_answer
    assert read(storage, "a.safetensors", Extent(5, 5000), etag) == CONTENT[5:5000]
    place.server.delivery.answer = lambda asked: storage._store._redirects._urls.clear() or answer_bytes(404)
    with pytest.raises(ObjectMissingError, match="no longer good"):
        read(storage, "a.safetensors", Extent(5, 5000), etag)


def test_who_asks(place, open_store, monkeypatch):
    place.write("a.safetensors", CONTENT)
    place.server.gated.add(place.repository)
    with pytest.raises(
        AccessError, match=rf"gated: ask for access at {place.server.url}/{place.repository}.*set HF_TOKEN"
    ):
        open_store(place.uri).read_head("a.safetensors", 4)
    monkeypatch.setenv("HF_TOKEN", "hf_plantedwrong0123456789")
    with pytest.raises(AccessError, match=r"gated: .*look at the rights of the token") as caught:
        open_store(place.uri).read_head("a.safetensors", 4)
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))
    storage = open_store(place.uri)
    with pytest.raises(AccessError):
        storage.read_head("a.safetensors", 4)
    # A token that was replaced meanwhile is found.
    monkeypatch.setenv("HF_TOKEN", place.server.token)
    assert storage.read_head("a.safetensors", 4)[0] == CONTENT[:4]
    assert not any("authorization" in asked.headers for asked in place.server.delivery.requests)


@pytest.mark.parametrize("token", ["hf_planted token", "hf_planted\r\nX: y"])
def test_a_token_that_cannot_be_sent_is_refused_unseen(place, open_store, token):
    with pytest.raises(AccessError, match="cannot be sent") as caught:
        open_store(place.uri, hf_token=token).list()
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))


def test_a_token_of_the_settings_comes_first(place, open_store, monkeypatch):
    place.write("a.safetensors", CONTENT)
    place.server.gated.add(place.repository)
    monkeypatch.setenv("HF_TOKEN", "hf_plantedwrong0123456789")
    assert open_store(place.uri, hf_token=place.server.token).read_head("a.safetensors", 4)[0] == CONTENT[:4]


def test_private_repositories_look_like_missing_ones(place, open_store, monkeypatch):
    place.write("a.safetensors", CONTENT)
    place.server.private.add(place.repository)
    for ask in (lambda storage: storage.read_head("a.safetensors", 4), lambda storage: storage.list()):
        with pytest.raises(
            ObjectMissingError, match=rf"no such repository.*{place.repository} is misspelt, or private: set HF_TOKEN"
        ):
            ask(open_store(place.uri))
    monkeypatch.setenv("HF_TOKEN", place.server.token)
    assert open_store(place.uri).list() == ["a.safetensors"]


@pytest.mark.parametrize(
    ("suffix", "words"),
    [("@nowhere", "no such revision.*Invalid rev id: nowhere"), ("/sub", "no such file.*sub does not exist")],
)
def test_what_is_not_there(place, open_store, suffix, words):
    place.write("a.safetensors", CONTENT)
    with pytest.raises(ObjectMissingError, match=words):
        open_store(place.uri + suffix).list()


def test_a_hub_that_is_asked_too_often(place, open_store):
    place.write("a.json", CONTENT)
    answer, refusals = place.server.answer, iter([{"Retry-After": "0"}, {"RateLimit": '"resolvers";r=0;t=0'}])
    place.server.answer = lambda asked: answer_bytes(429, b"", h) if (h := next(refusals, None)) else answer(asked)
    storage = open_store(place.uri)
    assert storage.read_head("a.json", 4)[0] == CONTENT[:4]
    assert storage.statistics().num_throttled == 2
    place.server.answer = lambda _: answer_bytes(429, b"", {"RateLimit": '"resolvers";r=0;t=55'})
    with pytest.raises(ThrottledError, match=r"the next one would be 55\.0 s later"):
        open_store(place.uri).read_head("a.json", 4)


@PASSING_FAULTS
def test_faults_of_the_delivery_end_bit_for_bit(place, open_store, fault):
    place.write("a.safetensors", CONTENT)
    with FaultProxy(place.server.delivery.url) as proxy:
        place.server.delivery.url = proxy.url
        storage = open_store(place.uri, stall_timeout_seconds=0.5)
        etag = storage.size_and_etag("a.safetensors").etag
        proxy.fail_next(fault, fault)
        assert read(storage, "a.safetensors", Extent(5, len(CONTENT)), etag) == CONTENT[5:]
        assert proxy.num_faults == 2


@pytest.mark.parametrize(
    ("content", "difference"), [(CONTENT[::-1], "another Last-Modified"), (CONTENT + b"x", "bytes")]
)
def test_a_mirror_with_weak_etags_is_compared_as_web_servers_are(place, open_store, caplog, content, difference):
    def answer(asked):
        modified = f"\r\nLast-Modified: Sun, 29 Nov 2026 22:0{place.server.minute}:00 GMT\r\n".encode()
        return file_bytes(place.server.content, asked, etag='W/"e"').replace(b"\r\n", modified, 1)

    place.server.answer, place.server.content, place.server.minute = answer, CONTENT, 1
    storage = open_store(place.uri)
    etag = storage.size_and_etag("a.safetensors").etag
    assert etag.startswith(f'W/"e" size={len(CONTENT)} modified=')
    assert "has a weak ETag" in caplog.text
    place.server.content, place.server.minute = content, 2
    with pytest.raises(ObjectChangedError, match=difference):
        read(storage, "a.safetensors", Extent(0, 100), etag)


@pytest.mark.parametrize("content", [CONTENT[::-1], CONTENT + b"x"], ids=["other-bytes", "longer"])
def test_a_delivery_of_something_else_is_noticed(place, open_store, content):
    place.write("a.safetensors", CONTENT)
    storage = open_store(place.uri)
    etag = storage.size_and_etag("a.safetensors").etag
    (digest,) = place.server._blobs
    place.server._blobs[digest] = content
    with pytest.raises(ObjectChangedError, match=r"a\.safetensors"):
        read(storage, "a.safetensors", Extent(0, 100), etag)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://gpt2", "names no model of the Hub"),
        ("hf://", "names no model of the Hub"),
        ("hf://org/model@", "names no model of the Hub"),
        ("hf://datasets/org/data", "is a dataset of the Hub"),
        ("hf://buckets/org/data", "is a bucket of the Hub"),
        ("huggingface://org/model", "did you mean hf://org/model"),
        ("s3a://bucket/model", "did you mean s3://bucket/model"),
    ],
)
def test_uris_that_name_no_model(hub, open_store, uri, words):
    with pytest.raises(SettingsError, match=words):
        open_store(uri)
    assert not hub.requests


def test_offline(hub, open_store, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match=r"HF_HUB_OFFLINE is set.*`hf download org/model`"):
        open_store("hf://org/model")
    assert not hub.requests


def test_without_huggingface_hub(open_store, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SettingsError, match=re.escape("pip install 'ray_streamer[hub]'")):
        open_store("hf://org/model")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://planted:planted@hub.example.com", "has a user or password in it"),
        ("https://planted@hub.example.com", "has a user or password in it"),
        ("hub.example.com/planted", "is no address"),
        ("://hub.example.com", "is no address"),
        ("ftp://hub.example.com", "is no address"),
        ("https://", "is no address"),
        ("https://hub.example.com:0", "is no address"),
        ("https://hub.example.com:99999", "is no address"),
        ("https://hub.example.com:planted", "is no address"),
        ("https://[planted", "is no address"),
        ("https://hub.example.com?planted", "is no address"),
        ("https://hub. example.com", "is no address"),
    ],
)
def test_addresses_of_the_hub_that_are_none(open_store, monkeypatch, address, words):
    use_hub(monkeypatch, address)
    with pytest.raises(
        SettingsError, match=f"HF_ENDPOINT .not shown. {words}.*give one such as https://huggingface.co"
    ) as caught:
        open_store("hf://org/model")
    assert not PLANTED.search("".join(traceback.format_exception(caught.value)))


@pytest.mark.parametrize("address", ["", " "])
def test_an_empty_address_of_the_hub_is_none(open_store, monkeypatch, address):
    use_hub(monkeypatch, address)
    assert open_store("hf://org/model")._store.endpoint == "https://huggingface.co"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "abc"}, "huggingface_hub cannot be imported: .*'abc'; look at the variables HF_HUB_"),
        ({"HF_HUB_ETAG_TIMEOUT": ""}, "huggingface_hub cannot be imported: .*''; look at the variables HF_HUB_"),
        ({"HF_ENDPOINT": "https://[planted"}, "HF_ENDPOINT .not shown. is no address"),
        ({"HF_ENDPOINT": "planted.example.com"}, "HF_ENDPOINT .not shown. is no address"),
    ],
)  # fmt: skip
def test_variables_that_huggingface_hub_cannot_use(variables, words):
    """It reads them when it is imported, so another process does that."""
    code = "import ray_streamer\ntry: ray_streamer.ls('hf://org/model')\nexcept ray_streamer.SettingsError as error: print(error)"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert re.search(words, result.stdout), result
    assert not PLANTED.search(result.stdout + result.stderr)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[1]", b'[{"path": 1, "type": "file"}]', b"[" * 100_000, b"<html>"],
    ids=["empty", "object", "numbers", "path", "deep", "html"],
)
def test_listings_that_are_none(place, open_store, body):
    place.server.answer = lambda _: answer_bytes(200, body)
    with pytest.raises(StorageError, match="expected the keys"):
        open_store(place.uri).list()


def test_a_checkpoint_is_loaded_from_the_hub(place, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", place.server.token)
    place.server.private.add(place.repository)
    write_llama(tmp_path)
    place.server.push(place.repository, {path.name: path.read_bytes() for path in tmp_path.iterdir()})
    plan = ray_streamer.plan(place.uri)
    check_load(place.uri, tmp_path)
    assert not PLANTED.search(caplog.text + repr(plan))
