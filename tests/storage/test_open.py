"""A uri leads to its backend, or to an error that says what would."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage


@pytest.mark.parametrize("scheme", ["", "file://", "FILE://"])
def test_paths_and_file_uris(tmp_path, scheme):
    folder = tmp_path / "my models"
    folder.mkdir()
    (folder / "a").write_bytes(b"abc")
    uri = f"{scheme}{folder}".replace(" ", "%20" if scheme else " ")
    storage = open_storage(uri, Settings.resolve())
    assert storage.list() == ["a"]
    assert not storage.is_remote
    storage.close()


def test_relative_path(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    storage = open_storage(".", Settings.resolve())
    monkeypatch.chdir("/")
    assert storage.read_head("a", 2)[0] == b"ab"
    storage.close()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/model", "ftp://.*s3://bucket/prefix"),
        ("file://host/model", "'host'.*file:///path"),
        ("s3:///model", "no bucket"),
        ("s3://", "no bucket"),
        ("", "empty path"),
    ],
)
def test_unusable_uri(uri, message):
    with pytest.raises(SettingsError, match=message):
        open_storage(uri, Settings.resolve())


def test_backends_are_imported_when_used():
    code = "import sys, ray_streamer.storage; print(*{'boto3', 'botocore', 'numpy', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
