"""What two looks at a file, on one machine or two, say about whether it is the same file."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest

from ray_streamer.errors import StorageError
from ray_streamer.storage.file_identity import FileIdentity, sample_extents
from ray_streamer.storage.mounts import Mount

DISK, MEMORY, SERVER = Mount("/", "ext4"), Mount("/dev/shm", "tmpfs"), Mount("/mnt", "nfs4")
USER_SPACE, UNKNOWN = Mount("/fuse", "fuse.s3fs"), Mount("/", "unknown")
SECOND = 1_000_000_000
SEEN = FileIdentity(
    size_bytes=4096, modified_ns=1_700_000_000_123_456_789, changed_ns=7, inode=11, num_links=1, machine="here"
)
THERE = {"machine": "there"}
LATER = {"modified_ns": SEEN.modified_ns + 5 * SECOND}
LOADS, REFUSED, TOLD = "loads", "refused", "told"


@pytest.mark.parametrize(
    ("mount", "change", "outcome"),
    [
        pytest.param(DISK, {}, LOADS, id="nothing-changed"),
        pytest.param(DISK, {"size_bytes": 4097}, REFUSED, id="other-size"),
        pytest.param(DISK, {"size_bytes": 4097, **THERE}, REFUSED, id="other-size-on-another-node"),
        pytest.param(SERVER, {"size_bytes": 4097, **THERE}, REFUSED, id="other-size-on-a-server"),
        pytest.param(DISK, {**LATER}, REFUSED, id="rewritten"),
        pytest.param(DISK, {**LATER, "inode": 12, "changed_ns": 8}, REFUSED, id="replaced"),
        pytest.param(SERVER, {**LATER, **THERE}, REFUSED, id="rewritten-on-a-server"),
        pytest.param(USER_SPACE, {**LATER, **THERE}, REFUSED, id="rewritten-in-a-mounted-bucket"),
        pytest.param(UNKNOWN, {**LATER, **THERE}, REFUSED, id="rewritten-nobody-knows-where"),
        pytest.param(DISK, {"changed_ns": 8}, REFUSED, id="rewritten-with-its-old-time"),
        pytest.param(SERVER, {"changed_ns": 8}, REFUSED, id="rewritten-on-a-server-with-its-old-time"),
        pytest.param(DISK, {"changed_ns": 8, "num_links": 2}, LOADS, id="linked-elsewhere"),
        pytest.param(DISK, {"changed_ns": 8, "num_links": 0}, LOADS, id="open-and-replaced-by-another"),
        pytest.param(DISK, {"changed_ns": 8, "inode": 12}, LOADS, id="a-copy-with-its-time-on-this-node"),
        pytest.param(USER_SPACE, {"changed_ns": 8}, LOADS, id="user-space-makes-up-changes"),
        pytest.param(USER_SPACE, {"inode": 12, **THERE}, LOADS, id="user-space-makes-up-inodes"),
        pytest.param(UNKNOWN, {"changed_ns": 8}, LOADS, id="no-mount-table"),
        pytest.param(DISK, {"changed_ns": 8, "inode": 12, **THERE}, LOADS, id="a-copy-with-its-time"),
        pytest.param(DISK, {"changed_ns": 8, **THERE}, LOADS, id="a-copied-disk-with-its-inodes"),
        pytest.param(DISK, {**LATER, "inode": 12, **THERE}, TOLD, id="a-copy-without-its-time"),
        pytest.param(MEMORY, {**LATER, "inode": 12, **THERE}, TOLD, id="a-copy-in-memory"),
        pytest.param(SERVER, {"changed_ns": 8, **THERE}, LOADS, id="ownership-changed-on-a-server"),
    ],
)
def test_what_means_something_depends_on_who_compares(mount, change, outcome):
    found = replace(SEEN, **change)
    assert (found.contradicts(SEEN, mount) is not None) == (outcome == REFUSED)
    assert (found.is_other_copy(SEEN, mount) and found.has_other_time(SEEN)) == (outcome == TOLD)


@pytest.mark.parametrize("granule", [1, 100, 1_000, 1_000_000, SECOND, 2 * SECOND])
@pytest.mark.parametrize("mount", [DISK, SERVER])
def test_times_that_a_copy_rounded_down_are_the_same(granule, mount):
    rounded = replace(SEEN, modified_ns=SEEN.modified_ns // granule * granule, **THERE)
    for one, other in ((rounded, SEEN), (SEEN, rounded)):
        assert one.contradicts(other, mount) is None
        assert not one.has_other_time(other)


def test_on_one_machine_times_are_never_rounded():
    rounded = replace(SEEN, modified_ns=SEEN.modified_ns // SECOND * SECOND)
    assert "was modified at 2023-11-14T22:13:20.000000000Z" in (rounded.contradicts(SEEN, DISK) or "")


@pytest.mark.parametrize("modified_ns", [0, -1, -(10**30), 10**30, SEEN.modified_ns])
def test_an_etag_says_all_of_it(modified_ns):
    identity = replace(SEEN, modified_ns=modified_ns, changed_ns=-modified_ns)
    for samples in ("", "0123456789abcdef"):
        sampled = replace(identity, samples=samples)
        assert FileIdentity.parse(sampled.info.etag) == sampled
    assert identity.info.size_bytes == 4096
    assert replace(identity, modified_ns=modified_ns + 1).contradicts(identity, DISK)


@pytest.mark.parametrize("etag", ["", "any", '"0123abcd"', "1,2,3", "a,b,c,d,e,f", "version-1"])
def test_etags_of_other_storages_are_none(etag):
    assert FileIdentity.parse(etag) is None


@pytest.mark.parametrize("size_bytes", [0, 1, 4096, 16_384, 16_385, 20_000, 10**6, 7 * 10**9])
def test_samples_reach_from_the_first_to_the_last_byte_and_are_few(size_bytes):
    extents = sample_extents(size_bytes)
    assert (extents[0].start, extents[-1].stop) == (0, size_bytes)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(extents))
    assert sum(extent.num_bytes for extent in extents) == min(size_bytes, 16_384)


def test_a_look_at_a_real_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe")
    seen = FileIdentity.of(os.stat(tmp_path / "a"), path="a")
    assert (seen.size_bytes, seen.num_links) == (3, 1)
    os.link(tmp_path / "a", tmp_path / "b")
    assert FileIdentity.of(os.stat(tmp_path / "a"), path="a").contradicts(seen, DISK) is None
    for path, kind in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "no regular file"),
        ("/dev/null", "no regular file"),
    ):
        with pytest.raises(StorageError, match=f"{path} on host .* is {kind}; expected a file"):
            FileIdentity.of(os.stat(path), path=str(path))
