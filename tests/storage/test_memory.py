"""The in-memory backend keeps the contract, and its own rules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ray_streamer.errors import ObjectMissingError
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.memory import MemoryStorage
from ray_streamer.testing.storage_suite import StorageContract


@dataclass
class MemoryPlace:
    uri: str

    def write(self, path: str, content: bytes) -> None:
        MemoryStorage.put(self.uri, {path: content})


class TestMemoryContract(StorageContract):
    @pytest.fixture
    def place(self):
        yield MemoryPlace("memory://contract/folder")
        MemoryStorage.remove("memory://contract/folder")


@pytest.fixture
def uri():
    yield "memory://own-rules"
    MemoryStorage.remove("memory://own-rules")


def test_page_cache_off_makes_nothing_resident(uri):
    MemoryStorage.put(uri, {"a": b"abc"})
    storage = open_storage(uri, Settings.resolve(page_cache="off"))
    assert not storage.is_resident("a")
    assert storage.view("a", etag=storage.size_and_etag("a").etag) == b"abc"


def test_nothing_put_below_the_uri_is_an_error(uri):
    with pytest.raises(ObjectMissingError, match="memory://own-rules"):
        open_storage(uri, Settings.resolve()).list()


def test_remove_takes_only_what_is_below(uri):
    MemoryStorage.put(uri, {"a": b"abc", "sub/b": b"abc"})
    MemoryStorage.put(uri + "-longer", {"c": b"abc"})
    MemoryStorage.remove(uri + "/sub")
    assert open_storage(uri, Settings.resolve()).list("sub/") == []
    MemoryStorage.remove(uri)
    assert open_storage(uri + "-longer", Settings.resolve()).list() == ["c"]
    MemoryStorage.remove(uri + "-longer")
