"""Presets against transformers 5.23: its own files, its own tensor-parallel plan, and its own modules run on our slices.

Models are tiny but whole: real classes, real names on disk, grouped-query attention, a vocabulary that divides by no tp.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.initialization import no_tie_weights
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration

from ray_streamer.checkpoint.index import CheckpointIndex
from ray_streamer.sharding import Box, Mesh, ShardRules, Split, SplitVocabulary, TensorSlice, legal_tp, resolve_slices
from ray_streamer.sharding.families import FAMILIES
from ray_streamer.testing import layouts

if TYPE_CHECKING:
    from pathlib import Path

IndexOf = Callable[..., CheckpointIndex]
Cut = Callable[[torch.Tensor, TensorSlice], torch.Tensor]

VOCABULARY = 130
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "attention_bias": False},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": {},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SPLIT_ALIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")


def config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    if model_type == "gemma3":
        text = SIZES | EXTRA["gemma3_text"] | changes
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, mm_tokens_per_image=1)
    return AutoConfig.for_model(model_type, **(SIZES | EXTRA[model_type] | changes))


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    if config.model_type == "gemma3":
        return Gemma3ForConditionalGeneration(config)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")


@dataclass(frozen=True)
class Saved:
    """A model, and the checkpoint that transformers itself wrote of it."""

    model: PreTrainedModel
    tensors: dict[str, torch.Tensor]
    index: CheckpointIndex


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, index_of: IndexOf) -> Callable[[str], Saved]:
    known: dict[str, Saved] = {}

    def save(model_type: str) -> Saved:
        if model_type not in known:
            torch.manual_seed(0)
            model = model_of(config_of(model_type)).double().eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            folder = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folder)
            tensors = load_file(folder / "model.safetensors")
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            config = AutoConfig.from_pretrained(folder).to_dict()
            known[model_type] = Saved(model, tensors, index_of(shapes, dtype="F64", config=config))
        return known[model_type]

    return save


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_tensor_that_transformers_writes_has_a_rule(model_type: str, saved: Callable[[str], Saved]) -> None:
    index = saved(model_type).index
    rules = ShardRules.for_config(index.config)
    table = resolve_slices(index, rules, Mesh(tp=2))
    placed = {rule for rule in rules.first_matches(index.names) if rule >= 0}
    idle = {rules.rules[position].glob for position in range(len(rules)) if position not in placed}
    # What a family's own checkpoint has no use for: biases, heads tied to embeddings, the text model's lack of towers.
    assert not {glob for glob in idle if not glob.endswith(".bias")} - {"*lm_head.weight"}
    assert sum(part is None for pattern in table.patterns for part in pattern) == 0


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_names_with_either_prefix_are_split_and_towers_are_not(prefix: str, index_of: IndexOf) -> None:
    names = {
        f"{prefix}layers.0.self_attn.k_proj.weight": (32, 16),
        f"{prefix}embed_tokens.weight": (9, 16),
        "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight": (15, 15),
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight": (15, 3, 5, 5),
        "multi_modal_projector.mm_input_projection_weight": (15, 16),
    }
    # What gemma-3-4b-it's config.json leaves out are the class' defaults: 8 heads, 4 key-value heads.
    rules = ShardRules.for_config({"model_type": "gemma3", "text_config": {"hidden_size": 2560}})
    table = resolve_slices(index_of(names), rules, Mesh(tp=8))
    shapes = [table.slice_of(tensor, 7).shape for tensor in range(len(names))]
    assert shapes == [(8, 16), (0, 16), *list(names.values())[2:]]


def test_sizes_that_gemma3_leaves_out_are_those_of_transformers() -> None:
    text = AutoConfig.for_model("gemma3_text")
    assert FAMILIES["gemma3"].defaults == {key: getattr(text, key) for key in FAMILIES["gemma3"].defaults}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "mixtral"])
def test_scales_of_quantized_checkpoints_match_no_rule(model_type: str, saved: Callable[[str], Saved]) -> None:
    index = saved(model_type).index
    rules = ShardRules.for_config(index.config)
    scales = [f"{name}_scale_inv" for name in index.names] + [f"{name}.absmax" for name in index.names]
    assert {rules.placement_of(name) for name in scales} == {None}


@pytest.fixture
def fake_rank() -> Iterator[Callable[[int, int], Any]]:
    """Makes this process one rank of a tensor-parallel mesh in which nobody else exists."""

    def start(rank: int, tp: int) -> Any:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp)
        return init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))

    yield start
    distributed.destroy_process_group()


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [*((name, {}) for name in SPLIT_ALIKE), ("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_slices_are_those_of_transformers_own_plan(
    model_type: str, changes: dict[str, Any], tp: int, fake_rank: Callable[[int, int], Any], index_of: IndexOf
) -> None:
    config = config_of(model_type, num_key_value_heads=4, **changes)
    for rank in range(tp):
        mesh = fake_rank(rank, tp)
        with torch.device("meta"), no_tie_weights():
            model = model_of(config)
        plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=tp, tp_plan="auto"))
        apply_tensor_parallelism(model, mesh, plan)
        parameters = dict(model.named_parameters())
        index = index_of({name: tuple(parameter.shape) for name, parameter in parameters.items()})
        table = resolve_slices(index, ShardRules.for_config(config.to_dict()), Mesh(tp=tp))
        for tensor, (name, parameter) in enumerate(parameters.items()):
            part = table.slice_of(tensor, rank)
            assert part is not None
            assert part.boxes == (_box_of(parameter, mesh),), name
            assert part.shape == part.boxes[0].shape
        assert sum(isinstance(parameter, DTensor) for parameter in parameters.values()) >= 2 + 2 * 7


def _box_of(parameter: torch.Tensor, mesh: Any) -> Box:
    shape, starts = tuple(parameter.shape), (0,) * parameter.ndim
    if isinstance(parameter, DTensor):
        shape, starts = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)
    stops = tuple(start + size for start, size in zip(starts, shape, strict=True))
    return Box(tuple(starts), stops, (0,) * parameter.ndim)


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("model_type", sorted(EXTRA))
def test_ranks_modules_add_up_to_the_whole_models(
    model_type: str, tp: int, saved: Callable[[str], Saved], cut: Cut, tmp_path: Path
) -> None:
    """Each rank's slices are loaded by transformers as a smaller model, whose attention and MLP outputs are summed.

    This is what tensor parallelism relies on, for shared key-value heads, fused projections and experts alike.
    """
    whole = saved(model_type)
    calls = _record_calls(whole.model)
    rules = ShardRules.for_config(whole.index.config)
    table = resolve_slices(whole.index, rules, Mesh(tp=tp))
    sums = {name: torch.zeros_like(output) for name, (_, _, output) in calls.items()}
    for rank in range(tp):
        slices: dict[str, torch.Tensor] = {}
        for tensor, name in enumerate(whole.index.names):
            part = table.slice_of(tensor, rank)
            assert part is not None
            # An uneven vocabulary is no smaller model, so the embedding is left whole; others test how it is split.
            is_vocabulary = rules.placement_of(name) == SplitVocabulary()
            slices[name] = whole.tensors[name] if is_vocabulary else cut(whole.tensors[name], part)
        modules = dict(_load_as_smaller_model(slices, whole.model, tp, tmp_path / str(rank)).named_modules())
        for name, (arguments, keywords, _) in calls.items():
            with torch.no_grad():
                sums[name] += _first(modules[name](*arguments, **keywords))
    assert len(calls) == 2 * SIZES["num_hidden_layers"]
    for name, (_, _, output) in calls.items():
        torch.testing.assert_close(sums[name], output, rtol=1e-9, atol=1e-9, msg=name)


def _record_calls(model: PreTrainedModel) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]:
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = {}
    handles: list[Any] = []
    for name, module in model.named_modules():
        if name.endswith((".self_attn", ".mlp")):

            def record(_: nn.Module, arguments: Any, keywords: Any, output: Any, name: str = name) -> None:
                calls[name] = (arguments, keywords, _first(output))

            handles.append(module.register_forward_hook(record, with_kwargs=True))
    with torch.no_grad():
        model(torch.arange(1, 7)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def _load_as_smaller_model(
    slices: dict[str, torch.Tensor], model: PreTrainedModel, tp: int, folder: Path
) -> PreTrainedModel:
    config = model.config.to_dict()
    smaller = {
        "num_attention_heads": config["num_attention_heads"] // tp,
        "num_key_value_heads": max(1, config["num_key_value_heads"] // tp),
        "intermediate_size": config["intermediate_size"] // tp,
        "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    }
    if "moe_intermediate_size" in config:
        smaller["moe_intermediate_size"] = config["moe_intermediate_size"] // tp
    folder.mkdir()
    type(model.config)(**(config | smaller)).save_pretrained(folder)
    save_file(slices, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, report = type(model).from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(itertools.chain(*report.values())), report
    return loaded.eval()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_attention_outputs_are_cut_between_heads() -> None:
    for model_type in sorted(FAMILIES):
        rules = ShardRules.for_config(config_of(model_type).to_dict())
        assert rules.placement_of("model.layers.0.self_attn.o_proj.weight") == Split(1, heads=8)


@pytest.mark.parametrize(
    ("layout", "num_tensors", "legal"),
    [
        pytest.param(
            layouts.llama_layout(8192, 80, 64, 8, 28672, 128256), 723, (1, 2, 4, 8, 16, 32, 64), id="llama-70b"
        ),
        pytest.param(layouts.phi3_layout(5120, 40, 40, 10, 17920, 100352), 243, (1, 2, 5, 10, 20, 40), id="phi-4"),
        pytest.param(
            layouts.mixtral_layout(4096, 32, 32, 8, 14336, 32000), 995, (1, 2, 4, 8, 16, 32), id="mixtral-8x7b"
        ),
        pytest.param(
            layouts.qwen3_moe_layout(2048, 48, 32, 4, 768, 151936), 18867, (1, 2, 4, 8, 16, 32), id="qwen3-30b-a3b"
        ),
    ],
)
def test_published_sizes(
    layout: layouts.ModelLayout, num_tensors: int, legal: tuple[int, ...], index_of: IndexOf
) -> None:
    index = index_of({tensor.name: tensor.shape for tensor in layout.tensors}, dtype="BF16", config=layout.config)
    assert len(index) == num_tensors
    assert legal_tp(index, ShardRules.for_config(layout.config)) == legal
