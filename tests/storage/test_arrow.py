"""What pyarrow opens keeps the contract too: an emulator of Google's store, an S3 server, a local filesystem."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pyarrow import fs

import ray_streamer
from ray_streamer.errors import AccessError, ObjectChangedError, ObjectMissingError, SettingsError, ShortReadError
from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.arrow import ArrowStorage
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint
from ray_streamer.testing.storage_suite import CONTENT, StorageContract, read

_numbers = itertools.count()


@dataclass
class ArrowPlace:
    """A folder of a store without renames, to which pyarrow itself writes."""

    uri: str
    filesystem: fs.FileSystem
    root: str

    def write(self, path: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.root}/{path}") as stream:
            stream.write(content)


@dataclass
class LocalPlace:
    """A local folder, in which files are renamed into place."""

    folder: Path
    uri: str = "local-for-arrow://folder"

    def write(self, path: str, content: bytes) -> None:
        target = self.folder / path
        target.parent.mkdir(exist_ok=True)
        new = self.folder.parent / "new"
        new.write_bytes(content)
        new.replace(target)


@pytest.fixture(scope="module")
def google_address():
    """Host and port of an emulator of Google Cloud Storage, with a bucket."""
    command = [sys.executable, Path(__file__).with_name("google_server.py")]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True) as server:
        yield server.stdout.readline().strip()
        server.stdin.close()


@pytest.fixture
def google_place(google_address):
    uri = f"gs://anonymous@models/prefix {next(_numbers)}?scheme=http&endpoint_override={google_address}"
    filesystem, root = fs.FileSystem.from_uri(uri.replace(" ", "%20"))
    return ArrowPlace(uri, filesystem, root)


class TestGoogle(StorageContract):
    @pytest.fixture
    def place(self, google_place):
        return google_place


@pytest.fixture
def s3_filesystem(s3_server):
    def s3_filesystem(secret_key=s3_server.secret_key):
        return fs.S3FileSystem(
            access_key=s3_server.access_key,
            secret_key=secret_key,
            region=s3_server.region,
            scheme="http",
            endpoint_override=s3_server.endpoint_url.removeprefix("http://"),
        )

    return s3_filesystem


class TestS3(StorageContract):
    @pytest.fixture
    def place(self, place):
        return place

    @pytest.fixture
    def storage(self, place, s3_filesystem):
        place.write("model.safetensors", CONTENT)
        storage = ArrowStorage(place.uri, s3_filesystem(), f"{place.bucket}/{place.prefix}")
        yield storage
        storage.close()


@pytest.fixture
def local_place(tmp_path):
    (tmp_path / "models").mkdir()
    return LocalPlace(tmp_path / "models")


class TestLocal(StorageContract):
    @pytest.fixture
    def place(self, local_place):
        return local_place

    @pytest.fixture
    def storage(self, place):
        place.write("model.safetensors", CONTENT)
        storage = ArrowStorage(place.uri, fs.SubTreeFileSystem(str(place.folder), fs.LocalFileSystem()), "")
        yield storage
        storage.close()


@pytest.fixture
def local_storage(local_place):
    local_place.write("a", CONTENT)
    storage = ArrowStorage(local_place.uri, fs.LocalFileSystem(), str(local_place.folder))
    yield storage
    storage.close()


def test_a_file_that_is_replaced_during_a_read_is_noticed(local_place, local_storage, monkeypatch):
    etag = local_storage.size_and_etag("a").etag
    assert read(local_storage, "a", Extent(0, 10), etag) == CONTENT[:10]
    ask = local_storage.size_and_etag

    def replace_and_ask(path):
        local_place.write(path, CONTENT[::-1])
        return ask(path)

    monkeypatch.setattr(local_storage, "size_and_etag", replace_and_ask)
    with pytest.raises(ObjectChangedError, match=f"{local_place.uri}/a"):
        read(local_storage, "a", Extent(0, 10), etag)


def test_a_file_that_is_cut_after_it_was_opened_is_noticed(local_place, local_storage, monkeypatch):
    info = local_storage.size_and_etag("a")
    read(local_storage, "a", Extent(0, 10), info.etag)
    (local_place.folder / "a").write_bytes(b"short")
    monkeypatch.setattr(local_storage, "size_and_etag", lambda path: info)
    with pytest.raises(ShortReadError, match="5 bytes less"):
        read(local_storage, "a", Extent(0, 10), info.etag)


def test_folders_are_no_files(local_place, local_storage):
    (local_place.folder / "sub").mkdir()
    assert local_storage.list() == ["a"]
    with pytest.raises(ObjectMissingError, match=r"sub"):
        local_storage.size_and_etag("sub")


@pytest.mark.usefixtures("only_on_the_gateway")
def test_wrong_credentials(place, s3_filesystem):
    place.write("a", CONTENT)
    storage = ArrowStorage(place.uri, s3_filesystem("PLANTEDSECRET0123456789"), f"{place.bucket}/{place.prefix}")
    for ask in (storage.list, lambda: storage.read_head("a", 1), lambda: read(storage, "a", Extent(0, 1), "")):
        with pytest.raises(AccessError, match=re.escape(place.uri)) as caught:
            ask()
        assert "PLANTED" not in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://models/a?no_such_option=1", "pyarrow cannot open gs://models/a"),
        ("abfss://models@account.dfs.core.windows.net/a?no_such_option=1", "pyarrow cannot open abfss://"),
    ],
)
def test_uris_that_cannot_be_opened(uri, words):
    with pytest.raises(SettingsError, match=words):
        open_storage(uri, Settings.resolve())


def test_an_azure_uri_with_options_of_pyarrow_is_understood_without_a_network():
    uri = "abfss://models@account.dfs.core.windows.net/llama?credential_kind=anonymous"
    storage = open_storage(uri, Settings.resolve())
    assert (storage.uri, storage.is_remote) == (uri, True)
    storage.close()


def test_a_checkpoint_is_loaded_from_googles_store(google_place, tmp_path):
    layout = llama_layout(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab=100)
    write_checkpoint(tmp_path, layout.tensors, num_files=2, config=layout.config)
    for path in tmp_path.iterdir():
        google_place.write(path.name, path.read_bytes())
    tensors = ray_streamer.load_rank(google_place.uri, rank=0, world_size=1)
    expected = ray_streamer.load_rank(str(tmp_path), rank=0, world_size=1)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.view(torch.uint8).equal(expected[name].view(torch.uint8)), name
