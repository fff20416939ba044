"""Does a model of transformers that this package loaded compute what transformers' own does? On one rank, and on two that share it."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from ray_streamer.api.rank import load_rank
from ray_streamer.checkpoint.header_reads import HEAD_BYTES
from ray_streamer.checkpoint.named import open_index
from ray_streamer.errors import CheckpointError, ObjectChangedError, ObjectMissingError, SettingsError, ShardingError
from ray_streamer.integrations.captured_slices import read_tensors
from ray_streamer.integrations.transformers import from_pretrained
from ray_streamer.integrations.transformers.loader import ModelBuild
from ray_streamer.integrations.transformers.support import refuse_packed, refuse_uncuttable
from ray_streamer.integrations.transformers.turns import others_turn, own_turn
from ray_streamer.named_checkpoint import NamedCheckpoint
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
SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"
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


@pytest.mark.parametrize("asked", ["auto", "float32", torch.float16, None])
def test_a_dtype_may_have_its_older_name(folders, asked):
    model = from_pretrained("auto", folders["llama"], torch_dtype=asked, settings=small())
    own = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], torch_dtype=asked)
    assert (model.dtype, model.config.dtype) == (own.dtype, own.config.dtype)


def test_a_model_says_where_it_came_from(folders):
    """PEFT writes the name that is in the model's own dictionary into adapter_config.json."""
    model = from_pretrained("auto", folders["llama"], settings=small())
    assert {model.name_or_path, model.model.name_or_path, model.config.name_or_path} == {str(folders["llama"])}
    assert vars(model)["name_or_path"] == str(folders["llama"])


def test_a_class_says_which_part_of_the_checkpoint_is_wanted(folders):
    for given in (transformers.AutoModel, transformers.LlamaModel):
        model = from_pretrained(given, folders["llama"], settings=small())
        assert type(model) is transformers.LlamaModel


TOWER = {
    "hidden_size": 32,
    "projection_dim": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture
def clip(tmp_path):
    """A model of two towers."""
    text, vision = TOWER | {"vocab_size": 64}, TOWER | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPVisionModel", "CLIPTextModelWithProjection"])
def test_a_class_of_a_part_takes_the_config_of_that_part(clip, name):
    asked = getattr(transformers, name)
    model, own = from_pretrained(asked, clip, settings=small()), asked.from_pretrained(clip)
    assert type(model.config) is type(own.config)
    assert model.config.to_dict() == own.config.to_dict() | {"_name_or_path": model.config.name_or_path}
    for key, tensor in own.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_a_class_of_another_family_takes_its_own_config(folders):
    model = from_pretrained(transformers.MistralForCausalLM, folders["llama"], settings=small())
    assert type(model.config) is transformers.MistralConfig
    assert model.config.sliding_window == 4096


def test_an_auto_class_of_the_text_takes_the_config_of_the_text(tmp_path):
    text = SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 96}
    vision = TOWER | {"image_size": 16, "patch_size": 8, "vision_output_dim": 32}
    vision |= {"projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    transformers.Llama4ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = from_pretrained(transformers.AutoModelForCausalLM, tmp_path, settings=small())
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(model), type(model.config)) == (type(own), type(own.config))
    assert torch.equal(model.model.norm.weight, own.model.norm.weight)


def test_a_part_is_quantized_as_the_whole(clip):
    changed(clip, clip, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ShardingError, match="gptq"):
        from_pretrained(transformers.CLIPTextModel, clip)


def test_arguments_reach_transformers(folders):
    model = from_pretrained("auto", folders["llama"], attn_implementation="eager", settings=small())
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_without_a_dtype_in_the_config_the_first_tensor_decides_as_in_transformers(folders, tmp_path, first):
    """The first by name, where the bytes of wider dtypes come first in a file."""
    changed(folders["llama"], tmp_path, dtype=None)
    other = torch.float32 if first is torch.bfloat16 else torch.bfloat16
    tensors = load_file(folders["llama"] / "model.safetensors")
    tensors = {name: tensor.to(first if name == min(tensors) else other) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = from_pretrained("auto", tmp_path, settings=small())
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {first}
    assert torch.equal(model.lm_head.weight, own.lm_head.weight)


def test_what_the_caller_says_of_the_config_is_in_it(folders):
    model = from_pretrained("auto", folders["llama"], use_cache=False, torch_dtype="float32", settings=small())
    assert model.config.use_cache is False
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_that_is_loaded_in_inference_mode_is_like_any_other(folders, tmp_path):
    torch.manual_seed(1)
    for folder in (folders["gemma3_text"], QUANTIZED["fp8"](tmp_path)):
        own = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.inference_mode():
            model = from_pretrained("auto", folder, settings=small())
        mine = dict(held_by(model))
        assert not any(tensor.is_inference() for tensor in mine.values())
        assert all(torch.equal(mine[key], tensor) for key, tensor in held_by(own))


def test_a_generation_config_is_the_callers_else_that_of_config_json(folders, tmp_path):
    given = transformers.GenerationConfig(num_beams=3)
    model = from_pretrained("auto", folders["llama"], generation_config=given, settings=small())
    assert (model.generation_config.num_beams, model.generation_config.repetition_penalty) == (3, None)
    # As checkpoints have it that are older than generation_config.json.
    changed(folders["llama"], tmp_path, num_beams=4, no_repeat_ngram_size=3)
    (tmp_path / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    model = from_pretrained("auto", tmp_path, settings=small())
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.num_beams == 4
    assert model.generation_config.to_dict() == own.generation_config.to_dict()


@pytest.mark.parametrize(
    "said", [{"eos_token_id": 99}, {"pad_token_id": 9}, {"use_cache": False}], ids=lambda it: next(iter(it))
)
@pytest.mark.parametrize("has_file", [True, False])
def test_what_the_caller_says_of_the_config_is_in_the_generation_config(folders, tmp_path, said, has_file):
    changed(folders["llama"], tmp_path)
    (tmp_path / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    if has_file:
        (tmp_path / "generation_config.json").symlink_to(folders["llama"] / "generation_config.json")
    model = from_pretrained("auto", tmp_path, attn_implementation="eager", settings=small(), **said)
    own = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **said)
    assert not has_file or said.items() <= model.generation_config.to_dict().items()
    assert model.generation_config.to_dict() == own.generation_config.to_dict()


# Several threads


def test_loads_in_several_threads_leave_transformers_as_it_was(folders):
    before = transformers.PreTrainedModel.tie_weights, torch.get_default_dtype(), os.environ.get(SWITCH)
    names = ["gemma3_text", "mixtral", "gemma3_text"]
    start = threading.Barrier(len(names))

    def load(name):
        start.wait(TIMEOUT_SECONDS)
        return from_pretrained("auto", folders[name], settings=small())

    with ThreadPoolExecutor(len(names)) as threads:
        models = list(threads.map(load, names))
    assert [model.lm_head.weight is model.model.embed_tokens.weight for model in models] == [True, False, True]
    assert (transformers.PreTrainedModel.tie_weights, torch.get_default_dtype(), os.environ.get(SWITCH)) == before
    assert torch.equal(logits_of(models[0]), own_logits(folders["gemma3_text"]))


def test_one_load_at_a_time_is_inside_of_transformers(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    seen = []

    def take_turn():
        with own_turn():
            seen.append("other")

    with ThreadPoolExecutor(1) as other:
        with own_turn(), own_turn():  # as of a model that loads another one
            taken = other.submit(take_turn)
            seen.append(os.environ.get(SWITCH))
            with others_turn():
                taken.result(TIMEOUT_SECONDS)
                seen.append(os.environ.get(SWITCH))
            seen.append(os.environ.get(SWITCH))
        with others_turn():
            seen.append(os.environ.get(SWITCH))
    assert seen == ["1", "other", None, "1", None]


def test_a_load_that_waits_for_values_lets_others_have_their_turn(folders, tmp_path):
    """Other ranks may be in that other load already, and wait for this one."""
    torch.manual_seed(1)
    folder = QUANTIZED["fp8"](tmp_path)
    build = ModelBuild("auto", folder, tp=1, dtype=None, device="cpu", settings=small(), model_arguments={})
    index = open_index(NamedCheckpoint.of(folder, small()), wants_base_config=False)
    loaded = []

    class Shared:
        bytes_read = 0

        def read(self, names):
            loading = other.submit(from_pretrained, "auto", folders["gemma3_text"], settings=small())
            loaded.append(loading.result(TIMEOUT_SECONDS))
            return read_tensors(build.uri, small(), index, names)

        def step(self):
            pass

    with ThreadPoolExecutor(1) as other:
        build.captured.with_values(index, 0, Shared())
    assert loaded[0].lm_head.weight is loaded[0].model.embed_tokens.weight
    assert build.captured.loaded is not None


def test_a_forked_process_has_its_turn_though_a_thread_of_its_parent_had_one(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    begun, ended = threading.Event(), threading.Event()

    def take_turn():
        with own_turn():
            begun.set()
            ended.wait(TIMEOUT_SECONDS)

    with ThreadPoolExecutor(1) as other:
        other.submit(take_turn)
        assert begun.wait(TIMEOUT_SECONDS)
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT_SECONDS)
            is_free = SWITCH not in os.environ
            with own_turn():
                os._exit(0 if is_free else 1)
        ended.set()
        assert os.waitpid(child, 0)[1] == 0


# Quantized


def quantized_fp8(place, config):
    """A model whose projections are FP8 in blocks of 16 x 16, as transformers names them."""
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
    quantized = {}
    for name, weight in load_file(place / "model.safetensors").items():
        if weight.dim() == 2 and "_proj" in name:
            rows, columns = (size // 16 for size in weight.shape)
            blocks = weight.float().reshape(rows, 16, columns, 16)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            quantized[f"{name}_scale_inv"] = scales.reshape(rows, columns)
            weight = (blocks / scales).reshape(weight.shape).to(torch.float8_e4m3fn)
        quantized[name] = weight
    save_file(quantized, place / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    return changed(place, place, quantization_config=said)


def quantized_mxfp4(place):
    """A gpt-oss whose experts are packed, with values and exponents of all kinds."""
    config = transformers.GptOssConfig(**SIZES | {"intermediate_size": 64}, num_local_experts=4, num_experts_per_tok=2)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
    packed = {}
    for name, weight in load_file(place / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, inputs, outputs = weight.shape
            shape = (num_experts, outputs, inputs // 32)
            packed[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
        else:
            packed[name] = weight
    save_file(packed, place / "model.safetensors", {"format": "pt"})
    return changed(place, place, quantization_config={"quant_method": "mxfp4"})


QUANTIZED = {
    "fp8": lambda place: quantized_fp8(place, transformers.LlamaConfig(**SIZES)),
    "fp8_experts": lambda place: quantized_fp8(
        place,
        transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    ),
    "mxfp4": quantized_mxfp4,
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_what_transformers_makes_of_them(name, tmp_path):
    torch.manual_seed(1)
    folder = QUANTIZED[name](tmp_path)
    model = from_pretrained("auto", folder, settings=small())
    own = transformers.AutoModelForCausalLM.from_pretrained(folder)
    mine, theirs = dict(held_by(model)), dict(held_by(own))
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (mine[key].dtype, torch.equal(mine[key], tensor)) == (tensor.dtype, True), key
    assert hasattr(model.config, "quantization_config") == hasattr(own.config, "quantization_config")
    assert torch.equal(logits_of(model), logits_of(own))


@pytest.mark.parametrize("name", ["fp8", "fp8_experts"])
def test_fp8_weights_stay_as_they_are_where_transformers_keeps_them(name, tmp_path, monkeypatch):
    # As on a GPU: transformers asks for one before it decides.
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_finegrained_fp8.FineGrainedFP8HfQuantizer.validate_environment",
        lambda *_, **__: None,
    )
    folder = QUANTIZED[name](tmp_path)
    statistics = []
    model = from_pretrained("auto", folder, settings=small(), on_statistics=statistics.append)
    mine = dict(held_by(model))
    theirs = dict(held_by(transformers.AutoModelForCausalLM.from_pretrained(folder)))
    assert mine.keys() == theirs.keys()
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in mine.values()}
    for key, tensor in theirs.items():
        same = mine[key].view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.dim() else mine[key].equal(tensor)
        assert (mine[key].dtype, same) == (tensor.dtype, True), key
    assert statistics[0].bytes_read == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def test_mxfp4_that_transformers_keeps_packed_is_refused(tmp_path, monkeypatch):
    # As on a GPU with Triton and the kernels of MXFP4.
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_mxfp4.Mxfp4HfQuantizer.validate_environment", lambda *_, **__: None
    )
    config = transformers.GptOssConfig(quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ShardingError, match=r'MXFP4, which .* "dequantize": true'):
        refuse_packed(config, "cuda:0", "s3://bucket/model")
    refuse_packed(config, "cpu", "s3://bucket/model")
    config.quantization_config["dequantize"] = True
    refuse_packed(config, "cuda:0", "s3://bucket/model")


# Refused


def changed(folder, place, **config):
    """The checkpoint's folder with other words in its config, without weights."""
    said = json.loads((folder / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(said))
    return place


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "fbgemm_fp8", "mxfp8"])
def test_quantized_weights_are_refused_before_they_are_looked_for(folders, tmp_path, method):
    place = changed(folders["llama"], tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ShardingError, match=method):
        from_pretrained("auto", place)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param({"architectures": ["NobodyKnowsThis"]}, "NobodyKnowsThis", id="unknown-class"),
        pytest.param({"architectures": None}, "names no architectures", id="no-class"),
        pytest.param({"architectures": [5]}, "names class 5, no model", id="class-of-another-kind"),
        pytest.param({"architectures": ["AutoConfig"]}, "names class 'AutoConfig', no model", id="no-model"),
        pytest.param({"architectures": ["__version__"]}, "names class '__version__', no model", id="no-class-at-all"),
        pytest.param({"model_type": "nobody_knows_this"}, "nobody_knows_this", id="unknown-type"),
        pytest.param({"hidden_size": "64"}, "expected int, got str", id="text"),
        pytest.param({"num_attention_heads": 0}, "ZeroDivisionError", id="no-heads"),
        pytest.param({"num_attention_heads": 5, "head_dim": None}, "is not a multiple", id="heads-that-do-not-divide"),
        pytest.param({"rope_parameters": "x" * 10**6}, r"rope_parameters.{,700}$", id="text-without-end"),
        pytest.param({"num_labels": 10**9}, "'num_labels' is 1000000000; a model has at most", id="labels-without-end"),
        pytest.param(
            {"text_config": [{"num_mtp_layers": 2**70}]},
            "'num_mtp_layers' is an integer of 71 bits",
            id="layers-without-end",
        ),
    ],
)
def test_a_config_without_a_class_is_refused(folders, tmp_path, config, said):
    with pytest.raises(CheckpointError, match=said):
        from_pretrained("auto", changed(folders["llama"], tmp_path, **config))


@pytest.mark.parametrize("asked", ["auto", transformers.AutoModelForCausalLM])
def test_code_of_the_checkpoint_is_refused_where_it_is_asked_for(folders, tmp_path, asked):
    auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
    folder = changed(folders["llama"], tmp_path, auto_map=auto_map)
    (folder / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"own 'modeling_own\.Own'.*Leave trust_remote_code out"):
        from_pretrained(asked, folder, trust_remote_code=True)
    # Nobody asks for it here.
    for given, arguments in (
        (asked, {}),
        (asked, {"trust_remote_code": False}),
        (transformers.AutoModel, {"trust_remote_code": True}),
        (transformers.LlamaForCausalLM, {"trust_remote_code": True}),
    ):
        model = from_pretrained(given, folder, settings=small(), **arguments)
        assert type(model).__module__.startswith("transformers.")


def test_code_of_the_checkpoint_is_told_also_where_transformers_does_not_know_the_type(folders, tmp_path):
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"}
    folder = changed(folders["llama"], tmp_path, auto_map=auto_map, model_type="nobody_knows_this")
    with pytest.raises(CheckpointError, match=r"checkpoint's own 'own\.Own'"):
        from_pretrained("auto", folder, trust_remote_code=True)


def test_a_config_that_lies_in_itself_without_end_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    with pytest.raises(CheckpointError, match=r"config\.json is (not valid JSON|nested deeper)"):
        from_pretrained("auto", tmp_path)


@pytest.mark.parametrize(
    "said", [[], {"cache_implementation": "bogus"}, {"watermarking_config": 5}], ids=["list", "word", "number"]
)
def test_a_generation_config_that_transformers_refuses_is_told_before_weights_are_read(folders, tmp_path, said):
    folder = changed(folders["llama"], tmp_path)
    (folder / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    (folder / "generation_config.json").write_text(json.dumps(said))
    statistics = []
    with pytest.raises(CheckpointError, match=r"no generation config from its generation_config\.json"):
        from_pretrained("auto", folder, settings=small(), on_statistics=statistics.append)
    assert statistics == []


@pytest.fixture
def both(folders, tmp_path):
    """A folder with a model in shards, and another one in model.safetensors."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    with torch.no_grad():
        model.model.norm.weight.fill_(2)
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder_of_which_transformers_would_read_other_files_is_refused(both):
    own = transformers.AutoModelForCausalLM.from_pretrained(both)
    assert own.model.norm.weight[0] == 2
    with pytest.raises(CheckpointError, match=r"/model\.safetensors or .*/model\.safetensors\.index\.json"):
        from_pretrained("auto", both)
    for name, value in (("model.safetensors", 2), ("model.safetensors.index.json", 1)):
        model = from_pretrained("auto", both / name, settings=small())
        assert model.model.norm.weight[0] == value
    (both / "model.safetensors").unlink()
    assert from_pretrained("auto", both, settings=small()).model.norm.weight[0] == 1


def test_weights_that_config_json_names_are_those_that_are_meant(both):
    changed(both, both, transformers_weights="model.safetensors.index.json")
    own = transformers.AutoModelForCausalLM.from_pretrained(both)
    model = from_pretrained("auto", both, settings=small())
    assert model.model.norm.weight[0] == own.model.norm.weight[0] == 1
    (both / "model.safetensors").rename(both / "mine.safetensors")
    changed(both, both, transformers_weights="mine.safetensors")
    with pytest.raises(CheckpointError, match=r"names 'mine\.safetensors', which transformers reads"):
        from_pretrained("auto", both)
    own = transformers.AutoModelForCausalLM.from_pretrained(both)
    model = from_pretrained("auto", both / "mine.safetensors", settings=small())
    assert model.model.norm.weight[0] == own.model.norm.weight[0] == 2


def test_a_folder_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ObjectMissingError, match=f"no such file or folder: {tmp_path}/nothing"):
        from_pretrained("auto", tmp_path / "nothing")
    with pytest.raises(ObjectMissingError, match="did you mean hf://org/model"):
        from_pretrained("auto", "org/model")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter; give the uri of the model"):
        from_pretrained("auto", tmp_path)


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


@pytest.mark.parametrize("name", ["DeepseekV4Config", "NemotronHConfig", "PhimoeConfig"])
def test_heads_that_the_plan_leaves_whole_need_not_divide(name):
    config = getattr(transformers, name)(num_key_value_heads=1)
    assert not any("attn" in module for module in config.base_model_tp_plan)
    refuse_uncuttable(config, 2, "s3://bucket/model")


def test_layers_that_differ_in_heads_are_checked_one_by_one():
    """As those of Gemma 4 and EmbeddingGemma 2 do."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    heads = {"num_key_value_heads": 4, "attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 32}
    config = transformers.Gemma4TextConfig(**SIZES | layers | heads)
    refuse_uncuttable(config, 2, "s3://bucket/model")
    with pytest.raises(ShardingError, match=r"tp=4 .* num_key_value_heads=2 of layer 1; tp that work: 1, 2$"):
        refuse_uncuttable(config, 4, "s3://bucket/model")


@pytest.mark.parametrize(
    ("model_class", "arguments", "said"),
    [
        pytest.param("auto", {"tp": 2}, "tp=2, and this job has 1 rank", id="tp-without-ranks"),
        pytest.param("auto", {"device_map": "auto"}, "device_map", id="argument-of-ours"),
        pytest.param("auto", {"state_dict": {}, "tp_plan": "auto"}, "state_dict, tp_plan", id="arguments-of-ours"),
        pytest.param(
            "auto", {"revision": "v2", "variant": "fp16"}, "revision, variant .* uri says", id="what-a-uri-says"
        ),
        pytest.param("auto", {"frobnicate": 1}, "LlamaForCausalLM takes no argument frobnicate", id="unknown-argument"),
        pytest.param("auto", {"tp": 0}, "tp is a whole number of ranks, got 0", id="no-ranks"),
        pytest.param("auto", {"tp": "1"}, "tp is a whole number, got '1'", id="tp-as-text"),
        pytest.param("auto", {"settings": {"concurrency": 2}}, "settings is a ray_streamer", id="settings"),
        pytest.param("auto", {"dtype": 5}, "a dtype of torch or its name.*got 5", id="dtype-of-another-kind"),
        pytest.param("auto", {"dtype": "bf16"}, "such as .bfloat16.; got 'bf16'", id="no-dtype"),
        pytest.param(
            "auto", {"torch_dtype": "bf16"}, "such as .bfloat16.; got 'bf16'", id="no-dtype-by-its-older-name"
        ),
        pytest.param("llama", {}, "'llama'", id="no-class"),
        pytest.param(transformers.AutoModelForSeq2SeqLM, {}, "AutoModelForSeq2SeqLM", id="auto-class-of-others"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(folders, model_class, arguments, said):
    with pytest.raises(SettingsError, match=said):
        from_pretrained(model_class, folders["llama"], **arguments)


def test_a_job_that_does_not_say_its_number_of_ranks_is_refused(folders, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SettingsError, match=r"WORLD_SIZE .*'many'"):
        from_pretrained("auto", folders["llama"])


def test_a_device_may_be_torchs(folders):
    model = from_pretrained("auto", folders["llama"], device=torch.device("cpu"), settings=small())
    assert model.device == torch.device("cpu")


def test_missing_weights_are_an_error_and_not_random(folders):
    with pytest.raises(CheckpointError, match=r"lacks weights of LlamaForSequenceClassification: score\.weight"):
        from_pretrained(transformers.LlamaForSequenceClassification, folders["llama"], settings=small())


def test_weights_of_another_shape_are_an_error(folders, tmp_path):
    changed(folders["llama"], tmp_path, intermediate_size=48)
    (tmp_path / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    with pytest.raises(CheckpointError, match="LlamaForCausalLM could not be made of its weights"):
        from_pretrained("auto", tmp_path, settings=small())


def test_weights_of_a_checkpoint_whose_config_was_replaced_meanwhile_are_refused(folders, tmp_path):
    changed(folders["llama"], tmp_path)
    (tmp_path / "model.safetensors").symlink_to(folders["llama"] / "model.safetensors")
    build = ModelBuild("auto", tmp_path, tp=1, dtype=None, device="cpu", settings=small(), model_arguments={})
    changed(folders["llama"], tmp_path, rms_norm_eps=0.5)
    with pytest.raises(ObjectChangedError, match=r"config\.json was replaced"):
        load_rank(build.uri, slices=build.captured, out=build.captured.out, settings=small())


# Several ranks


def compare(uri, folder):
    """What differs, on this rank, between our model and transformers' own, tensor-parallel and in one process."""
    wrong = []
    model = from_pretrained("auto", uri, settings=small())
    parallel = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
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


def compare_all(rank, world_size, uris, folders, meeting):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    return {name: compare(uris[name], folders[name]) for name in folders}


@pytest.fixture
def differences(s3_credentials, tmp_path, monkeypatch):
    """What differs on each of so many ranks that share these models in S3; each byte must leave it once."""
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))

    def load(folders, world_size):
        uris = {name: s3_credentials.upload_folder(folder, "transformers", name) for name, folder in folders.items()}
        sent = s3_credentials.bytes_sent()
        ranks = [(rank, world_size, uris, folders, tmp_path / "meeting") for rank in range(world_size)]
        answers = answers_of(compare_all, ranks, timeout_seconds=TIMEOUT_SECONDS)
        sent = s3_credentials.bytes_sent() - sent
        files = [path for folder in folders.values() for path in folder.iterdir()]
        needed = sum(path.stat().st_size for path in files)
        # The first bytes of each file of weights, with its header, are all of files so small.
        heads = sum(min(HEAD_BYTES, path.stat().st_size) for path in files if path.suffix == ".safetensors")
        assert sent - heads < needed + 10_000 * len(folders)
        return answers

    return load


@pytest.mark.slow
def test_two_ranks_share_a_model_in_s3_and_read_it_once(folders, differences):
    # Its sizes are those of llama_uneven, and divide.
    folders = {name: folder for name, folder in folders.items() if name != "llama"}
    assert differences(folders, 2) == [{name: [] for name in folders}] * 2


@pytest.mark.slow
def test_four_ranks_share_models_in_s3_and_read_them_once(differences, tmp_path_factory):
    sizes = SIZES | {"num_key_value_heads": 4}
    configs = {
        "llama": transformers.LlamaConfig(**sizes),
        "mixtral": transformers.MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
        "gemma3_text": transformers.Gemma3TextConfig(**sizes, sliding_window=8),
    }
    torch.manual_seed(2)
    saved = {}
    for name, config in configs.items():
        saved[name] = tmp_path_factory.mktemp(name)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(saved[name])
    # Its one key-value head is on every rank.
    phimoe = transformers.PhimoeConfig(**SIZES | {"num_key_value_heads": 1}, num_local_experts=4)
    saved["phimoe"] = tmp_path_factory.mktemp("phimoe")
    transformers.AutoModelForCausalLM.from_config(phimoe, dtype=torch.bfloat16).save_pretrained(saved["phimoe"])
    saved["fp8"] = quantized_fp8(
        tmp_path_factory.mktemp("fp8"), transformers.LlamaConfig(**sizes | {"intermediate_size": 128})
    )
    assert differences(saved, 4) == [{name: [] for name in saved}] * 4
