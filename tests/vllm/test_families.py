"""Every model family that vLLM and transformers share loads as with the stock loader: each parameter and buffer of each rank."""

from __future__ import annotations

import json
import shutil
from functools import partial
from mmap import PAGESIZE

import pytest
from families import (
    FAMILIES,
    save_bge_m3,
    save_checkpoint,
    save_classifier,
    save_in_mistrals_format,
    save_tokenizer,
    save_with_head,
)
from loading import check, ours, total_bytes
from ranks import Layout, on_all_ranks, stock

from ray_streamer.api.files import cached
from ray_streamer.checkpoint.header_reads import HEAD_BYTES
from ray_streamer.cli.serve import serve_arguments
from ray_streamer.settings import Settings

LAYOUTS = [
    pytest.param("llama", Layout(tp=1), id="llama-tp1"),
    pytest.param("llama", Layout(pp=2), id="llama-pp2"),
    pytest.param("gemma3_text", Layout(pp=2), id="tied-pp2"),
    pytest.param("llama", Layout(tp=2, pp=2), id="llama-tp2-pp2"),
    pytest.param("qwen3_moe", Layout(tp=2, ep=True), id="experts-tp2-ep"),
    pytest.param("deepseek_v3", Layout(tp=2, ep=True), id="mla-tp2-ep"),
    pytest.param("qwen3_moe", Layout(dp=2, ep=True), id="experts-dp2-ep"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_as_with_the_stock_loader(family, tmp_path):
    save_checkpoint(family, tmp_path / "model")
    first, second = check(tmp_path / "model", Layout(tp=2), tmp_path)
    print(
        f"{family}: {first.num_tensors} tensors, planned {first.num_planned}, cast {first.num_cast}, early {first.num_early}, "
        f"whole {len(first.whole)} {first.whole[:2]}; "
        f"{first.num_bytes + second.num_bytes} bytes by plan, {first.early_bytes + second.early_bytes} early"
    )
    assert first.num_bytes + second.num_bytes <= total_bytes(tmp_path / "model")


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_a_layout_loads_as_with_the_stock_loader(family, layout, tmp_path):
    save_checkpoint(family, tmp_path / "model")
    check(tmp_path / "model", layout, tmp_path)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3_moe", "phi3", "gpt2", "falcon", "bloom", "llama4_text", "gpt_oss", "mamba2"]
)
def test_from_s3_every_byte_leaves_once_for_all_ranks(family, tmp_path, s3_credentials):
    """Of what is planned, and of what the loaders need the values of (gpt_oss, mamba2)."""
    save_checkpoint(family, tmp_path / "model")
    uri = s3_credentials.upload_folder(tmp_path / "model", "families", family)
    sent = s3_credentials.bytes_sent()
    first, second = check(tmp_path / "model", Layout(tp=2), tmp_path, uri=uri, max_gap_bytes=0)
    sent = s3_credentials.bytes_sent() - sent
    needed = total_bytes(tmp_path / "model")
    read = sum(rank.num_bytes + rank.early_bytes for rank in (first, second))
    early = {name for rank in (first, second) for name, _ in rank.whole}
    print(f"{family}: {needed} bytes of tensors, {read} read, {first.early_bytes + second.early_bytes} of them early")
    # Two pages of the file at most lie beside each tensor that is read early.
    slack = 2 * PAGESIZE * (len(early) + max(first.num_early, second.num_early))
    assert needed <= read <= needed + slack
    heads = sum(min(HEAD_BYTES, path.stat().st_size) for path in (tmp_path / "model").glob("*.safetensors"))
    assert read <= sent - heads < read + 50_000


def with_head(folder, make_head):
    """A tied checkpoint whose files have a head of their own, and a folder with its configuration."""
    model = save_with_head(folder / "model", make_head)
    (folder / "config").mkdir()
    shutil.copy(model / "config.json", folder / "config")
    return model, folder / "config"


def test_a_tied_model_with_another_head_is_loaded_or_refused(tmp_path):
    model, config = with_head(tmp_path, lambda embedding: embedding * 2)
    # vLLM finds the head in the folder, and unties.
    check(model, Layout(tp=2), tmp_path)
    with pytest.raises(AssertionError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        on_all_ranks(config, Layout(tp=2), [partial(ours, uri=str(model))], tmp_path)


def test_an_embedding_model_with_another_head_which_it_does_not_use_is_loaded(tmp_path):
    model, config = with_head(tmp_path, lambda embedding: embedding * 2)
    layout = Layout(tp=2, arguments={"runner": "pooling", "convert": "embed"})
    for rank, said in zip(
        on_all_ranks(config, layout, [partial(ours, uri=str(model))], tmp_path),
        check(model, layout, tmp_path),
        strict=True,
    ):
        assert rank[0].said.num_planned == said.num_planned == said.num_tensors - 1


def test_a_reranker_which_is_rows_of_another_head_is_loaded_or_refused(tmp_path):
    model, config = with_head(tmp_path, lambda embedding: embedding * 2)
    for folder in (model, config):
        save_tokenizer(folder)
    reranker = {
        "architectures": ["Qwen2ForSequenceClassification"],
        "classifier_from_token": ["w5", "w6"],
        "method": "from_2_way_softmax",
    }
    layout = Layout(tp=2, arguments={"runner": "pooling", "hf_overrides": reranker})
    check(model, layout, tmp_path)
    with pytest.raises(AssertionError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        on_all_ranks(config, layout, [partial(ours, uri=str(model))], tmp_path)


def test_a_tied_model_with_another_head_loads_when_vllm_is_told(tmp_path):
    model, config = with_head(tmp_path, lambda embedding: embedding * 2)
    told = Layout(tp=2, arguments={"hf_overrides": {"tie_word_embeddings": False}})
    for rank in on_all_ranks(config, told, [partial(ours, uri=str(model))], tmp_path):
        assert rank[0].said.num_planned == rank[0].said.num_tensors
        assert rank[0].before["lm_head.weight"] != rank[0].before["model.embed_tokens.weight"]


def test_a_tied_model_with_the_same_head_once_more_is_loaded(tmp_path):
    model, config = with_head(tmp_path, lambda embedding: embedding.clone())
    for rank in on_all_ranks(config, Layout(tp=2), [partial(ours, uri=str(model))], tmp_path):
        assert rank[0].said.num_planned == rank[0].said.num_tensors - 1


def test_a_classifiers_bias_which_vllm_makes_a_parameter_of_is_loaded(tmp_path):
    save_classifier(tmp_path / "model")
    layout = Layout(tp=2, arguments={"runner": "pooling", "convert": "classify"})
    for rank in check(tmp_path / "model", layout, tmp_path):
        assert rank.num_planned + rank.num_cast == rank.num_tensors
        assert rank.whole == ()


def test_heads_beside_the_checkpoint_are_read_in_torchs_own_format(tmp_path):
    save_bge_m3(tmp_path / "model")
    check(tmp_path / "model", Layout(tp=2, arguments={"runner": "pooling"}), tmp_path, stock_format="auto")


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "index"])
def test_a_folder_in_mistrals_own_format_loads_as_with_the_stock_loader(is_sharded, tmp_path):
    save_in_mistrals_format(tmp_path / "model", is_sharded=is_sharded)
    first, second = check(tmp_path / "model", Layout(tp=2), tmp_path, stock_format="auto")
    assert first.num_bytes + second.num_bytes == sum(
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        for path in (tmp_path / "model").glob("*.safetensors")
    )


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "index"])
def test_of_both_formats_in_a_folder_that_of_vllms_configuration_is_read(is_sharded, tmp_path):
    save_in_mistrals_format(tmp_path / "model", is_sharded=is_sharded)
    save_checkpoint("mistral", tmp_path / "model", seed=1)
    check(tmp_path / "model", Layout(tp=2), tmp_path, stock_format="auto")
    other = Layout(tp=2, arguments={"config_format": "hf"})
    save_checkpoint("mistral", tmp_path / "other", seed=1)
    theirs = on_all_ranks(tmp_path / "other", Layout(tp=2), [stock], tmp_path)
    mine = on_all_ranks(tmp_path / "model", other, [ours], tmp_path)
    assert [rank[0].after for rank in mine] == [rank[0].after for rank in theirs]


def test_mistrals_own_format_is_read_from_s3_as_by_ray_streamer_serve(tmp_path, s3_credentials, monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    save_in_mistrals_format(tmp_path / "model", is_sharded=False)
    uri = s3_credentials.upload_folder(tmp_path / "model", "families", "mistral-format")
    folder = cached(uri)
    said = serve_arguments(uri, folder, [], Settings())
    served = Layout(tp=2, arguments={"config_format": said[said.index("--config-format") + 1]})
    theirs = on_all_ranks(tmp_path / "model", Layout(tp=2), [partial(stock, load_format="auto")], tmp_path)
    mine = on_all_ranks(folder, served, [partial(ours, uri=uri)], tmp_path)
    assert [rank[0].after for rank in mine] == [rank[0].after for rank in theirs]


def test_another_models_weights_are_refused_by_vllm_itself(tmp_path):
    save_checkpoint("llama", tmp_path / "llama")
    save_checkpoint("gpt2", tmp_path / "gpt2")
    with pytest.raises(AssertionError, match=r"transformer\.|wte|ValueError|KeyError"):
        on_all_ranks(tmp_path / "llama", Layout(tp=2), [partial(ours, uri=str(tmp_path / "gpt2"))], tmp_path)


def save_sharded_state(folder, _config, model):
    from vllm.model_executor.model_loader import ShardedStateLoader

    ShardedStateLoader.save_model(model, str(folder))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_folder_of_vllms_sharded_state_is_refused(tp, tmp_path):
    """It holds what ranks had after vLLM processed it. vLLM's example copies everything but the weights beside it."""
    model, state = tmp_path / "model", tmp_path / "state"
    save_checkpoint("llama", model)
    shutil.copytree(model, state, ignore=shutil.ignore_patterns("*.safetensors"))
    on_all_ranks(model, Layout(tp=tp), [stock], tmp_path, then=partial(save_sharded_state, state))
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"CheckpointError.*model-rank-0-part-0.*--load-format sharded_state"):
            on_all_ranks(state, Layout(tp=tp), [ours], tmp_path)
        (state / "model.safetensors.index.json").unlink(missing_ok=True)


def test_a_config_that_was_replaced_after_it_was_copied_ends_the_load(tmp_path, monkeypatch):
    """As where new files are pushed while `ray-streamer serve` starts; in a folder of the caller's it may be intended."""
    save_checkpoint("llama", tmp_path / "cache" / "model")
    weights = shutil.copytree(tmp_path / "cache" / "model", tmp_path / "weights")
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    check(tmp_path / "cache" / "model", Layout(tp=1), tmp_path, uri=str(weights))
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(AssertionError, match=r"ObjectChangedError.*says otherwise of rms_norm_eps"):
        check(tmp_path / "cache" / "model", Layout(tp=1), tmp_path, uri=str(weights))
