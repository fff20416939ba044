"""`load_sharded(bootstrap="transformers")` on a real local Ray: ranks hold a model, generate as one, and stream what they generate."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
import ray
import torch
import transformers
from api_support import example_tasks
from torch.distributed.tensor import DTensor

import ray_streamer
from ray_streamer.errors import ClusterError, RankFailedError, SettingsError, ShardingError
from ray_streamer.integrations.transformers import TransformersBootstrap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# The actors cannot import a test module; they get its functions by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PROMPT = [[5, 17, 42, 99, 7, 128, 3, 64]]
NUM_TOKENS = 6
GREEDY = {"max_new_tokens": NUM_TOKENS, "do_sample": False}


@pytest.fixture(scope="module")
def folder(save_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"), eos_token_id=2)


@pytest.fixture(scope="module")
def own(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(local_ray: None, folder: Path) -> Iterator[Any]:
    settings = ray_streamer.Settings(page_cache="off", memory_limit=1 << 20)
    with ray_streamer.load_sharded(folder, tp=2, bootstrap="transformers", settings=settings) as loaded:
        yield loaded


def expected(own: Any, **arguments: Any) -> list[list[int]]:
    return own.generate(torch.tensor(PROMPT), **arguments).tolist()


class Listener(transformers.generation.streamers.BaseStreamer):
    """What transformers' streamers are: objects that are given tensors."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_the_ranks_generate_what_one_process_does(model: Any, own: Any) -> None:
    assert model.generate(torch.tensor(PROMPT), **GREEDY).tolist() == expected(own, **GREEDY)
    two = [*PROMPT, PROMPT[0][::-1]]
    assert model.generate(two, **GREEDY).tolist() == own.generate(torch.tensor(two), **GREEDY).tolist()


def test_inputs_may_be_what_a_tokenizer_gives(model: Any, own: Any) -> None:
    given = {"input_ids": torch.tensor([[0, *PROMPT[0]]]), "attention_mask": torch.tensor([[0] + [1] * len(PROMPT[0])])}
    assert model.generate(**given, **GREEDY).tolist() == own.generate(**given, **GREEDY).tolist()


def test_tokens_stream_one_by_one(model: Any, own: Any) -> None:
    new = expected(own, **GREEDY)[0][len(PROMPT[0]) :]
    stream = model.stream(PROMPT, **GREEDY)
    assert iter(stream) is stream
    assert list(stream) == new
    assert list(stream) == []


def test_tokens_that_are_taken_while_the_next_generation_runs_are_all_there(model: Any, own: Any) -> None:
    new = expected(own, **GREEDY)[0][len(PROMPT[0]) :]
    late, later = model.stream(PROMPT, **GREEDY), model.stream(PROMPT, **GREEDY)
    # It has its turn once the ranks have ended the generations before.
    model.generate([PROMPT[0][::-1]], **GREEDY)
    assert (list(late), list(later)) == (new, new)


def test_a_streamer_of_transformers_hears_prompt_tokens_and_end(model: Any, own: Any) -> None:
    mine, theirs = Listener(), Listener()
    assert model.generate(PROMPT, streamer=mine, **GREEDY).tolist() == expected(own, streamer=theirs, **GREEDY)
    assert mine.heard == theirs.heard


def test_sampling_follows_the_seed(model: Any, own: Any) -> None:
    sampled = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    torch.manual_seed(7)
    assert model.generate(PROMPT, seed=7, **sampled).tolist() == expected(own, **sampled)
    assert list(model.stream(PROMPT, seed=7, **sampled)) == model.generate(PROMPT, seed=7, **sampled)[0, 8:].tolist()


def test_a_stream_that_is_closed_ends_the_generation_on_all_ranks(model: Any, own: Any) -> None:
    # No end of its own within the time of a test.
    stream = model.stream(PROMPT, max_new_tokens=100_000, do_sample=False, eos_token_id=-1)
    first = next(stream)
    stream.close()
    assert list(stream) == []
    assert [first] == expected(own, **GREEDY)[0][len(PROMPT[0]) :][:1]
    # The next one has its turn when that one has ended.
    assert model.generate(PROMPT, **GREEDY).tolist() == expected(own, **GREEDY)
    next(model.stream(PROMPT, max_new_tokens=100_000, do_sample=False, eos_token_id=-1))
    assert model.generate(PROMPT, **GREEDY).tolist() == expected(own, **GREEDY)


def test_functions_find_the_model_beside_its_tensors(model: Any) -> None:
    def look(context: Any) -> tuple[str, bool, bool, int]:
        weight = context.model.lm_head.weight
        own_part = weight.to_local()
        return (
            type(context.model).__name__,
            isinstance(weight, DTensor),
            own_part.data_ptr() == context.tensors["lm_head.weight"].data_ptr(),
            own_part.shape[0],
        )

    assert model.run(look) == [("LlamaForCausalLM", True, True, rows) for rows in (66, 65)]


def test_each_byte_is_read_once_and_whole_tensors_can_be_gathered(model: Any, own: Any) -> None:
    report = model.stats()
    assert (report.mesh["tp"], report.amplification) == (2, 1.0)
    assert report.needed_bytes == report.checkpoint_bytes
    for name in ("lm_head.weight", "model.layers.1.self_attn.o_proj.weight", "model.norm.weight"):
        assert torch.equal(model.gather(name), own.state_dict()[name])
    assert model.plan.plan_hash == report.plan_hash


def test_what_transformers_refuses_leaves_the_ranks_in_step(model: Any, own: Any) -> None:
    for refused in ({"num_beams": 2}, {"no_such_argument": 1}):
        with pytest.raises(RankFailedError) as caught:
            list(model.stream(PROMPT, max_new_tokens=2, **refused))
        assert isinstance(caught.value.cause, ValueError)
    with pytest.raises(RankFailedError, match="2 sequences"):
        next(model.stream(PROMPT * 2, **GREEDY))
    assert model.generate(PROMPT, **GREEDY).tolist() == expected(own, **GREEDY)


@pytest.mark.parametrize("name", ["synced_gpus", "return_dict_in_generate"])
def test_arguments_without_a_meaning_here_are_refused(model: Any, name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        model.generate(PROMPT, **{name: True})


@pytest.mark.parametrize("wrong", ["Once upon a time", [[1, 2], [3]], {"input_ids": [[1]]}])
def test_a_prompt_that_is_no_token_ids_is_refused(model: Any, wrong: Any) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(SettingsError, match="inputs is a tensor of token ids"):
            call(wrong, max_new_tokens=1)


def test_a_rank_that_is_not_there_is_not_restarted(model: Any) -> None:
    pids = model.run(lambda context: os.getpid())
    for rank in (-1, 2):
        with pytest.raises(SettingsError, match="there is no rank"):
            model.restart(rank)
    assert model.run(lambda context: os.getpid()) == pids


@pytest.mark.slow
def test_a_killed_rank_is_named_and_restart_makes_the_model_anew(model: Any, own: Any) -> None:
    pids = model.run(lambda context: os.getpid())
    stream = model.stream(PROMPT, max_new_tokens=100_000, do_sample=False, eos_token_id=-1)
    next(stream)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RankFailedError):
        list(stream)
    with pytest.raises(ClusterError, match=r"restart\(rank\)"):
        model.generate(PROMPT, **GREEDY)
    # The example restarts, and then answers.
    example = example_tasks.loaded_example("generate_from_job")
    assert list(example.answer(model, PROMPT[0], NUM_TOKENS)) == expected(own, **GREEDY)[0][len(PROMPT[0]) :]
    assert not set(model.run(lambda context: os.getpid())) & set(pids)
    assert model.stats().amplification == 1.0


def test_a_tp_that_cuts_heads_is_refused_by_the_ranks_which_keep_their_model(
    model: Any, own: Any, folder: Path, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.num_key_value_heads = 1
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ShardingError, match=r"tp=2 does not divide num_key_value_heads=1; tp that work: 1$"):
        model.reload(tmp_path)
    assert model.generate(PROMPT, **GREEDY).tolist() == expected(own, **GREEDY)


def test_reload_makes_the_model_of_other_weights(model: Any, own: Any, folder: Path, tmp_path: Path) -> None:
    changed = transformers.LlamaForCausalLM(own.config)
    torch.nn.init.normal_(changed.lm_head.weight)
    changed.save_pretrained(tmp_path)
    report = model.reload(tmp_path)
    assert report.uri == str(tmp_path)
    assert model.generate(PROMPT, **GREEDY).tolist() == expected(changed, **GREEDY)
    model.reload(folder)
    assert model.generate(PROMPT, **GREEDY).tolist() == expected(own, **GREEDY)


# Refused before anything is read, or started


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param({"bootstrap": "vllm"}, "bootstrap is transformers, got 'vllm'", id="unknown"),
        pytest.param({"pp": 2, "fuse": True}, "leave out pp, fuse", id="parts"),
        pytest.param({"rules": {"*": ray_streamer.Split(0)}}, "leave out rules", id="rules"),
        pytest.param({"replicas": 2}, "leave out replicas", id="replicas"),
        pytest.param({"slices": ray_streamer.RuleSlices()}, "leave out slices", id="slices"),
        pytest.param({"dtype": {"*.bias": "float32"}}, "one dtype for a model", id="dtypes"),
    ],
)
def test_arguments_that_the_model_decides_are_refused(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        ray_streamer.load_sharded(tmp_path / "nothing", **{"bootstrap": "transformers", **arguments})


def test_arguments_of_transformers_that_are_ours_are_refused() -> None:
    with pytest.raises(SettingsError, match="device_map"):
        TransformersBootstrap("auto", {"device_map": "auto"})


def test_quantized_weights_are_refused_before_ray_starts(folder: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "gptq"}
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ShardingError, match="gptq"):
        ray_streamer.load_sharded(tmp_path, tp=2, bootstrap="transformers", address="127.0.0.1:1")


@pytest.mark.slow
def test_one_rank_alone_holds_the_whole_model(local_ray: None, folder: Path, own: Any) -> None:
    asked = TransformersBootstrap(transformers.LlamaForCausalLM, {"attn_implementation": "eager"})
    with ray_streamer.load_sharded(folder, bootstrap=asked, dtype="float32") as model:
        assert model.generate(PROMPT, **GREEDY).tolist() == expected(own, **GREEDY)
        assert model.run(lambda context: context.model.config._attn_implementation) == ["eager"]
