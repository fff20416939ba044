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
        ("ftp://host/model", "ftp://.*s3://"),
        ("file://host/model", "'host'.*file:///path"),
        ("s3:///model", "no bucket"),
        ("s3://", "no bucket"),
        ("", "empty path"),
    ],
)
def test_unusable_uri(uri, message):
    with pytest.raises(SettingsError, match=message):
        open_storage(uri, Settings.resolve())


@pytest.mark.parametrize(
    "uri",
    [
        "s3://KEY:PLANTED@models/llama",
        "s3://PLANTED@models/llama",
        "hdfs://:PLANTED@host/models",
        "abfss://:PLANTED@account.dfs.core.windows.net/models",
        "abfss://models@account.dfs.core.windows.net/a?sv=1&sig=PLANTED",
        "abfss://models@account.dfs.core.windows.net/a?client_secret=PLANTED",
        "ftp://user:PLANTED@host/models",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri):
    with pytest.raises(SettingsError, match=r"credentials.*docs/s3.md") as caught:
        open_storage(uri, Settings.resolve())
    assert "PLANTED" not in f"{caught.value} {caught.value.__cause__} {caught.value.__context__}"


def test_backends_are_imported_when_used():
    code = "import sys, ray_streamer.storage; print(*{'boto3', 'botocore', 'numpy', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
