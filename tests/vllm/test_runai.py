"""Commands written for Run:ai's streamer, with RAY_STREAMER_REPLACE_RUNAI=1 and without it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_process import PROMPTS
from engines import run_engine, served, try_engine
from families import save_checkpoint, save_tokenizer
from measures import assert_read_once
from pyarrow import fs

from ray_streamer.settings import Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with a tokenizer, and beside it what no engine wants."""
    folder = tmp_path_factory.mktemp("runai") / "model"
    save_checkpoint("llama", folder, hidden_size=256, head_dim=64)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """What the stock loader's engine says of it."""
    return run_engine(tmp_path_factory.mktemp("stock"), {"model": str(model), "tensor_parallel_size": 2})


@pytest.fixture
def uri(model, s3_credentials, tmp_path):
    """The model in the store, beside what no engine wants."""
    stored = tmp_path / "stored"
    shutil.copytree(model, stored)
    (stored / "original").mkdir()
    for name in ("original/consolidated.00.pth", "original/params.json", "model-q4.gguf"):
        (stored / name).write_bytes(bytes(300_000))
    return s3_credentials.upload_folder(stored, "runai", "model")


def test_vllm_serve_from_s3_with_the_variable_and_nothing_else(
    model, theirs, uri, s3_credentials, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_STREAMER_REPLACE_RUNAI", "1")
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    sent, requests = s3_credentials.bytes_sent(), s3_credentials.requests()
    with served(tmp_path / "serve", uri, "--tensor-parallel-size", "2") as ask:
        for prompt, (token_ids, _) in zip(PROMPTS, theirs["answers"], strict=True):
            answer = ask({"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True})
            assert answer["choices"][0]["token_ids"] == token_ids
    assert_read_once(model, s3_credentials.bytes_sent() - sent, s3_credentials.requests() - requests)
    log = (tmp_path / "serve" / "serve.log").read_text()
    assert "RAY_STREAMER_REPLACE_RUNAI is on" in log
    assert "ray_streamer: " in log
    [version] = (tmp_path / "cache" / "files").glob("*/*/")
    names = {str(path.relative_to(version)) for path in version.rglob("*") if path.is_file()}
    assert names == {path.name for path in model.iterdir() if path.suffix != ".safetensors"}


def test_without_the_variable_nothing_of_vllm_is_replaced(uri, tmp_path):
    def tell():
        from vllm.config import model
        from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        print("FORMAT", _LOAD_FORMAT_TO_MODEL_LOADER["runai_streamer"].__module__)
        print("FILES", model.ObjectStorageModel.__module__)

    status, answer, log = try_engine(tmp_path, {"model": uri}, prepare=tell)
    assert (status, answer) == (1, None)
    assert "FORMAT vllm.model_executor.model_loader.runai_streamer_loader\n" in log
    assert "FILES vllm.transformers_utils.runai_utils\n" in log
    # What vLLM says where Run:ai's package is not installed.
    assert re.search("ModuleNotFoundError: .*runai_model_streamer", log)
    assert "RAY_STREAMER_REPLACE_RUNAI is on" not in log


def test_a_manifest_of_run_ai_keeps_its_words(theirs, uri, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_REPLACE_RUNAI", "1")
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("RUNAI_STREAMER_CONCURRENCY", "8")
    extra = {"distributed": True, "concurrency": 4, "memory_limit": 1 << 30}
    engine = {"load_format": "runai_streamer", "model_loader_extra_config": extra, "tensor_parallel_size": 2}
    ours = run_engine(tmp_path, {"model": uri, **engine})
    assert ours["hashes"] == theirs["hashes"]
    assert ours["answers"] == theirs["answers"]


@pytest.fixture
def google_uri(model):
    """The model in a bucket of Google's emulator."""
    server_of_tests = Path(__file__).parents[1] / "storage" / "google_server.py"
    command, pipe = [sys.executable, server_of_tests], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as server:
        address = server.stdout.readline().strip()
        uri = f"gs://anonymous@models/tiny?scheme=http&endpoint_override={address}"
        filesystem, root = fs.FileSystem.from_uri(uri)
        for path in model.iterdir():
            with filesystem.open_output_stream(f"{root}/{path.name}") as stream:
                stream.write(path.read_bytes())
        yield uri
        server.stdin.close()


def test_a_model_in_googles_store(theirs, google_uri, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_REPLACE_RUNAI", "1")
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    ours = run_engine(tmp_path, {"model": google_uri, "tensor_parallel_size": 2})
    assert ours["hashes"] == theirs["hashes"]


def test_a_worker_on_another_node_fetches_config_and_tokenizer_to_the_same_path(uri, tmp_path, monkeypatch):
    from ray_streamer.integrations.vllm.model_files import CachedModelFiles, restore_model_files

    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    folder = Path(CachedModelFiles(uri).dir)
    names = sorted(path.name for path in folder.iterdir())
    settings = Settings.resolve()
    # As with the variable, and as with `ray-streamer serve`.
    for weights, said in ((uri, None), ("", uri)):
        shutil.rmtree(tmp_path / "cache")
        restore_model_files(SimpleNamespace(model=str(folder), model_weights=weights), said, settings)
        assert sorted(path.name for path in folder.iterdir()) == names
    # A folder of the caller's own is not made.
    restore_model_files(SimpleNamespace(model=str(tmp_path / "own"), model_weights=""), uri, settings)
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("given", [None, "MY_", "RAY_STREAMER_, MY_"])
def test_workers_of_the_ray_executor_get_the_variables(given, monkeypatch):
    from vllm.ray.ray_env import get_env_vars_to_copy

    from ray_streamer.integrations.vllm import register

    prefixes = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
    monkeypatch.delenv(prefixes, raising=False)
    if given is not None:
        monkeypatch.setenv(prefixes, given)
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "4")
    monkeypatch.setenv("MY_VARIABLE", "1")
    register()
    copied = get_env_vars_to_copy()
    assert "RAY_STREAMER_CONCURRENCY" in copied
    assert ("MY_VARIABLE" in copied) == (given is not None)


def test_weights_of_the_hub_are_found_as_vllm_finds_them(model, tmp_path):
    from vllm.config import LoadConfig

    from ray_streamer.integrations.vllm.internals import place_of_weights

    repository = tmp_path / "models--org--tiny"
    shutil.copytree(model, repository / "snapshots" / "a1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a1")
    asked = SimpleNamespace(model="org/tiny", model_weights="", revision=None)
    found = place_of_weights(asked, LoadConfig(download_dir=str(tmp_path)))
    assert found == str(repository / "snapshots" / "a1")
    for place in (str(model), "s3://bucket/model", "gs://bucket/model"):
        asked = SimpleNamespace(model="elsewhere", model_weights=place, revision=None)
        assert place_of_weights(asked, LoadConfig()) == place
