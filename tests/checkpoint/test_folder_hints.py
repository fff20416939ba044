"""What people give instead of a checkpoint: each gets the sentence that says what it is and what to give."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from ray_streamer.checkpoint import locate, open_checkpoint
from ray_streamer.errors import CheckpointError, HeaderError, ObjectMissingError, StorageError
from ray_streamer.storage import absolute_uri
from ray_streamer.testing.checkpoints import TensorSpec, serialize_header, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

A = TensorSpec("a.weight", "F32", (8, 8))
FILE = serialize_header([A]) + bytes(A.num_bytes)
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n".encode()
INDEX = b'{"weight_map": {"a.weight": "consolidated-00001-of-00001.safetensors"}}'


@pytest.fixture
def opened(recording):
    """Opens what a caller says, as `load_rank` does."""

    def open_it(uri):
        uri = absolute_uri(uri)
        return open_checkpoint(uri, recording(locate(uri).folder_uri))

    return open_it


@pytest.mark.parametrize(
    ("head", "what"),
    [
        pytest.param(POINTER, "git-lfs pointer.*git lfs pull", id="lfs"),
        pytest.param(b"GGUF\3\0\0\0" + bytes(100), "GGUF.*convert", id="gguf"),
        pytest.param(b"PK\3\4\0\0\x08\x08" + bytes(100), "torch.save.*convert", id="torch-zip"),
        pytest.param(b"\x80\x02}q\0(X\1" + bytes(100), "pickle.*convert", id="pickle"),
        pytest.param(b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5", id="hdf5"),
        pytest.param(b"<!DOCTYPE html><html>" + bytes(100), "HTML page", id="html"),
        pytest.param(b'<?xml version="1.0"?><Error>' + bytes(100), "XML answer", id="xml"),
        pytest.param(b"\x1f\x8b\x08\0\0\0\0\1" + bytes(100), "gzip", id="gzip"),
        pytest.param(bytes(100), "zeros.*not finished", id="zeros"),
        pytest.param(b"\xff" * 100, "above the cap", id="anything"),
    ],
)
def test_files_that_are_no_safetensors(place, opened, head, what):
    uri = place({"model.safetensors": head})
    with pytest.raises(HeaderError, match=f"^{re.escape(uri)}/model.safetensors: .*{what}"):
        opened(uri)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_files_that_are_pointers(place, opened, name):
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is a git-lfs pointer.*git lfs pull"):
        opened(place({"model.safetensors": FILE, name: POINTER}))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("llama.gguf", b"GGUF\3\0\0\0", "it is a GGUF file"),
        ("pytorch_model.bin", b"PK\3\4", "it is a zip archive"),
        ("weights", POINTER, "it is a git-lfs pointer"),
        ("weights", FILE, "rename it if it is a safetensors file"),
        ("empty", b"", "give a folder"),
    ],
)
def test_a_file_where_a_folder_is_wanted(tmp_path, opened, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is a file whose name does not end in .safetensors; .*{what}"):
        opened(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "folder.json"])
def test_a_folder_with_the_name_of_a_file(tmp_path, opened, name):
    write_checkpoint(tmp_path / name, [A])
    with pytest.raises(StorageError, match=f"{name} is a folder, though .* with a / at its end"):
        opened(tmp_path / name)
    assert opened(f"{tmp_path}/{name}/").names == ("a.weight",)


def cache_folder(root: Path, *revisions: str) -> Path:
    """A model of the Hub's cache, as huggingface_hub 1.x lays it out."""
    folder = root / "models--org--name"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "0a").write_bytes(FILE)
    for revision in revisions:
        (folder / "snapshots" / revision).mkdir(parents=True)
        (folder / "snapshots" / revision / "model.safetensors").symlink_to("../../blobs/0a")
    return folder


def test_cache_folder_of_the_hub(tmp_path, opened):
    folder = cache_folder(tmp_path, "abc", "def")
    with pytest.raises(
        CheckpointError, match=f"cache folder .* give one of {folder}/snapshots/abc, {folder}/snapshots/def"
    ):
        opened(folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("def\n")
    with pytest.raises(
        CheckpointError, match=f"cache folder .* give {folder}/snapshots/def, the revision that its refs/main"
    ):
        opened(folder)
    with pytest.raises(
        CheckpointError, match=r"is the cache of the Hugging Face Hub: give .*models--org--name/snapshots/"
    ):
        opened(tmp_path)
    assert opened(folder / "snapshots" / "def").names == ("a.weight",)


@pytest.mark.parametrize("content", [b"\xff", b"../../etc", b"", b"x" * 1000, b"\x1b[2J"])
def test_cache_folder_whose_refs_are_broken(tmp_path, opened, content):
    folder = cache_folder(tmp_path, "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"cache folder .* give {folder}/snapshots/abc$"):
        opened(folder)


def test_cache_folder_in_a_bucket(place, opened):
    uri = place({"refs/main": b"abc", "snapshots/abc/model.safetensors": FILE})
    with pytest.raises(CheckpointError, match=f"cache folder .* give {re.escape(uri)}/snapshots/abc"):
        opened(uri)


def test_name_of_a_repository(tmp_path, monkeypatch, opened):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ObjectMissingError, match=r"did you mean hf://meta-llama/Llama-3\.1-8B, a model of the Hugging"):
        opened("meta-llama/Llama-3.1-8B")
    # A path into a folder that is there was meant as one, and so was any longer one.
    (tmp_path / "meta-llama").mkdir()
    for path in ("meta-llama/Llama-3.1-8B", "a/b/c", "../x/y", "/models/llama"):
        with pytest.raises(ObjectMissingError, match=r"no such file or folder.*check the path") as caught:
            opened(path)
        assert "did you mean" not in str(caught.value)


def test_a_folder_above_the_checkpoint(tmp_path, opened):
    for name in ("original", "final"):
        write_checkpoint(tmp_path / "model" / name, [A])
    (tmp_path / "model" / "notes").mkdir()
    with pytest.raises(CheckpointError, match=r"give a folder below it, one of .*model/final, .*model/original$"):
        opened(tmp_path / "model")


def test_a_pipeline_of_several_models(place, opened):
    with pytest.raises(CheckpointError, match="pipeline of several models: give the folder of one"):
        opened(place({"model_index.json": b"{}", "transformer/model.safetensors": FILE}))


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["consolidated.safetensors", "params.json"], "rules= must place them; give the uri of this one file"),
        (
            ["consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"],
            "write consolidated.saf",
        ),
        (
            ["consolidated-00001-of-00001.safetensors", "consolidated.safetensors.index.json"],
            "give the uri of consolidated.safetensors.index.json to open",
        ),
        (
            ["adapter_model.safetensors"],
            r"the adapter \(LoRA\) of another model, without its adapter_config.json; fetch that",
        ),
        (["adapter_config.json", "adapter_model.bin"], r"adapter_model.bin; convert"),
        (["__0_0.distcp", ".metadata"], "__0_0.distcp; convert"),
        (["llama.Q4_K_M.gguf", "config.json"], "llama.Q4_K_M.gguf; convert"),
        (["\x1b[2Jevil.bin"], r"\\x1b\[2Jevil.bin; convert"),
    ],
)
def test_folders_of_other_things(place, opened, files, hint):
    with pytest.raises(CheckpointError, match=f"no safetensors checkpoint; looked for .*found only .*{hint}"):
        opened(place(dict.fromkeys(files, b"x")))


def test_consolidated_files_open_by_what_the_hint_says(place, opened):
    one = "consolidated-00001-of-00001.safetensors"
    uri = place({one: FILE, "consolidated.safetensors.index.json": INDEX})
    assert opened(f"{uri}/consolidated.safetensors.index.json").names == opened(f"{uri}/{one}").names == ("a.weight",)


def test_a_wrong_file_name_lists_what_is_there(place, opened):
    uri = place({"model-1-of-2.safetensors": FILE, "other.json": b"{}"})
    with pytest.raises(
        ObjectMissingError, match=r"model\.safetensors: no such file; there are 'model-1-of-2\.safetensors'"
    ):
        opened(f"{uri}/model.safetensors")
