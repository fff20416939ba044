"""The whole way through vLLM's engine: tokens, logprobs and every parameter are the stock loader's, from disk and from S3."""

from __future__ import annotations

import json
import shutil

import pytest
from engine_process import PROMPTS
from engines import run_engine, served
from families import save_broken, save_checkpoint, save_tokenizer, save_with_head
from measures import assert_read_once
from quantized import CONFIGS, save_quantized

TIED_WITH_A_HEAD = "tied-with-a-head"
SIZES = {"hidden_size": 256, "head_dim": 64}
"""vLLM's attention on CPUs knows no smaller heads."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of the checkpoint of a family or method, made once."""
    made = {}

    def checkpoint(kind, seed=0):
        if (kind, seed) not in made:
            made[kind, seed] = folder = tmp_path_factory.mktemp(f"{kind}-{seed}") / "model"
            if kind in CONFIGS:
                save_quantized(kind, folder, seed=seed, **SIZES)
            elif kind == TIED_WITH_A_HEAD:
                save_with_head(folder, lambda embedding: embedding * 2, **SIZES)
            else:
                save_checkpoint(kind, folder, seed=seed, **SIZES)
        return made[kind, seed]

    return checkpoint


@pytest.fixture(scope="module")
def stock(checkpoints, tmp_path_factory):
    """What the stock loader's engine says of a checkpoint, found out once."""
    said = {}

    def answer(kind, tp, seed=0):
        if (kind, tp, seed) not in said:
            engine = {"model": str(checkpoints(kind, seed)), "tensor_parallel_size": tp}
            said[kind, tp, seed] = run_engine(tmp_path_factory.mktemp("stock"), engine)
        return said[kind, tp, seed]

    return answer


def without_weights(model, folder):
    """A folder with the configuration only, as a node has it when weights stay in S3."""
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "tp"),
    [
        ("llama", 1),
        ("llama", 2),
        ("qwen3_moe", 2),
        ("gemma3_text", 2),
        ("phi3", 2),
        ("qwen2", 2),
        (TIED_WITH_A_HEAD, 2),
        ("int8", 2),
        ("awq", 2),
    ],
)
def test_from_disk_as_the_stock_loader(kind, tp, checkpoints, stock, tmp_path):
    engine = {"model": str(checkpoints(kind)), "tensor_parallel_size": tp, "load_format": "ray_streamer"}
    ours, theirs = run_engine(tmp_path, engine), stock(kind, tp)
    assert ours["hashes"] == theirs["hashes"]
    assert ours["answers"] == theirs["answers"]
    assert f"into {'1 rank' if tp == 1 else f'{tp} ranks'} in" in ours["log"]


def test_two_stages_as_the_stock_loader(checkpoints, tmp_path):
    engine = {"model": str(checkpoints("llama")), "pipeline_parallel_size": 2}
    theirs = run_engine(tmp_path / "theirs", engine)
    ours = run_engine(tmp_path / "ours", engine | {"load_format": "ray_streamer"})
    assert ours["hashes"] == theirs["hashes"]
    assert ours["answers"] == theirs["answers"]
    assert "into 2 ranks in" in ours["log"]


def test_from_s3_with_a_folder_that_holds_the_configuration_only(checkpoints, stock, s3_credentials, tmp_path):
    model, theirs = checkpoints("llama"), stock("llama", 2)
    uri = s3_credentials.upload_folder(model, "vllm", "llama")
    sent, requests = s3_credentials.bytes_sent(), s3_credentials.requests()
    ours = run_engine(
        tmp_path / "s3",
        {
            "model": str(without_weights(model, tmp_path / "config")),
            "tensor_parallel_size": 2,
            "load_format": "ray_streamer",
            "model_loader_extra_config": {"uri": uri, "concurrency": 4},
        },
    )
    sent, requests = s3_credentials.bytes_sent() - sent, s3_credentials.requests() - requests
    assert ours["hashes"] == theirs["hashes"]
    assert ours["answers"] == theirs["answers"]
    assert_read_once(model, sent, requests)


def test_serve_over_http_from_s3(checkpoints, stock, s3_credentials, tmp_path):
    model, theirs = checkpoints("llama"), stock("llama", 2)
    uri = s3_credentials.upload_folder(model, "vllm", "served")
    sent, requests = s3_credentials.bytes_sent(), s3_credentials.requests()
    config = without_weights(model, tmp_path / "config")
    save_tokenizer(config)
    extra = ["--load-format", "ray_streamer", "--model-loader-extra-config", json.dumps({"uri": uri})]
    with served(tmp_path / "serve", config, "--tensor-parallel-size", "2", *extra) as ask:
        for prompt, (token_ids, _) in zip(PROMPTS, theirs["answers"], strict=True):
            answer = ask({"prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True})
            assert answer["choices"][0]["token_ids"] == token_ids
    assert_read_once(model, s3_credentials.bytes_sent() - sent, s3_credentials.requests() - requests)


def test_reload_with_other_weights(checkpoints, stock, s3_credentials, tmp_path):
    first, second, theirs = checkpoints("llama"), checkpoints("llama", seed=1), stock("llama", 2, seed=1)
    uri = s3_credentials.upload_folder(second, "vllm", "second")
    sent, requests = s3_credentials.bytes_sent(), s3_credentials.requests()
    ours = run_engine(
        tmp_path / "ours",
        {"model": str(first), "tensor_parallel_size": 2, "load_format": "ray_streamer"},
        later=[[("reload_weights", {"weights_path": path})] for path in (uri, str(first))],
    )
    sent, requests = s3_credentials.bytes_sent() - sent, s3_credentials.requests() - requests
    other, again = ours["later"]
    assert [state.pop("errors") for state in ours["later"]] == [{}] * 2
    assert other == {name: theirs[name] for name in ("answers", "hashes")}
    assert again == {name: ours[name] for name in ("answers", "hashes")}
    assert_read_once(second, sent, requests)


def test_a_reload_that_fails_is_said_and_the_next_one_is_whole(checkpoints, stock, tmp_path):
    """With one worker: of several that fail, vLLM 0.32 takes the later replies for those of the next call."""
    first, second, theirs = checkpoints("llama"), checkpoints("llama", seed=1), stock("llama", 1, seed=1)
    nowhere, broken = tmp_path / "nothing", tmp_path / "broken"
    save_broken(second, broken)
    to_nowhere, to_broken, to_second = [
        ("reload_weights", {"weights_path": str(path)}) for path in (nowhere, broken, second)
    ]
    ours = run_engine(
        tmp_path / "ours",
        {"model": str(first), "load_format": "ray_streamer"},
        later=[[to_nowhere], [to_broken, to_second]],
    )
    refused, other = ours["later"]
    [error] = refused.pop("errors").values()
    assert str(nowhere) in error
    assert refused == {name: ours[name] for name in ("answers", "hashes")}
    assert list(other.pop("errors")) == ["0"]
    assert other == {name: theirs[name] for name in ("answers", "hashes")}


def test_reload_after_sleep_and_after_another_uri(checkpoints, stock, tmp_path):
    """Sleep level 2 needs a GPU: what it leaves of parameters is made here by hand."""
    first, second, theirs = checkpoints("llama"), checkpoints("llama", seed=1), stock("llama", 2, seed=1)
    wake = [("lose_parameters", {}), ("reload_weights", {})]
    other_uri = {"load_config": {"model_loader_extra_config": {"uri": str(second)}}}
    ours = run_engine(
        tmp_path,
        {"model": str(first), "tensor_parallel_size": 2, "load_format": "ray_streamer"},
        later=[[("lose_parameters", {})], wake, [("update_config", {"overrides": other_uri}), *wake]],
    )
    lost, awake, other = ours["later"]
    assert [state.pop("errors") for state in ours["later"]] == [{}] * 3
    before = {name: ours[name] for name in ("answers", "hashes")}
    assert lost["hashes"] != before["hashes"]
    assert awake == before
    assert other == {name: theirs[name] for name in ("answers", "hashes")}
