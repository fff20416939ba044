"""Small files of a checkpoint on this machine's disk: which, complete or absent, once per version."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

import ray_streamer
from ray_streamer.api.files import cached
from ray_streamer.cli import main
from ray_streamer.errors import (
    BudgetError,
    CheckpointError,
    ObjectChangedError,
    ObjectMissingError,
    SettingsError,
    StorageError,
)
from ray_streamer.files import ENGINE_FILES, Selection, cached_files, pull_files
from ray_streamer.machine import MemoryRoom
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.storage.memory import MemoryStorage
from ray_streamer.storage.mounts import mount_of, read_mount_table
from ray_streamer.testing.file_server import file_bytes
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": os.urandom((9 << 20) + 123),
    "1_Pooling/config.json": b"{}",
    "2_Dense/model.safetensors": b"a small layer that engines look for here",
    "joint_head.safetensors": b"another one",
    "sparse_linear.pt": b"another one",
    "whisper-large-v3/model.safetensors": b"an encoder that engines look for here",
    "model-00001-of-00001.safetensors": b"weights",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"weights",
    "model.Q4.gguf": b"weights",
    ".gitattributes": b"",
}
JSONS = ["1_Pooling/config.json", "config.json", "tokenizer.json"]
WANTED = [
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "config.json",
    "joint_head.safetensors",
    "sparse_linear.pt",
    "tokenizer.json",
    "whisper-large-v3/model.safetensors",
]


@pytest.fixture(params=["posix", "memory", "s3"])
def uri(request, tmp_path):
    if request.param == "memory":
        uri = f"memory://{request.node.name}"
        MemoryStorage.put(uri, FILES)
        yield uri
        MemoryStorage.remove(uri)
        return
    folder = write(tmp_path / "source")
    if request.param == "posix":
        yield str(folder)
        return
    server = request.getfixturevalue("s3_credentials")
    server.upload_folder(str(folder), "files-bucket")
    yield "s3://files-bucket"


def write(folder: Path) -> Path:
    for path, content in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def found_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_file_is_listed(uri):
    assert ray_streamer.ls(uri) == sorted(FILES)
    assert ray_streamer.ls(f"{uri}/config.json") == ["config.json"]


def test_files_are_pulled_whole(uri, tmp_path):
    target = tmp_path / "new" / "folder"
    pulled = ray_streamer.pull(uri, target)
    assert found_below(target) == FILES
    assert pulled == [target / path for path in sorted(FILES)]


@pytest.mark.parametrize(
    ("allow", "ignore", "expected"),
    [
        pytest.param("*.json", None, ["1_Pooling/config.json", "config.json", "original/params.json", "tokenizer.json"],
                     id="one-glob"),
        pytest.param(["*.json"], ["original/*"], JSONS, id="both"),
        pytest.param(None, ["*/*", "*.*"], [], id="nothing-left"),
        pytest.param(["no-such"], None, [], id="nothing-matches"),
    ],
)  # fmt: skip
def test_globs_choose(uri, tmp_path, allow, ignore, expected):
    if not expected:
        with pytest.raises(ObjectMissingError, match="no file matches"):
            ray_streamer.pull(uri, tmp_path / "target", allow=allow, ignore=ignore)
        assert not (tmp_path / "target").exists()
        return
    ray_streamer.pull(uri, tmp_path / "target", allow=allow, ignore=ignore)
    assert sorted(found_below(tmp_path / "target")) == expected


def test_an_engine_gets_no_weights():
    assert ENGINE_FILES.of(sorted(FILES)) == WANTED


def test_globs_are_text():
    with pytest.raises(SettingsError, match="allow is a list of globs"):
        Selection(allow=(1,))
    with pytest.raises(SettingsError, match="ignore is a list of globs"):
        Selection(ignore="*.bin")


@pytest.mark.parametrize("globs", [5, b"*", object()])
def test_what_are_no_globs_is_said(tmp_path, globs):
    for name in ("allow", "ignore"):
        with pytest.raises(SettingsError, match=f"{name} is a list of globs"):
            ray_streamer.pull(tmp_path, tmp_path / "copy", **{name: globs})


def test_globs_that_match_nothing_are_repeated(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ObjectMissingError, match=r"no file matches '\*\.txt', less 'a\*', 'b\*'$"):
        ray_streamer.pull(tmp_path, tmp_path / "copy", allow="*.txt", ignore=["a*", "b*"])
    with pytest.raises(ObjectMissingError, match=r"no file matches '\*', less '\*'$"):
        ray_streamer.pull(tmp_path, tmp_path / "copy", ignore="*")


def test_settings_of_another_kind_are_named(tmp_path):
    for call in (ray_streamer.ls, lambda uri, **said: ray_streamer.pull(uri, tmp_path, **said), cached):
        for wrong in (5, {}, {"concurrency": 2}):
            with pytest.raises(SettingsError, match=r"settings is a ray_streamer\.Settings"):
                call(str(tmp_path), settings=wrong)


@pytest.mark.parametrize("folder", ["s3://bucket/copy", "hf://org/model", "memory://copy", "gs://bucket/copy"])
def test_files_are_copied_into_local_folders_only(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match=f"{folder} is no local folder"):
        ray_streamer.pull(tmp_path, folder)
    assert os.listdir(tmp_path) == ["config.json"]


def test_names_may_be_as_long_as_names_can_be(tmp_path):
    names = ["\u540d" * 83 + ".json", "x" * 250 + ".json"]
    assert [len(os.fsencode(name)) for name in names] == [254, 255]
    for name in names:
        (tmp_path / name).write_text("{}")
    pulled = ray_streamer.pull(tmp_path, tmp_path / "copy")
    assert sorted(path.name for path in pulled) == sorted(names)
    assert sorted(os.listdir(tmp_path / "copy")) == sorted(names)


def test_one_file_that_is_not_there_is_not_listed(uri, tmp_path):
    assert ray_streamer.ls(f"{uri}/config.json") == ["config.json"]
    with pytest.raises(ObjectMissingError, match=r"none\.json"):
        ray_streamer.ls(f"{uri}/none.json")


def test_a_web_server_that_fails_is_not_asked_for_every_usual_name():
    settings = Settings.resolve(retry_deadline_seconds=0)
    with HostileStore(lambda _: answer_bytes(500)) as server:
        with pytest.raises(StorageError, match=r"the store failed, .*model\.safetensors\.index\.json.*HTTP 500"):
            ray_streamer.ls(f"{server.url}/m", settings=settings)
        assert {asked.key for asked in server.requests} == {"/m/model.safetensors.index.json"}


def test_a_web_server_that_refuses_the_model_is_asked_for_usual_names():
    settings = Settings.resolve(retry_deadline_seconds=0)
    with HostileStore(lambda asked: file_bytes(b"{}", asked) if "config" in asked.key else answer_bytes(403)) as server:
        assert "config.json" in ray_streamer.ls(f"{server.url}/m", settings=settings)


def test_nothing_is_told(uri, tmp_path):
    with pytest.raises(ObjectMissingError):
        ray_streamer.ls(f"{uri}/nothing-here")
    with pytest.raises(ObjectMissingError):
        ray_streamer.pull(f"{uri}/nothing-here", tmp_path / "target")


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "/etc/evil", "a//b", "./a", "a\nb", "a\x1b[2J"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    uri = "memory://evil"
    MemoryStorage.put(uri, {"config.json": b"{}", name: b"evil"})
    try:
        with pytest.raises(CheckpointError, match="no plain relative path"):
            ray_streamer.pull(uri, tmp_path / "target")
    finally:
        MemoryStorage.remove(uri)
    assert not (tmp_path / "target").exists()
    assert not (tmp_path / "evil.json").exists()


class Failing:
    """A storage whose second block of a file does not come."""

    def __init__(self, storage):
        self._storage, self.uri = storage, storage.uri

    def read_into(self, *_, **__):
        raise ObjectChangedError("it was replaced")

    def __getattr__(self, name):
        return getattr(self._storage, name)


def test_a_file_that_breaks_off_leaves_what_was_there(tmp_path):
    storage = open_storage(str(write(tmp_path / "source")), Settings.resolve())
    target = tmp_path / "target"
    target.mkdir()
    (target / "tokenizer.json").write_bytes(b"before")
    with pytest.raises(ObjectChangedError):
        pull_files(Failing(storage), ["config.json", "tokenizer.json"], target, concurrency=1)
    assert found_below(target) == {"config.json": FILES["config.json"], "tokenizer.json": b"before"}
    storage.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    MemoryStorage.put("memory://tiny", {"config.json": b"{}"})
    try:
        with pytest.raises(StorageError, match=r"cannot write .*file/config.json.*give another folder"):
            ray_streamer.pull("memory://tiny", tmp_path / "file")
    finally:
        MemoryStorage.remove("memory://tiny")


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        pytest.param(resource.RLIMIT_NOFILE, 3, r"as `ulimit -n` allows, 3: raise it", id="descriptors"),
        pytest.param(resource.RLIMIT_FSIZE, 1024, r"limited to .*`ulimit -f`\): raise it", id="size"),
    ],
)
def test_a_limit_of_the_process_is_named_and_not_the_folder(tmp_path, limit, value, said):
    MemoryStorage.put("memory://tiny", {"config.json": bytes(4096)})
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        with pytest.raises(StorageError, match=rf"cannot write .*config.json: .*{said}") as caught:
            ray_streamer.pull("memory://tiny", tmp_path)
    finally:
        resource.setrlimit(limit, before)
        MemoryStorage.remove("memory://tiny")
    assert "another folder" not in str(caught.value)


class Counting:
    """A storage that counts the files that are read."""

    def __init__(self, storage):
        self._storage, self.uri, self.reads = storage, storage.uri, []

    def read_into(self, path, extent, buffer, **options):
        if not extent.start:
            self.reads.append(path)
        return self._storage.read_into(path, extent, buffer, **options)

    def __getattr__(self, name):
        return getattr(self._storage, name)


def test_the_cache_is_filled_once_for_all(uri, tmp_path):
    storage = Counting(open_storage(uri, Settings.resolve()))
    folders: list[Path] = []

    def fill() -> None:
        folders.append(cached_files(storage, cache=tmp_path / "cache", timeout_seconds=60, concurrency=2))

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage.close()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert found_below(folders[0]) == {path: FILES[path] for path in WANTED}
    assert sorted(storage.reads) == WANTED
    assert stat.S_IMODE(folders[0].parent.stat().st_mode) == 0o700


def test_a_remote_checkpoint_is_cached_where_the_setting_says(s3_credentials, tmp_path):
    s3_credentials.upload_folder(str(write(tmp_path / "source")), "cache-bucket")
    folder = cached("s3://cache-bucket", settings=Settings(cache_dir=str(tmp_path / "cache")))
    assert folder.is_relative_to(tmp_path / "cache")
    assert found_below(folder) == {path: FILES[path] for path in WANTED}


def test_a_cache_that_cannot_be_written_is_named_with_its_setting(s3_credentials, tmp_path):
    s3_credentials.upload_folder(str(write(tmp_path / "source")), "cache-bucket")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*/file/files/.*cache_dir"):
        cached("s3://cache-bucket", settings=Settings(cache_dir=str(tmp_path / "file")))


def test_a_new_version_gets_a_folder_of_its_own(tmp_path):
    uri = "memory://versions"

    def cached_now():
        storage = open_storage(uri, Settings.resolve())
        return cached_files(storage, cache=tmp_path, timeout_seconds=10, concurrency=2)

    try:
        MemoryStorage.put(uri, {"config.json": b"1"})
        old = cached_now()
        MemoryStorage.put(uri, {"config.json": b"2"})
        new = cached_now()
    finally:
        MemoryStorage.remove(uri)
    assert (found_below(old), found_below(new)) == ({"config.json": b"1"}, {"config.json": b"2"})


class Replacing(Counting):
    """A storage whose files are replaced once, when they are about to be copied."""

    def read_into(self, path, extent, buffer, **options):
        if not self.reads:
            MemoryStorage.put(self.uri, {"config.json": b"new"})
        return super().read_into(path, extent, buffer, **options)


def test_a_file_that_is_replaced_before_it_is_copied_never_stands_for_the_old_version(tmp_path):
    uri = "memory://replaced"
    MemoryStorage.put(uri, {"config.json": b"old"})
    try:
        storage = Replacing(open_storage(uri, Settings.resolve()))
        with pytest.raises(ObjectChangedError, match=r"config\.json"):
            cached_files(storage, cache=tmp_path, timeout_seconds=10, concurrency=2)
        folder = cached_files(storage, cache=tmp_path, timeout_seconds=10, concurrency=2)
    finally:
        MemoryStorage.remove(uri)
    assert found_below(folder) == {"config.json": b"new"}
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([folder.name, "lock"])


HOLD = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_process_that_never_ends_filling_is_told_and_a_killed_one_is_taken_over(tmp_path):
    uri = "memory://locked"
    MemoryStorage.put(uri, {"config.json": b"1"})
    storage = open_storage(uri, Settings.resolve())
    try:
        folder = cached_files(storage, cache=tmp_path, timeout_seconds=10, concurrency=1)
        shutil.rmtree(folder)
        (folder.parent / ".left-by-a-killed-process").mkdir()
        command = [sys.executable, "-c", HOLD, str(folder.parent / "lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(StorageError, match=r"another process .*startup_timeout_seconds"):
                cached_files(storage, cache=tmp_path, timeout_seconds=0.1, concurrency=1)
            holder.kill()
        assert cached_files(storage, cache=tmp_path, timeout_seconds=10, concurrency=1) == folder
    finally:
        MemoryStorage.remove(uri)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([folder.name, "lock"])


def test_a_local_folder_is_its_own_copy(tmp_path):
    assert cached(write(tmp_path / "source")) == tmp_path / "source"


def test_on_the_command_line(uri, tmp_path):
    listed = CliRunner().invoke(main, ["ls", uri])
    assert listed.exit_code == 0
    assert listed.stdout.splitlines() == sorted(FILES)
    target = tmp_path / "target"
    pulled = CliRunner().invoke(main, ["pull", uri, str(target), "--allow", "*.json", "--ignore", "original/*"])
    assert pulled.exit_code == 0
    assert sorted(found_below(target)) == JSONS


def test_a_folder_in_memory_is_not_filled_until_the_kernel_ends_the_process(tmp_path_factory, monkeypatch):
    """What is written there would stay after that, and its memory be lost."""
    folder = next((path for path in (Path("/dev/shm"), Path("/run")) if _is_writable_memory(path)), None)
    if folder is None:
        pytest.skip("no folder of this machine that lies in memory may be written")
    left = [200 << 20]

    def rooms():
        left[0] -= 40 << 20
        return [MemoryRoom(identity="g", name="the 1 GiB of control group g", free_bytes=0, most_bytes=left[0])]

    monkeypatch.setattr("ray_streamer.files.pull.memory_rooms", rooms)
    MemoryStorage.put("memory://full", {"large.bin": bytes(20 << 20)})
    storage = open_storage("memory://full", Settings())
    with tempfile.TemporaryDirectory(dir=folder) as name:
        with pytest.raises(
            BudgetError, match=r"lies in memory \(tmpfs\): 40 MiB of the 1 GiB of control group g are left"
        ):
            pull_files(storage, ["large.bin"], Path(name), concurrency=1)
        assert not list(Path(name).iterdir())
    left[0] = 0
    disk = tmp_path_factory.mktemp("disk")
    if not mount_of(str(disk.resolve()), read_mount_table()).is_memory:
        assert pull_files(storage, ["large.bin"], disk, concurrency=1) == [disk / "large.bin"]


def _is_writable_memory(path):
    return os.access(path, os.W_OK) and mount_of(str(path.resolve()), read_mount_table()).is_memory
