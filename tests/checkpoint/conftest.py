"""Places for small checkpoints: the same files on disk and in memory."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Protocol

import pytest

from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.memory import MemoryStorage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ray_streamer.extent import Extent
    from ray_streamer.storage.base import ObjectInfo, Storage


class Place(Protocol):
    """Somewhere to put files; gives the folder's uri."""

    def __call__(self, files: dict[str, bytes]) -> str: ...


@pytest.fixture(params=["posix", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    def put_on_disk(files: dict[str, bytes]) -> str:
        for path, content in files.items():
            target = folder / PurePosixPath(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return str(folder)

    uri = f"memory://{request.node.name}"

    def put_in_memory(files: dict[str, bytes]) -> str:
        MemoryStorage.put(uri, files)
        return uri

    yield put_on_disk if request.param == "posix" else put_in_memory
    MemoryStorage.remove(uri)


class RecordingStorage:
    """A real storage that writes down what was read, and may fail a head, or a listing as "", on purpose."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.uri = storage.uri
        self.is_remote = storage.is_remote
        self.heads: list[str] = []
        self.ranges: list[tuple[str, Extent]] = []
        self.failures: dict[str, Exception] = {}

    def read_head(self, path: str, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        self.heads.append(path)
        if path in self.failures:
            raise self.failures[path]
        return self._storage.read_head(path, max_bytes)

    def size_and_etag(self, path: str) -> ObjectInfo:
        return self._storage.size_and_etag(path)

    def read_into(self, path: str, extent: Extent, buffer: memoryview, **keywords) -> None:
        self.ranges.append((path, extent))
        self._storage.read_into(path, extent, buffer, **keywords)

    def list(self, prefix: str = "") -> list[str]:
        if "" in self.failures:
            raise self.failures[""]
        return self._storage.list(prefix)

    def local_path(self, path: str) -> str | None:
        return self._storage.local_path(path)

    def close(self) -> None:
        self._storage.close()


@pytest.fixture
def recording() -> Iterator[RecordingOpener]:
    opener = RecordingOpener()
    yield opener
    opener.close()


class RecordingOpener:
    """Opens checkpoints through recording storages."""

    def __init__(self) -> None:
        self.storages: list[RecordingStorage] = []

    def __call__(self, folder_uri: str) -> RecordingStorage:
        storage = RecordingStorage(open_storage(folder_uri, Settings.resolve()))
        self.storages.append(storage)
        return storage

    def close(self) -> None:
        for storage in self.storages:
            storage.close()
