"""Reads in flight: what the caller says, and from a disk, fewer than from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_streamer.rank.conditions import READS_OF_A_DISK, reads_in_flight
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.memory import MemoryStorage
from ray_streamer.storage.mounts import mount_of, read_mount_table
from ray_streamer.storage.posix import PosixStorage


@pytest.fixture
def on_disk(tmp_path):
    """A folder, and what a disk below it would say; the tests' own folder may lie in memory."""
    storage = PosixStorage(str(tmp_path), Settings.resolve())
    storage.is_disk = True
    return storage


def test_a_disk_is_busy_with_few(on_disk):
    assert reads_in_flight(Settings.resolve(), on_disk) == READS_OF_A_DISK < Settings.resolve().concurrency


@pytest.mark.parametrize("concurrency", [1, 16, 64])
def test_what_the_caller_gives_is_kept(on_disk, concurrency):
    assert reads_in_flight(Settings.resolve(concurrency=concurrency), on_disk) == concurrency


def test_overriding_another_setting_gives_no_concurrency(on_disk):
    settings = Settings.resolve(block_bytes="4MiB").override(memory_limit="64MiB")
    assert reads_in_flight(settings, on_disk) == READS_OF_A_DISK
    assert reads_in_flight(settings.override(concurrency=16), on_disk) == 16


def test_what_the_environment_gives_is_kept(on_disk, monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "16")
    settings = Settings.resolve().model_copy(update={"max_bandwidth": 1})
    assert reads_in_flight(settings, on_disk) == 16


def test_other_storages_get_what_they_got():
    MemoryStorage.put("memory://conditions", {"a": b"1"})
    try:
        storage = open_storage("memory://conditions", Settings.resolve())
        assert reads_in_flight(Settings.resolve(), storage) == 16
    finally:
        MemoryStorage.remove("memory://conditions")


@pytest.mark.parametrize("folder", [Path("/dev/shm"), Path(__file__).parent])
def test_a_folder_lies_on_a_disk_when_its_mount_does(folder):
    assert PosixStorage(str(folder), Settings.resolve()).is_disk == mount_of(str(folder), read_mount_table()).is_disk
    assert not PosixStorage("/dev/shm", Settings.resolve()).is_disk
