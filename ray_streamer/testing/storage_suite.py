"""Does a storage keep the contract of `ray_streamer.storage.base.Storage`?

Subclass `StorageContract` in a test module and override the fixture `place`: pytest runs the whole suite on your
backend.
"""

# ruff: noqa: D102 -- a test's name is its claim

from __future__ import annotations

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from ray_streamer.errors import ObjectChangedError, ObjectMissingError, ShortReadError, StorageError
from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint
from ray_streamer.testing.faults import Fault, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.storage.base import Storage

CONTENT = random.Random(7).randbytes(3 * 4096 * 64 + 123)
_MARGIN = b"\xa5" * 64


class StoredFiles(Protocol):
    """A folder or prefix that a test may write to, behind the storage's back."""

    uri: str

    def write(self, path: str, content: bytes) -> None:
        """Make or replace a file."""
        ...


def read(storage: Storage, path: str, extent: Extent, etag: str, *, skew: int = 0) -> bytes:
    """The bytes of `extent`, read into the middle of a larger buffer whose margins are checked afterwards."""
    margin = _MARGIN + bytes(skew)
    memory = bytearray(margin + b"\x5a" * extent.num_bytes + _MARGIN)
    stop = len(margin) + extent.num_bytes
    storage.read_into(path, extent, memoryview(memory)[len(margin) : stop], etag=etag)
    assert memory[: len(margin)] == margin, "bytes before the buffer were written"
    assert memory[stop:] == _MARGIN, "bytes after the buffer were written"
    return bytes(memory[len(margin) : stop])


PASSING_FAULTS = pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(body_bytes=1000),
        Fault(body_bytes=1000, end="reset"),
        Fault(body_bytes=1000, end="stall"),
    ],
    ids=["503", "truncated", "reset", "stalled"],
)
"""What a read survives when it happens twice."""


def check_read_through(storage: Storage, proxy: FaultProxy, fault: Fault) -> None:
    """`CONTENT`, which is at "a", is read bit for bit through a proxy that fails twice; stalls end soon in `storage`."""
    etag = storage.size_and_etag("a").etag
    proxy.fail_next(fault, fault)
    assert read(storage, "a", Extent(5, len(CONTENT)), etag) == CONTENT[5:]
    assert proxy.num_faults == 2


def write_llama(folder: Path, *, num_files: int = 2) -> None:
    """A small checkpoint."""
    layout = llama_layout(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab=100)
    write_checkpoint(folder, layout.tensors, num_files=num_files, config=layout.config)


def check_load(uri: str, folder: Path, **arguments: Any) -> None:
    """What is loaded from a store is what is loaded from the folder that was written to it."""
    import torch

    import ray_streamer

    tensors = ray_streamer.load_rank(uri, rank=0, world_size=1, **arguments)
    expected = ray_streamer.load_rank(str(folder), rank=0, world_size=1)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.view(torch.uint8).equal(expected[name].view(torch.uint8)), name


class StorageContract:
    """What every backend must do. Override `place`."""

    @pytest.fixture
    def place(self) -> StoredFiles:
        """An empty place, for one test."""
        raise NotImplementedError

    @pytest.fixture
    def settings(self) -> Settings:
        """Settings of the storage under test."""
        return Settings.resolve(retry_deadline_seconds=5.0)

    @pytest.fixture
    def storage(self, place: StoredFiles, settings: Settings) -> Iterator[Storage]:
        """The storage under test, with one file of a few odd hundred KiB."""
        place.write("model.safetensors", CONTENT)
        storage = open_storage(place.uri, settings)
        yield storage
        storage.close()

    def test_size_and_etag(self, storage: Storage) -> None:
        info = storage.size_and_etag("model.safetensors")
        assert info.size_bytes == len(CONTENT)
        assert info.etag
        assert storage.size_and_etag("model.safetensors") == info

    def test_uri_is_the_one_given(self, storage: Storage, place: StoredFiles) -> None:
        assert storage.uri == place.uri

    @pytest.mark.parametrize("max_bytes", [1, 100, 65536, len(CONTENT), len(CONTENT) + 1, 1 << 24])
    def test_head_comes_with_its_identity(self, storage: Storage, max_bytes: int) -> None:
        head, info = storage.read_head("model.safetensors", max_bytes)
        assert head == CONTENT[:max_bytes]
        assert info.size_bytes == storage.size_and_etag("model.safetensors").size_bytes
        assert storage.read_head("model.safetensors", 1)[1] == info
        assert read(storage, "model.safetensors", Extent(5, 50), info.etag) == CONTENT[5:50]

    def test_empty_file(self, storage: Storage, place: StoredFiles) -> None:
        place.write("empty", b"")
        head, info = storage.read_head("empty", 10)
        assert (head, info.size_bytes) == (b"", 0)
        assert storage.size_and_etag("empty").size_bytes == 0
        assert read(storage, "empty", Extent(0, 0), info.etag) == b""
        with pytest.raises(ShortReadError, match=r"empty"):
            read(storage, "empty", Extent(0, 1), info.etag)

    @pytest.mark.parametrize(
        "extent",
        [
            pytest.param(Extent(0, 0), id="nothing"),
            pytest.param(Extent(len(CONTENT), len(CONTENT)), id="nothing-at-the-end"),
            pytest.param(Extent(0, len(CONTENT)), id="everything"),
            pytest.param(Extent(0, 1), id="first-byte"),
            pytest.param(Extent(len(CONTENT) - 1, len(CONTENT)), id="last-byte"),
            pytest.param(Extent(4096, 4096 * 33), id="aligned"),
            pytest.param(Extent(4095, 4096 * 33 + 1), id="one-more-on-each-side"),
            pytest.param(Extent(4097, 4096 * 33 - 1), id="one-less-on-each-side"),
            pytest.param(Extent(12345, len(CONTENT)), id="to-the-end"),
        ],
    )
    def test_extent(self, storage: Storage, extent: Extent) -> None:
        etag = storage.size_and_etag("model.safetensors").etag
        for skew in (0, 1, 7):
            assert read(storage, "model.safetensors", extent, etag, skew=skew) == CONTENT[extent.start : extent.stop]

    def test_buffer_of_wider_items(self, storage: Storage) -> None:
        etag = storage.size_and_etag("model.safetensors").etag
        memory = bytearray(64)
        storage.read_into("model.safetensors", Extent(8, 72), memoryview(memory).cast("q"), etag=etag)
        assert memory == CONTENT[8:72]

    def test_buffer_of_another_length_is_refused(self, storage: Storage) -> None:
        etag = storage.size_and_etag("model.safetensors").etag
        with pytest.raises(ValueError, match=r"9 bytes.*\[0, 10\)"):
            storage.read_into("model.safetensors", Extent(0, 10), memoryview(bytearray(9)), etag=etag)

    def test_first_byte_is_told_once_by_the_thread_that_reads(self, storage: Storage) -> None:
        etag = storage.size_and_etag("model.safetensors").etag
        threads: list[int] = []
        for extent, num_told in ((Extent(5, 5), 0), (Extent(5, 6), 1), (Extent(0, len(CONTENT)), 2)):
            memory = memoryview(bytearray(extent.num_bytes))
            storage.read_into(
                "model.safetensors", extent, memory, etag=etag, on_first_byte=lambda: threads.append(get_ident())
            )
            assert threads == [get_ident()] * num_told
        extent = Extent(len(CONTENT) - 1, len(CONTENT) + 1)
        with pytest.raises(ShortReadError):
            storage.read_into(
                "model.safetensors", extent, memoryview(bytearray(2)), etag=etag, on_first_byte=threads.clear
            )
        assert len(threads) == 2

    @pytest.mark.parametrize("start", [len(CONTENT) - 10, len(CONTENT), len(CONTENT) + 10])
    def test_past_the_end(self, storage: Storage, start: int) -> None:
        etag = storage.size_and_etag("model.safetensors").etag
        extent = Extent(start, len(CONTENT) + 100)
        with pytest.raises(ShortReadError, match=r"model\.safetensors") as caught:
            read(storage, "model.safetensors", extent, etag)
        assert str(extent) in str(caught.value)

    def test_missing(self, storage: Storage) -> None:
        for ask in (
            lambda: storage.size_and_etag("nope"),
            lambda: storage.read_head("nope", 8),
            lambda: read(storage, "nope", Extent(0, 1), "any"),
        ):
            with pytest.raises(ObjectMissingError, match=r"nope") as caught:
                ask()
            assert storage.uri in str(caught.value)

    def test_changed_before_it_was_read(self, storage: Storage, place: StoredFiles) -> None:
        etag = storage.size_and_etag("model.safetensors").etag
        place.write("model.safetensors", CONTENT[::-1])
        with pytest.raises(ObjectChangedError, match=r"model\.safetensors"):
            read(storage, "model.safetensors", Extent(0, 100), etag)
        if storage.is_resident("model.safetensors"):
            with pytest.raises(ObjectChangedError, match=r"model\.safetensors"):
                storage.view("model.safetensors", etag=etag)

    def test_changed_between_two_reads(self, storage: Storage, place: StoredFiles) -> None:
        etag = storage.read_head("model.safetensors", 8)[1].etag
        assert read(storage, "model.safetensors", Extent(0, 100), etag) == CONTENT[:100]
        place.write("model.safetensors", CONTENT[::-1])
        with pytest.raises(ObjectChangedError, match=r"model\.safetensors"):
            read(storage, "model.safetensors", Extent(0, 100), etag)
        new = storage.read_head("model.safetensors", 100)
        assert new[0] == CONTENT[::-1][:100]
        assert read(storage, "model.safetensors", Extent(5, 10), new[1].etag) == CONTENT[::-1][5:10]

    def test_view(self, storage: Storage) -> None:
        etag = storage.size_and_etag("model.safetensors").etag
        if storage.is_remote:
            assert not storage.is_resident("model.safetensors")
            with pytest.raises(StorageError, match=r"model\.safetensors"):
                storage.view("model.safetensors", etag=etag)
            return
        view = storage.view("model.safetensors", etag=etag)
        assert view.readonly
        assert view == CONTENT

    @pytest.mark.parametrize("num_bytes", [0, 1, 3 << 20, 1 << 40])
    def test_reads_need_no_scratch(self, storage: Storage, num_bytes: int) -> None:
        assert 0 <= storage.limit_scratch(num_bytes) <= num_bytes
        etag = storage.size_and_etag("model.safetensors").etag
        assert read(storage, "model.safetensors", Extent(1, len(CONTENT)), etag) == CONTENT[1:]
        assert storage.statistics().scratch_bytes <= num_bytes

    def test_a_local_path_leads_to_the_file(self, storage: Storage) -> None:
        path = storage.local_path("model.safetensors")
        assert path is None or Path(path).read_bytes() == CONTENT

    def test_list(self, storage: Storage, place: StoredFiles) -> None:
        for path in ("b.json", "a b+ü%20.json", "sub/inner.json"):
            place.write(path, b"{}")
        assert storage.list() == ["a b+ü%20.json", "b.json", "model.safetensors"]
        assert storage.list("mod") == ["model.safetensors"]
        assert storage.list("sub/") == ["sub/inner.json"]
        assert storage.list("zzz") == []
        everything = ["a b+ü%20.json", "b.json", "model.safetensors", "sub/inner.json"]
        assert storage.list(recursive=True) == everything
        assert storage.list("su", recursive=True) == ["sub/inner.json"]
        assert storage.list("sub/in", recursive=True) == ["sub/inner.json"]

    def test_odd_names(self, storage: Storage, place: StoredFiles) -> None:
        for path in ("a b+ü%20#?&.json", "sub/inner.json"):
            place.write(path, path.encode())
            content, info = storage.read_head(path, 100)
            assert content == path.encode()
            assert read(storage, path, Extent(0, 2), info.etag) == path.encode()[:2]

    def test_many_threads(self, storage: Storage, place: StoredFiles) -> None:
        files = [(f"file-{number}", random.Random(number).randbytes(200_000)) for number in range(4)]
        for path, content in files:
            place.write(path, content)
        etags = {path: storage.size_and_etag(path).etag for path, _ in files}

        def read_some(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(10):
                path, content = choose.choice(files)
                start, stop = sorted(choose.sample(range(len(content)), 2))
                assert read(storage, path, Extent(start, stop), etags[path]) == content[start:stop]

        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(read_some, range(32)):
                pass

    def test_closed(self, storage: Storage) -> None:
        etag = storage.size_and_etag("model.safetensors").etag
        storage.close()
        storage.close()
        with pytest.raises(StorageError, match=r"closed"):
            read(storage, "model.safetensors", Extent(0, 1), etag)
        with pytest.raises(StorageError, match=r"closed"):
            storage.read_head("model.safetensors", 1)

    def test_errors_survive_pickling(self, storage: Storage) -> None:
        with pytest.raises(ObjectMissingError) as caught:
            storage.size_and_etag("nope")
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (type(copy), str(copy)) == (ObjectMissingError, str(caught.value))
