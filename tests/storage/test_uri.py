"""What the caller says means the same everywhere: relative paths, homes and file: uris are resolved where they are said."""

from __future__ import annotations

import os
import pwd
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from safetensors.numpy import save_file

import ray_streamer
from ray_streamer.errors import ObjectMissingError, SettingsError
from ray_streamer.settings import Settings
from ray_streamer.storage import absolute_uri, open_storage

RULES = {"*": ray_streamer.Replicate()}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The caller is in `mine`, whose home is `home`; `theirs` has a namesake of every checkpoint."""
    for value, who in enumerate(("theirs", "mine", "home")):
        (tmp_path / who / "ckpt").mkdir(parents=True)
        save_file({"a.weight": np.full((2, 2), value, "f4")}, tmp_path / who / "ckpt" / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path


RELATIVE = {
    "ckpt": "mine/ckpt",
    "./ckpt": "mine/ckpt",
    "ckpt/": "mine/ckpt",
    ".//ckpt//.": "mine/ckpt",
    ".": "mine",
    "..": "mine/..",
    "../theirs/ckpt": "mine/../theirs/ckpt",
    "ckpt/model.safetensors": "mine/ckpt/model.safetensors",
    "~/ckpt": "home/ckpt",
    "~": "home",
    "file:ckpt": "mine/file:ckpt",
    "file://~/ckpt": "home/ckpt",
    "~nobody-of-this-name/ckpt": "mine/~nobody-of-this-name/ckpt",
    "50%/a#b?c": "mine/50%/a#b?c",
    "odd.safetensors/": "mine/odd.safetensors/",
}


@pytest.mark.parametrize(("said", "meant"), RELATIVE.items(), ids=RELATIVE.keys())
def test_relative_paths_begin_where_the_caller_is(places, said, meant):
    assert absolute_uri(said) == f"{places}/{meant}"
    assert absolute_uri(absolute_uri(said)) == f"{places}/{meant}"


ABSOLUTE = {
    "/models/llama": "/models/llama",
    "/models//llama/": "/models/llama",
    "/": "/",
    "//": "/",
    "/link/../llama": "/link/../llama",
    "/50%25/a#b?c": "/50%25/a#b?c",
    "file:///models/my%20model": "/models/my model",
    "file:/models/my%20model": "/models/my model",
    "FILE://LocalHost/models": "/models",
    "file:///models/50%25/a%23b?c#d": "/models/50%/a#b?c#d",
    "s3://bucket/prefix/": "s3://bucket/prefix/",
    "S3://bucket/~/a/../b": "S3://bucket/~/a/../b",
    "memory://tiny": "memory://tiny",
    "gs://bucket/model": "gs://bucket/model",
}


@pytest.mark.parametrize(("said", "meant"), ABSOLUTE.items(), ids=ABSOLUTE.keys())
def test_what_is_absolute_stays(said, meant):
    assert absolute_uri(said) == meant


def test_what_is_no_uri_is_not_repeated():
    with pytest.raises(SettingsError, match="got list") as caught:
        absolute_uri(["https://host/a?sig=planted"])
    assert "planted" not in str(caught.value)


def test_paths_of_pathlib_and_homes_of_others(places):
    user = pwd.getpwall()[0]  # this process may run as one that has no name
    assert absolute_uri(f"~{user.pw_name}/ckpt") == f"{user.pw_dir.rstrip('/')}/ckpt"
    assert absolute_uri(Path("ckpt")) == f"{places}/mine/ckpt"
    assert absolute_uri(PurePosixPath("~/ckpt")) == f"{places}/home/ckpt"
    with os.scandir(places / "mine") as entries:
        assert [absolute_uri(entry) for entry in entries] == [f"{places}/mine/ckpt"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Path("s3://bucket/model"), "one slash after s3:.*give it as text"),
        ("gs:/bucket/model", "one slash after gs:"),
        ("", "empty path"),
        (b"/models/llama", "got bytes"),
        (None, "got NoneType"),
        (7, "got int"),
        ("a\0b", "null character"),
        ("file://host/model", "'host'.*file:///path"),
        ("file://", "empty path"),
        ("ftp://host/model", "ftp://"),
        ("s3://KEY:PLANTED@bucket/x", "credentials"),
        ("hf://PLANTED@org/model", "credentials.*HF_TOKEN"),
        ("gs://PLANTED@bucket/x", "credentials"),
        ("gcs://anonymous:PLANTED@bucket/x", "credentials"),
        ("az://PLANTED@container/x", "credentials.*AZURE_STORAGE_ACCOUNT_NAME"),
        ("abfss://container:PLANTED@account.dfs.core.windows.net/x", "credentials"),
        ("htps://PLANTED@host/x", "credentials"),
        ("az://models/m?token=PLANTED", "signature or token"),
    ],
)
def test_what_is_no_uri_is_refused(said, message):
    with pytest.raises(SettingsError, match=message) as caught:
        absolute_uri(said)
    assert "PLANTED" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["gs://anonymous@bucket/m", "abfss://models@mine.dfs.core.windows.net/m", "hf://org/model@main/sub", "az://models/a@b", "hdfs://me@host/m"],
)  # fmt: skip
def test_what_is_no_user_stays(uri):
    assert absolute_uri(uri) == uri


def test_a_relative_path_in_a_folder_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SettingsError, match="current folder, which was deleted"):
        absolute_uri("ckpt")
    assert absolute_uri("/ckpt") == "/ckpt"


@pytest.mark.parametrize(("said", "value"), [("ckpt", 1), (Path("ckpt"), 1), ("~/ckpt", 2), ("../theirs/ckpt", 0)])
def test_plans_and_ranks_load_the_callers_own(places, monkeypatch, said, value):
    plan = ray_streamer.plan(said, rules=RULES)
    stream = ray_streamer.stream_rank(said, rules=RULES)
    assert dict(stream)["a.weight"].unique().tolist() == [value]
    tensors = ray_streamer.load_rank(said, rules=RULES)
    assert tensors["a.weight"].unique().tolist() == [value]
    monkeypatch.chdir(places / "theirs")
    storage = open_storage(plan.index.uri, Settings.resolve())
    assert storage.read_head("model.safetensors", 8)[1].etag == plan.index.files[0].etag
    storage.close()


def test_errors_name_the_absolute_path_and_who_looked(places):
    for said in ("nothing", Path("nothing"), "./nothing/"):
        with pytest.raises(ObjectMissingError, match=f"{places}/mine/nothing") as caught:
            ray_streamer.plan(said, rules=RULES)
        assert os.uname().nodename in str(caught.value)


ODD_NAMES = ["100%", "a#b", "what?", "a b", "模型", "%2F", "a&b;c", "'quoted\"", "[1]{2}", "back\\slash", "-rf", "a:b"]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("is_linked", [False, True], ids=["folder", "linked-folder"])
def test_odd_names_are_folders_like_any_other(tmp_path, monkeypatch, name, is_linked):
    folder = tmp_path / "real" / name
    folder.mkdir(parents=True)
    save_file({"a.weight": np.ones((2, 2), "f4")}, folder / "model.safetensors")
    if is_linked:
        folder = tmp_path / name
        folder.symlink_to(tmp_path / "real" / name)
    monkeypatch.chdir(tmp_path)
    for said in (str(folder), f"{folder}/", os.path.relpath(folder), folder.as_uri()):
        assert ray_streamer.load_rank(said, rules=RULES).keys() == {"a.weight"}


def test_a_slash_behind_tells_a_folder_from_a_file(tmp_path):
    folder = tmp_path / "llama.safetensors"
    folder.mkdir()
    save_file({"a.weight": np.ones((2, 2), "f4")}, folder / "model.safetensors")
    assert ray_streamer.load_rank(f"{folder}/", rules=RULES).keys() == {"a.weight"}
