"""The posix backend keeps the contract, and chooses rightly between O_DIRECT, the page cache and a mapping."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from ray_streamer.errors import AccessError, ObjectChangedError, ObjectMissingError, StorageError
from ray_streamer.extent import PAGE_BYTES, Extent
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage, residency
from ray_streamer.storage.direct_buffers import BUFFER_BYTES
from ray_streamer.storage.mounts import Mount, mount_of, read_mount_table
from ray_streamer.storage.residency import count_cached_pages, is_page_cached, seems_page_cached
from ray_streamer.testing.possessions import descriptors, mappings_of
from ray_streamer.testing.storage_suite import CONTENT, StorageContract

NUM_PAGES = 1024
BIG = CONTENT * 6


@dataclass
class FolderPlace:
    uri: str

    def write(self, path: str, content: bytes) -> None:
        target = Path(self.uri, path)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)


class TestPosixContract(StorageContract):
    @pytest.fixture
    def place(self, tmp_path):
        return FolderPlace(str(tmp_path))


class TestPosixContractDirect(TestPosixContract):
    @pytest.fixture
    def settings(self):
        return Settings.resolve(direct_io="on", page_cache="off")


class TestPosixContractMapped(TestPosixContract):
    @pytest.fixture
    def settings(self):
        return Settings.resolve(page_cache="on")


class TestPosixContractReplaced(TestPosixContract):
    """Files are replaced as downloaders do it: written beside, then renamed."""

    @pytest.fixture
    def place(self, tmp_path):
        place = FolderPlace(str(tmp_path))

        def replace(path: str, content: bytes) -> None:
            FolderPlace.write(place, path + ".part", content)
            os.replace(tmp_path / (path + ".part"), tmp_path / path)

        place.write = replace
        return place

    def test_changed_between_two_reads(self, storage, place):
        """The descriptor keeps the replaced file alive, so the bytes are still the right ones."""
        etag = storage.read_head("model.safetensors", 8)[1].etag
        place.write("model.safetensors", CONTENT[::-1])
        memory = bytearray(100)
        storage.read_into("model.safetensors", Extent(0, 100), memoryview(memory), etag=etag)
        assert memory == CONTENT[:100]
        head, info = storage.read_head("model.safetensors", 100)
        assert head == CONTENT[::-1][:100]
        assert info.etag != etag


def evict(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def is_cached(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return is_page_cached(descriptor, path.stat().st_size)
    finally:
        os.close(descriptor)


def num_cached(path: Path) -> int | None:
    with path.open("rb") as file:
        return count_cached_pages(file.fileno(), Extent(0, path.stat().st_size))


@pytest.fixture
def big(tmp_path):
    """A file of several MiB that is on disk and not in the page cache."""
    kind = mount_of(os.path.realpath(tmp_path), read_mount_table()).kind
    if kind not in ("ext4", "xfs", "btrfs"):
        pytest.skip(f"{kind} does not do O_DIRECT as disks do")
    path = tmp_path / "big"
    path.write_bytes(BIG)
    evict(path)
    with path.open("rb") as file:
        if count_cached_pages(file.fileno(), Extent(0, len(BIG))) is None:
            pytest.skip("this kernel does not count cached pages, so that nothing certain can be said of them")
    return path


@pytest.fixture
def open_folder(tmp_path):
    opened = []

    def open_folder(**settings):
        opened.append(open_storage(str(tmp_path), Settings.resolve(**settings)))
        return opened[-1]

    yield open_folder
    for storage in opened:
        storage.close()


def read_at(storage, extent: Extent, *, skew: int = 0) -> bytes:
    """Read into memory whose address equals the file offset plus `skew`, modulo the page."""
    memory = mmap.mmap(-1, extent.num_bytes + 2 * mmap.PAGESIZE)
    begin = (extent.start + skew) % mmap.PAGESIZE
    etag = storage.size_and_etag("big").etag
    with memoryview(memory) as whole, whole[begin : begin + extent.num_bytes] as view:
        storage.read_into("big", extent, view, etag=etag)
        content = bytes(view)
    memory.close()
    return content


@pytest.mark.parametrize(
    "extent",
    [
        pytest.param(Extent(0, 1 << 20), id="aligned"),
        pytest.param(Extent(1, (1 << 20) + 77), id="ends-inside-pages"),
        pytest.param(Extent(5000, len(BIG)), id="to-the-end"),
        pytest.param(Extent(0, len(BIG)), id="everything"),
    ],
)
@pytest.mark.parametrize("skew", [0, 8], ids=["aligned-memory", "any-memory"])
def test_direct_reads_leave_the_page_cache_alone(big, open_folder, extent, skew):
    storage = open_folder()
    assert read_at(storage, extent, skew=skew) == BIG[extent.start : extent.stop]
    assert num_cached(big) == 0
    assert storage.statistics().scratch_bytes == BUFFER_BYTES


def test_direct_io_off_reads_through_the_page_cache(big, open_folder):
    storage = open_folder(direct_io="off")
    assert storage.limit_scratch(1 << 40) == 0
    assert read_at(storage, Extent(0, len(BIG))) == BIG
    assert is_cached(big)
    assert storage.statistics().scratch_bytes == 0


def test_reads_without_scratch_go_through_the_page_cache(big, open_folder):
    storage = open_folder()
    assert storage.limit_scratch(BUFFER_BYTES - 1) == 0
    assert read_at(storage, Extent(0, len(BIG))) == BIG
    assert is_cached(big)


def test_links_from_elsewhere_to_a_disk_take_no_scratch(big):
    """The folder says what a load's memory is for; a file of it may lie on another file system."""
    folder = Path("/dev/shm") / f"ray-streamer-test-links-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "big").symlink_to(big)
        storage = open_storage(str(folder), Settings.resolve())
        assert storage.limit_scratch(1 << 40) == 0
        assert read_at(storage, Extent(0, len(BIG))) == BIG
        assert storage.statistics().scratch_bytes == 0
        storage.close()
    finally:
        (folder / "big").unlink()
        folder.rmdir()


def test_many_readers_share_the_buffers(big, open_folder):
    storage = open_folder(concurrency=32)
    assert storage.limit_scratch(2 * BUFFER_BYTES + 1) == 2 * BUFFER_BYTES
    etag = storage.size_and_etag("big").etag

    def read(start: int) -> bytes:
        memory = bytearray(len(BIG) - start)
        storage.read_into("big", Extent(start, len(BIG)), memoryview(memory), etag=etag)
        return bytes(memory)

    with ThreadPoolExecutor(16) as threads:
        starts = range(0, 16 * 777, 777)
        assert list(threads.map(read, starts)) == [BIG[start:] for start in starts]
    assert num_cached(big) == 0
    assert 0 < storage.statistics().scratch_bytes <= 2 * BUFFER_BYTES


def test_residency_decides_between_mapping_and_direct(big, open_folder):
    cold = open_folder()
    etag = cold.size_and_etag("big").etag
    assert not cold.is_resident("big")

    big.read_bytes()
    warm = open_folder()
    assert warm.is_resident("big")
    view = warm.view("big", etag=etag)
    assert view == BIG
    assert warm.view("big", etag=etag) is view

    # The kernel evicts no page that somebody maps.
    warm.close()
    evict(big)
    assert not open_folder().is_resident("big")


def test_settings_overrule_residency(big, open_folder):
    assert open_folder(page_cache="on").is_resident("big")
    big.read_bytes()
    assert not open_folder(page_cache="off").is_resident("big")
    storage = open_folder(direct_io="on", page_cache="off")
    assert read_at(storage, Extent(0, len(BIG))) == BIG
    assert storage.statistics().scratch_bytes


def test_asking_for_residency_does_not_make_a_file_resident(big, open_folder):
    answers = {open_folder().is_resident("big") for _ in range(20)}
    assert answers == {False}


def test_sampling_brings_in_no_more_than_it_asks_for(big):
    """What it answers here depends on the disk: one that is faster than the question passes for memory."""
    with big.open("rb") as file:
        seems_page_cached(file.fileno(), len(BIG))
    assert num_cached(big) <= 64


def test_a_file_in_memory_seems_so_when_the_kernel_does_not_count(big, open_folder, monkeypatch):
    monkeypatch.setattr(residency, "count_cached_pages", lambda *_: None)
    big.read_bytes()
    assert open_folder().is_resident("big")


def test_sampling_finds_nothing_where_reads_are_refused(big, open_folder, monkeypatch):
    def refusing(*_):
        raise BlockingIOError

    monkeypatch.setattr(residency, "count_cached_pages", lambda *_: None)
    monkeypatch.setattr(os, "preadv", refusing)
    assert not open_folder().is_resident("big")


def test_half_a_file_is_not_resident(big, open_folder):
    with big.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(len(BIG) // 2)
    assert not open_folder().is_resident("big")


def test_of_a_large_file_parts_are_counted(big, open_folder):
    """As many are in the page cache as of the whole file; a hole is read into it like anything else."""
    num_bytes = 100 << 20
    big.unlink()
    with big.open("wb") as file:
        file.truncate(num_bytes)
    with big.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(num_bytes // 4)
        file.read(num_bytes // 2)
        assert not open_folder().is_resident("big")
        file.seek(0)
        while file.read(1 << 20):
            pass
    assert num_cached(big) == num_bytes // PAGE_BYTES
    assert open_folder().is_resident("big")


def test_a_file_that_is_to_be_cached_is_read_through_the_page_cache(big, open_folder):
    storage = open_folder(page_cache="on")
    assert read_at(storage, Extent(0, len(BIG))) == BIG
    assert storage.statistics().scratch_bytes == 0
    assert is_cached(big)


def test_files_in_memory_are_mapped_and_never_read_directly(open_folder):
    folder = Path("/dev/shm") / f"ray-streamer-test-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "a").write_bytes(CONTENT)
        storage = open_storage(str(folder), Settings.resolve(direct_io="on"))
        assert storage.is_resident("a")
        assert storage.limit_scratch(1 << 40) == 0
        storage.close()
    finally:
        (folder / "a").unlink()
        folder.rmdir()


def test_a_file_system_that_refuses_direct_reads_is_read_through_the_page_cache(big, open_folder, monkeypatch):
    storage = open_folder()
    preadv = os.preadv
    num_refused = 0

    def refusing(descriptor, buffers, offset, *flags):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(big) and _flags_of(descriptor) & os.O_DIRECT:
            nonlocal num_refused
            num_refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", refusing)
    for _ in range(2):
        assert read_at(storage, Extent(0, len(BIG))) == BIG
    assert num_refused == 1, "it was asked again"


def _flags_of(descriptor: int) -> int:
    text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("flags:")), 8)


def test_short_reads_are_continued(big, open_folder, monkeypatch):
    preadv = os.preadv

    def stingy(descriptor, buffers, offset, *flags):
        return preadv(descriptor, [buffers[0][:100_000]], offset, *flags)

    monkeypatch.setattr(os, "preadv", stingy)
    for direct_io in ("on", "off"):
        assert read_at(open_folder(direct_io=direct_io), Extent(3, len(BIG) - 5)) == BIG[3:-5]


def test_a_disk_error_is_named(big, open_folder, monkeypatch):
    storage = open_folder()

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    storage.size_and_etag("big")
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError, match=r"big.*Input/output error \(EIO\)") as caught:
        read_at(storage, Extent(0, 100))
    assert type(caught.value) is StorageError


def test_truncated_while_open_is_changed_and_not_short(tmp_path, open_folder):
    (tmp_path / "big").write_bytes(CONTENT)
    storage = open_folder()
    etag = storage.size_and_etag("big").etag
    memory = memoryview(bytearray(len(CONTENT)))
    storage.read_into("big", Extent(0, len(CONTENT)), memory, etag=etag)
    os.truncate(tmp_path / "big", 1000)
    with pytest.raises(ObjectChangedError, match="written to"):
        storage.read_into("big", Extent(0, len(CONTENT)), memory, etag=etag)


def test_a_folder_is_not_a_file(tmp_path, open_folder):
    (tmp_path / "sub").mkdir()
    storage = open_folder()
    for ask in (lambda: storage.size_and_etag("sub"), lambda: storage.is_resident("sub")):
        with pytest.raises(StorageError, match=r"sub on host .* is a folder"):
            ask()


def test_missing_folder(tmp_path):
    storage = open_storage(str(tmp_path / "nope"), Settings.resolve())
    with pytest.raises(ObjectMissingError, match="nope"):
        storage.list()
    with pytest.raises(ObjectMissingError, match="nope"):
        storage.read_head("model.safetensors", 1)


def test_refused_access(tmp_path, open_folder, monkeypatch):
    (tmp_path / "secret").write_bytes(b"abc")
    if os.geteuid():
        (tmp_path / "secret").chmod(0)
    else:
        # Nothing is refused to root.
        def refusing(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(AccessError, match=r"not allowed to read .*secret"):
        open_folder().read_head("secret", 1)


def test_symbolic_links_are_followed(tmp_path, open_folder):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_bytes(b"abc")
    (tmp_path / "model.safetensors").symlink_to("blobs/0123")
    (tmp_path / "dangling").symlink_to("nowhere")
    storage = open_folder()
    # Links that lead nowhere are listed: without them a folder that lost a file would look whole.
    assert storage.list() == ["dangling", "model.safetensors"]
    assert storage.read_head("model.safetensors", 10)[0] == b"abc"


def test_a_missing_file_says_what_is_in_the_way(tmp_path, open_folder):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "loop").symlink_to("loop")
    storage = open_folder()
    for path, message in {
        "dangling": f"{tmp_path}/dangling is a link to nowhere, which does not exist",
        "dangling/model": f"{tmp_path}/dangling is a link to nowhere, which does not exist",
        "file/model": f"{tmp_path}/file is a file",
        "sub/model": rf"{tmp_path}/sub/model on host {os.uname().nodename}$",
        "loop": r"loop on host .* \(ELOOP\)",
    }.items():
        with pytest.raises(StorageError, match=message) as caught:
            storage.read_head(path, 1)
        assert isinstance(caught.value, ObjectMissingError) == (path != "loop")


def test_a_folder_that_may_not_be_entered_is_named_with_user_and_host(tmp_path, open_folder, monkeypatch):
    def refusing(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    storage = open_folder()
    message = (
        rf"user {os.geteuid()} is not allowed to read {tmp_path}.* on host {os.uname().nodename}: Permission denied"
    )
    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(AccessError, match=message):
        storage.list()
    monkeypatch.setattr(os, "stat", refusing)
    with pytest.raises(AccessError, match=message):
        storage.size_and_etag("a")


def test_a_stale_handle_of_a_file_server_is_a_change(big, open_folder, monkeypatch):
    storage = open_folder()
    etag = storage.size_and_etag("big").etag

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(ObjectChangedError, match=r"big on host .* deleted or replaced on its server"):
        storage.read_into("big", Extent(0, 10), memoryview(bytearray(10)), etag=etag)


def test_close_gives_descriptors_and_mappings_back(big, tmp_path):
    def open_ones() -> list[str]:
        return mappings_of(str(tmp_path)) + [target for target in descriptors() if str(tmp_path) in target]

    storage = open_storage(str(tmp_path), Settings.resolve(direct_io="on", page_cache="off"))
    assert read_at(storage, Extent(0, len(BIG))) == BIG
    assert storage.view("big", etag=storage.size_and_etag("big").etag) == BIG
    assert len(open_ones()) >= 3
    storage.close()
    assert open_ones() == []


def test_close_waits_for_no_read_and_breaks_none(big, open_folder, monkeypatch):
    """A descriptor that is closed under a read may be somebody else's file by the next one."""
    storage = open_folder()
    preadv = os.preadv
    is_reading, may_go_on = threading.Event(), threading.Event()
    result = []

    def slow(*args):
        is_reading.set()
        assert may_go_on.wait(30)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", slow)
    reader = threading.Thread(target=lambda: result.append(read_at(storage, Extent(10, len(BIG) - 10))))
    reader.start()
    assert is_reading.wait(30)
    storage.close()
    may_go_on.set()
    reader.join(30)
    assert result == [BIG[10:-10]]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/model", "ext4"),
        ("/mnt/lustre/model", "lustre"),
        ("/mnt/lustre", "lustre"),
        ("/mnt/lustre2/model", "ext4"),
        ("/mnt/my disk/model", "xfs"),
        ("/mnt/twice/model", "nfs4"),
    ],
)
def test_mount_of(path, kind):
    mounts = (
        Mount("/", "ext4"),
        Mount("/mnt/lustre", "lustre"),
        Mount("/mnt/my disk", "xfs"),
        Mount("/mnt/twice", "ext4"),
        Mount("/mnt/twice", "nfs4"),
    )
    assert mount_of(path, mounts).kind == kind


def test_the_mounts_of_this_machine(tmp_path):
    mounts = read_mount_table()
    assert mount_of("/proc/self/status", mounts) == Mount("/proc", "proc")
    assert mount_of(os.path.realpath(tmp_path), mounts).kind != "unknown"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    assert len(mounts) == len(lines)


def test_a_mount_point_may_hold_what_separates_fields(tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_bytes(
        b"/dev/a / ext4 rw 0 0\nfs:/x /mnt/two\\040words\\134 nfs4 rw,vers=4 0 0\nnone /mnt/\xe9\xff tmpfs rw 0 0\n"
    )
    spaced, odd = Mount("/mnt/two words\\", "nfs4"), Mount(os.fsdecode(b"/mnt/\xe9\xff"), "tmpfs")
    assert read_mount_table(table) == (Mount("/", "ext4"), spaced, odd)
    assert read_mount_table(tmp_path / "absent") == ()


@pytest.mark.parametrize(
    ("kind", "is_disk", "is_memory"),
    [
        ("ext4", True, False),
        ("overlay", True, False),
        ("tmpfs", False, True),
        ("nfs4", False, False),
        ("lustre", False, False),
        ("fuse.s3fs", False, False),
        ("9p", False, False),
        ("unheard-of", False, False),
    ],
)
def test_only_known_file_systems_are_local(kind, is_disk, is_memory):
    mount = Mount("/", kind)
    assert (mount.is_disk, mount.is_memory) == (is_disk, is_memory)


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.juicefs"])
def test_remote_file_systems_are_read_in_blocks(big, tmp_path, monkeypatch, kind):
    """A mount table that calls this disk remote: no mapping and no O_DIRECT, even for a resident file."""
    big.read_bytes()
    monkeypatch.setattr("ray_streamer.storage.posix.read_mount_table", lambda: (Mount("/", kind),))
    storage = open_storage(str(tmp_path), Settings.resolve(direct_io="on"))
    assert not storage.is_resident("big")
    assert storage.limit_scratch(1 << 40) == 0
    assert read_at(storage, Extent(0, len(BIG))) == BIG
    assert storage.statistics().scratch_bytes == 0
    storage.close()


@pytest.fixture
def deep_folder(tmp_path):
    """A folder deeper than Python calls functions; taken away by hand, since that is what `shutil` does."""
    folders = [tmp_path / "/".join("d" * depth) for depth in range(1, 521)]
    for folder in folders:
        folder.mkdir()
    yield folders[-1]
    for folder in reversed(folders):
        folder.rmdir()


def test_folders_in_folders(tmp_path, deep_folder, open_store):
    (tmp_path / "b").touch()
    (deep_folder / "a").touch()
    try:
        found = open_store(str(tmp_path)).list(recursive=True)
    finally:
        (deep_folder / "a").unlink()
    assert found == ["b", str(deep_folder.relative_to(tmp_path) / "a")]
