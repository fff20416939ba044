"""Does a model of transformers that this package loaded compute what transformers' own does? On one rank, and on two that share it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from ray_streamer.checkpoint.open import HEAD_BYTES
from ray_streamer.errors import CheckpointError, SettingsError, ShardingError
from ray_streamer.integrations.transformers import from_pretrained
from ray_streamer.integrations.transformers.support import refuse_uncuttable
from ray_streamer.settings import Settings
from ray_streamer.testing.spawned import answers_of

TIMEOUT_SECONDS = 300
SIZES = {
    "vocab_size": 130,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama_uneven": lambda: transformers.LlamaConfig(**SIZES | {"intermediate_size": 97, "vocab_size": 131}),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=8),
}
SETTINGS = {"memory_limit": 4 << 20, "block_bytes": 1 << 16, "page_cache": "off", "max_gap_bytes": 0}
PROMPT = [[5, 17, 42, 99, 7, 128, 3, 64]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models as transformers saves them."""
    torch.manual_seed(1)
    saved = {}
    for name, config in CONFIGS.items():
        model = transformers.AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
        saved[name] = tmp_path_factory.mktemp(name)
        model.generation_config.repetition_penalty = 1.5
        model.save_pretrained(saved[name])
    return saved


def own_logits(folder, **arguments):
    """What transformers itself computes in one process."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)
    return logits_of(model)


def logits_of(model):
    with torch.no_grad():
        return model(torch.tensor(PROMPT)).logits


def generated_by(model):
    return model.generate(torch.tensor(PROMPT), max_new_tokens=2, do_sample=False).tolist()


# One process


def small():
    return Settings.resolve(**SETTINGS)


@pytest.mark.parametrize("name", ["mixtral", "gemma3_text"])
def test_one_process_holds_what_transformers_would(folders, name):
    model = from_pretrained("auto", folders[name], settings=small())
    own = transformers.AutoModelForCausalLM.from_pretrained(folders[name])
    assert type(model) is type(own)
    assert not model.training
    assert model.generation_config.repetition_penalty == 1.5
    mine, theirs = dict(held_by(model)), dict(held_by(own))
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(mine[key], tensor), key
        assert (mine[key].dtype, mine[key].stride()) == (tensor.dtype, tensor.stride()), key
    assert torch.equal(logits_of(model), logits_of(own))


def held_by(model):
    """Parameters and every buffer, those that no checkpoint has included, by all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def test_tied_weights_stay_one(folders):
    model = from_pretrained("auto", folders["gemma3_text"], settings=small())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_are_cast_to_the_dtype_asked_for(folders):
    model = from_pretrained("auto", folders["mixtral"], dtype="float32", settings=small())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits_of(model), own_logits(folders["mixtral"], dtype="float32"))


def test_a_class_says_which_part_of_the_checkpoint_is_wanted(folders):
    for given in (transformers.AutoModel, transformers.LlamaModel):
        model = from_pretrained(given, folders["llama"], settings=small())
        assert type(model) is transformers.LlamaModel


def test_arguments_reach_transformers(folders):
    model = from_pretrained("auto", folders["llama"], attn_implementation="eager", settings=small())
    assert model.config._attn_implementation == "eager"


# Refused


def changed(folder, place, **config):
    """The checkpoint's folder with other words in its config, without weights."""
    said = json.loads((folder / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(said))
    return place


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq"])
def test_quantized_weights_are_refused_before_they_are_looked_for(folders, tmp_path, method):
    place = changed(folders["llama"], tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ShardingError, match=method):
        from_pretrained("auto", place)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param({"architectures": ["NobodyKnowsThis"]}, "NobodyKnowsThis", id="unknown-class"),
        pytest.param({"architectures": None}, "names no architectures", id="no-class"),
        pytest.param({"model_type": "nobody_knows_this"}, "nobody_knows_this", id="unknown-type"),
    ],
)
def test_a_config_without_a_class_is_refused(folders, tmp_path, config, said):
    with pytest.raises(CheckpointError, match=said):
        from_pretrained("auto", changed(folders["llama"], tmp_path, **config))


@pytest.mark.parametrize(
    ("config", "tp", "said"),
    [
        pytest.param(transformers.GptOssConfig, 2, "no tensor-parallel plan for model type gpt_oss", id="no-plan"),
        pytest.param(CONFIGS["llama"], 4, r"tp=4 .*num_key_value_heads=2; tp that work: 1, 2$", id="half-a-head"),
        pytest.param(CONFIGS["llama"], 3, r"num_attention_heads=4, num_key_value_heads=2", id="no-divisor"),
    ],
)
def test_what_transformers_cannot_cut_is_refused(config, tp, said):
    with pytest.raises(ShardingError, match=said):
        refuse_uncuttable(config(), tp, "s3://bucket/model")
    refuse_uncuttable(config(), 1, "s3://bucket/model")


@pytest.mark.parametrize(
    ("model_class", "arguments", "said"),
    [
        pytest.param("auto", {"tp": 2}, "tp=2, and this job has 1 rank", id="tp-without-ranks"),
        pytest.param("auto", {"device_map": "auto"}, "device_map", id="argument-of-ours"),
        pytest.param("auto", {"state_dict": {}, "tp_plan": "auto"}, "state_dict, tp_plan", id="arguments-of-ours"),
        pytest.param("llama", {}, "'llama'", id="no-class"),
        pytest.param(transformers.AutoModelForSeq2SeqLM, {}, "AutoModelForSeq2SeqLM", id="auto-class-of-others"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(folders, model_class, arguments, said):
    with pytest.raises(SettingsError, match=said):
        from_pretrained(model_class, folders["llama"], **arguments)


def test_missing_weights_are_an_error_and_not_random(folders):
    with pytest.raises(CheckpointError, match=r"lacks weights of LlamaForSequenceClassification: score\.weight"):
        from_pretrained(transformers.LlamaForSequenceClassification, folders["llama"], settings=small())


def test_weights_of_another_shape_are_an_error(folders, tmp_path):
    changed(folders["llama"], tmp_path, intermediate_size=48)
    (tmp_path / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    with pytest.raises(CheckpointError, match="LlamaForCausalLM could not be made of its weights"):
        from_pretrained("auto", tmp_path, settings=small())


# Two ranks


def compare(uri, folder):
    """What differs, on this rank, between our model and transformers' own, tensor-parallel and in one process."""
    wrong = []
    model = from_pretrained("auto", uri, settings=small())
    parallel = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
    )
    mine, theirs = dict(held_by(model)), dict(held_by(parallel))
    if mine.keys() != theirs.keys():
        wrong.append(f"names {mine.keys() ^ theirs.keys()}")
    for name, tensor in theirs.items():
        if not same_part(mine[name], tensor):
            wrong.append(name)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    distance = (logits_of(model) - logits_of(whole)).abs().max().item()
    if distance > 0.02:
        wrong.append(f"logits are {distance} away")
    if generated_by(model) != generated_by(parallel):
        wrong.append("generated tokens")
    return wrong


def same_part(mine, theirs):
    if isinstance(theirs, DTensor):
        return (
            isinstance(mine, DTensor)
            and (mine.placements, mine.shape) == (theirs.placements, theirs.shape)
            and torch.equal(mine.to_local(), theirs.to_local())
        )
    return not isinstance(mine, DTensor) and torch.equal(mine, theirs)


def compare_all(rank, uris, folders, meeting):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    return {name: compare(uris[name], folders[name]) for name in folders}


@pytest.mark.slow
def test_two_ranks_share_a_model_in_s3_and_read_it_once(folders, s3_credentials, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    # Its sizes are those of llama_uneven, and divide.
    folders = {name: folder for name, folder in folders.items() if name != "llama"}
    uris = {name: s3_credentials.upload_folder(folder, "transformers", name) for name, folder in folders.items()}
    sent = s3_credentials.bytes_sent()
    ranks = [(rank, uris, folders, tmp_path / "meeting") for rank in range(2)]
    answers = answers_of(compare_all, ranks, timeout_seconds=TIMEOUT_SECONDS)
    assert answers == [{name: [] for name in folders}] * 2
    sent = s3_credentials.bytes_sent() - sent
    files = [path for folder in folders.values() for path in folder.iterdir()]
    needed = sum(path.stat().st_size for path in files)
    # The first bytes of each file of weights, with its header, are all of files so small.
    heads = sum(min(HEAD_BYTES, path.stat().st_size) for path in files if path.suffix == ".safetensors")
    assert sent - heads < needed + 10_000 * len(folders)
