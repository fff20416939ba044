"""Every node has its own copy of the checkpoint, or all share one: what loads, what is refused, and what is told."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil

import pytest

from ray_streamer.errors import ObjectChangedError
from ray_streamer.extent import Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import file_identity, open_storage
from ray_streamer.storage.mounts import Mount

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SIZES = (1_000_000, 3_200)
CONTENTS = {name: random.Random(name).randbytes(size) for name, size in zip(FILES, SIZES, strict=True)}
LATER_NS = 7_000_000_123


@pytest.fixture
def first_kind():
    """The file system of the node that read the headers."""
    return "ext4"


@pytest.fixture
def etags(tmp_path, first_kind):
    """What the node that read the headers saw of its copy."""
    (tmp_path / "first").mkdir()
    for name, content in CONTENTS.items():
        (tmp_path / "first" / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_streamer.storage.posix.read_mount_table", lambda: (Mount("/", first_kind),))
        storage = open_storage(str(tmp_path / "first"), Settings.resolve())
    etags = {name: storage.read_head(name, 8)[1].etag for name in FILES}
    storage.close()
    return etags


@pytest.fixture
def other_node(tmp_path, monkeypatch):
    """A function that opens a copy as a process of another node would."""
    opened = []

    def open_copy(copy, *, kind=None, **settings):
        copy(tmp_path / "first", tmp_path / "second")
        monkeypatch.setattr(file_identity, "_this_machine", lambda: "other")
        if kind is not None:
            monkeypatch.setattr("ray_streamer.storage.posix.read_mount_table", lambda: (Mount("/", kind),))
        opened.append(open_storage(str(tmp_path / "second"), Settings.resolve(**settings)))
        return opened[-1]

    yield open_copy
    for storage in opened:
        storage.close()


def _with_times(source, target):
    shutil.copytree(source, target)


def _with_times_in_seconds(source, target):
    shutil.copytree(source, target)
    for path in target.iterdir():
        os.utime(path, (path.stat().st_mtime_ns // 10**9,) * 2)


def _without_times(source, target):
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in target.iterdir():
        status = path.stat()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + LATER_NS))


def _linked(source, target):
    shutil.copytree(source, target, copy_function=os.link)


def _cut(source, target):
    _with_times(source, target)
    os.truncate(target / FILES[1], 99)


def _read_all(storage, etags):
    for name, etag in etags.items():
        content = CONTENTS[name]
        memory = bytearray(len(content))
        storage.read_into(name, Extent(0, len(content)), memoryview(memory), etag=etag)
        assert memory == content
        assert storage.view(name, etag=etag) == content
        storage.check_unchanged(name, etag=etag)


@pytest.mark.parametrize("copy", [_with_times, _with_times_in_seconds, _linked])
@pytest.mark.parametrize("kind", [None, "ext4", "nfs4", "fuse.mountpoint-s3"])
def test_copies_with_their_times_load_without_a_word(etags, other_node, caplog, copy, kind):
    _read_all(other_node(copy, kind=kind), etags)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["ext4", "overlay", "tmpfs"])
def test_copies_without_their_times_load_and_it_is_told_once(etags, other_node, caplog, kind):
    storage = other_node(_without_times, kind=kind)
    _read_all(storage, etags)
    _read_all(storage, etags)
    (record,) = caplog.records
    message = record.getMessage()
    assert FILES[0] in message
    assert os.uname().nodename in message
    assert "names, sizes and samples of the contents are compared, the rest is not" in message


@pytest.mark.parametrize("kind", ["ext4", "overlay", "tmpfs"])
@pytest.mark.parametrize("copy", [_with_times, _with_times_in_seconds, _without_times])
@pytest.mark.parametrize(
    ("name", "at"),
    [
        *((FILES[0], at) for at in (0, 4095, 331_968, 336_063, 663_936, 995_904, 999_999)),
        *((FILES[1], at) for at in (0, 1_600, 3_199)),
    ],
)
def test_a_copy_of_another_version_is_refused_whatever_its_time_says(etags, other_node, tmp_path, kind, copy, name, at):
    """Its own time, or the one that its version had: images of containers give all files of all versions one time."""
    storage = other_node(copy, kind=kind)
    path = tmp_path / "second" / name
    status = path.stat()
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(bytes([CONTENTS[name][at] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ObjectChangedError, match=rf"second/{name} on host .* is another version"):
        _read_all(storage, etags)


@pytest.mark.parametrize("first_kind", ["nfs4", "fuse.mountpoint-s3"])
def test_a_copy_of_files_that_a_server_has_is_compared_by_size(etags, other_node, caplog, first_kind):
    _read_all(other_node(_without_times, kind="ext4"), etags)
    (record,) = caplog.records
    assert "names and sizes are compared, contents are not" in record.getMessage()


def test_samples_that_cannot_be_read_refuse_nothing(etags, other_node, monkeypatch):
    storage = other_node(_without_times, kind="ext4")
    preadv = os.preadv

    def refusing(descriptor, buffers, offset, *flags):
        if offset == 331_968 and len(buffers[0]) == 4096:
            raise OSError(errno.EIO, "bad sector")
        return preadv(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", refusing)
    _read_all(storage, etags)


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.mountpoint-s3", "unheard-of"])
def test_another_time_on_a_shared_file_system_is_another_version(etags, other_node, kind):
    storage = other_node(_without_times, kind=kind)
    with pytest.raises(ObjectChangedError, match=rf"second/{FILES[0]} on host .* it was modified at .*, expected "):
        _read_all(storage, etags)


def test_another_size_is_another_version_everywhere(etags, other_node):
    storage = other_node(_cut)
    with pytest.raises(
        ObjectChangedError, match=rf"{FILES[1]} on host .* it has 99 bytes, expected 3.12 KiB \(3200 bytes\)"
    ):
        _read_all(storage, etags)


def test_on_the_same_machine_another_time_is_another_version(etags, tmp_path):
    _without_times(tmp_path / "first", tmp_path / "second")
    storage = open_storage(str(tmp_path / "second"), Settings.resolve())
    with pytest.raises(ObjectChangedError, match="was modified at"):
        _read_all(storage, etags)
    storage.close()


@pytest.mark.parametrize("etag", ["", "version-1", '"d41d8cd98f00b204e9800998ecf8427e"'])
def test_an_etag_of_another_store_is_no_local_file(etags, tmp_path, etag):
    storage = open_storage(str(tmp_path / "first"), Settings.resolve())
    with pytest.raises(ObjectChangedError, match="is no local file's"):
        storage.read_into(FILES[0], Extent(0, 1), memoryview(bytearray(1)), etag=etag)
    storage.close()


@pytest.mark.parametrize("num_open", [64, 1], ids=["stay open", "are closed"])
def test_a_version_that_takes_the_place_of_another_on_one_machine(tmp_path, monkeypatch, num_open):
    """A link that is switched, to files of the same sizes and times: another content is refused, a copy is not."""
    monkeypatch.setattr("ray_streamer.storage.posix.read_mount_table", lambda: (Mount("/", "ext4"),))
    versions = {"v1": CONTENTS, "copy": CONTENTS, "v2": {name: content[::-1] for name, content in CONTENTS.items()}}
    for version, contents in versions.items():
        (tmp_path / version).mkdir()
        for name, content in contents.items():
            (tmp_path / version / name).write_bytes(content)
            os.utime(tmp_path / version / name, ns=(LATER_NS, LATER_NS))

    def switch(version):
        (tmp_path / "next").symlink_to(version)
        (tmp_path / "next").rename(tmp_path / "current")

    settings = Settings.resolve(concurrency=num_open, direct_io="off", page_cache="off")
    switch("v1")
    with contextlib.closing(open_storage(str(tmp_path / "current"), settings)) as storage:
        etags = {name: storage.read_head(name, 8)[1].etag for name in FILES}
        switch("copy")
        _read_all(storage, etags)
        switch("v2")
        later = contextlib.closing(open_storage(str(tmp_path / "current"), settings))
        with later as now, pytest.raises(ObjectChangedError, match="is another version"):
            _read_all(now, etags)
        if num_open == 1:
            with pytest.raises(ObjectChangedError, match="of the same size and time, with other content"):
                _read_all(storage, etags)
