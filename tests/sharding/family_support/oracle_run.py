"""Loads every tiny model on every rank as ray_streamer does and as others do, and compares bit for bit.

    python oracle_run.py FOLDER     checkpoints go to FOLDER, and what was found to FOLDER/oracles.json

One process imports what costs seconds and forks the ranks, first two, then four: each a member of a gloo group. Others are:

- transformers: `from_pretrained` with its own tensor-parallel plan; local shards, under their names on disk. Ours are those of
  `layout="transformers"`.
- transformers, ep: the same with its expert-parallel plan; ours with `ep=True`.
- from_tp_plan: the same, and ours from the rules that `ShardRules.from_tp_plan` makes of that plan.
- torch DCP: its reader for Hugging Face files, into tensors distributed as transformers distributes them.
- dequantized: torch DCP's reader for FP8 files, and transformers' conversion of MXFP4, applied to the whole and to slices.
- get_slice: safetensors cuts each box, for every layout; this tells whether the right bytes came, not whether the rule is right.
- forward: not a slice, but what the model makes of them: the tensor-parallel model of transformers with our slices in place
  of its own, against the whole model.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor

import ray_streamer
from family_support import others, quantized
from family_support.held import boxes_of, resolve
from family_support.tiny_models import MODEL_TYPES, model_class, save_model
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules
from ray_streamer.sharding.families import FAMILIES
from ray_streamer.testing.oracle import bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from family_support.others import Tensors
    from ray_streamer import CheckpointIndex
    from ray_streamer.slices import RankSlices

TP_SIZES = (2, 4)
VARIANTS = {
    "llama, with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, 90 between the halves": ("llama", {"intermediate_size": 90}),
    "mixtral, 90 between the halves": ("mixtral", {"intermediate_size": 90}),
    "phi3, 93 between the halves": ("phi3", {"intermediate_size": 93}),
}
"""Models with biases, and with sizes that do not divide, which transformers cuts all the same."""
OTHER_NAMES_ON_DISK = {"mixtral", "phimoe", "granitemoe", "gpt_neox", "gemma3", "mistral3", "llama4", "gemma4"}
"""Families whose plan names modules that are called otherwise on disk, or whose towers have layers, too."""
EXPERT_PARALLEL = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
FORWARD = ("llama", "qwen3", "mixtral", "gemma3_text")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rank found about one model: tensors compared, those of them that were cut, and what differs."""

    model: str
    oracle: str
    tp: int
    rank: int
    compared: int = 0
    cut: int = 0
    wrong: list[str]


def main(folder: Path) -> None:
    """Writes the checkpoints, starts the ranks, and gathers what they found."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Threads for each of a few small tensors cost more than they give.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for model_type in MODEL_TYPES:
        save_model(model_type, folder / model_type)
    for name, (model_type, sizes) in VARIANTS.items():
        save_model(model_type, folder / name, **sizes)
    quantized.save_fp8(folder / "fp8")
    quantized.save_mxfp4(folder / "mxfp4")
    # Imported before the ranks are forked, and so once.
    assert callable(ray_streamer.load_rank)
    assert callable(ray_streamer.plan)
    gc.freeze()
    findings = [finding for tp in TP_SIZES for finding in _run_ranks(folder, tp)]
    (folder / "oracles.json").write_text(json.dumps(findings))


def _run_ranks(folder: Path, tp: int) -> Iterator[dict[str, Any]]:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_run_rank, args=(folder, rank, tp)) for rank in range(tp)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    for rank in range(tp):
        yield from json.loads((folder / f"{tp}-{rank}.json").read_text())


def _run_rank(folder: Path, rank: int, tp: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(tp), "LOCAL_RANK": str(rank)}
    store = distributed.FileStore(str(folder / f"store-{tp}"), tp)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=tp)
    findings: list[Finding] = []
    try:
        for model_type in MODEL_TYPES:
            findings += _compare_slices(folder / model_type, rank, tp)
            if FAMILIES[model_type].transformers is not None:
                findings += _compare_plans(model_type, folder / model_type, rank, tp)
        for model_type in EXPERT_PARALLEL:
            findings.append(_compare_experts(model_type, folder / model_type, rank, tp))
        for name, (model_type, _) in VARIANTS.items():
            findings += _compare_plans(model_type, folder / name, rank, tp)
        findings.append(_compare_fp8(folder / "fp8", rank, tp))
        findings.append(_compare_mxfp4(folder / "mxfp4", rank, tp))
    except Exception:
        findings.append(Finding(model="", oracle="", tp=tp, rank=rank, wrong=[traceback.format_exc()]))
    (folder / f"{tp}-{rank}.json").write_text(json.dumps([asdict(finding) for finding in findings]))
    # A rank that failed leaves the others in a collective; they are ended when it is gone.
    distributed.destroy_process_group()


def _compare_slices(folder: Path, rank: int, tp: int) -> Iterator[Finding]:
    # What vllm's layout adds is best seen on four ranks: the last one's vocabulary is all padding, its neighbour's in part.
    for layout in ("generic", "vllm") if tp == TP_SIZES[-1] else ("generic",):
        index = ray_streamer.plan(str(folder), tp=tp, layout=layout).index
        held = resolve(index, ShardRules.for_config(index.config, layout=layout), Mesh(tp=tp))
        theirs = others.sliced_by_safetensors(folder, index, held, rank)
        yield _finding(folder, f"get_slice, {layout}", rank, tp, _load(folder, rank, tp, layout), theirs)


def _compare_plans(model_type: str, folder: Path, rank: int, tp: int) -> Iterator[Finding]:
    model = others.load_by_transformers(model_type, folder, tp)
    theirs = others.local_shards(model)
    ours = _load(folder, rank, tp, "transformers")
    yield _finding(folder, "transformers", rank, tp, ours, theirs)
    if model_type not in OTHER_NAMES_ON_DISK:
        yield _finding(folder, "from_tp_plan", rank, tp, _load_by_plan(folder, model.tp_plan, rank, tp), theirs)
    if read := others.read_by_dcp(folder, model, ours):
        yield _finding(folder, "torch DCP", rank, tp, ours, read)
    if folder.name in FORWARD:
        wrong = [] if _gives_the_same_logits(model_type, folder, model, ours) else ["logits"]
        yield Finding(model=folder.name, oracle="forward", tp=tp, rank=rank, compared=len(ours), wrong=wrong)


def _compare_experts(model_type: str, folder: Path, rank: int, tp: int) -> Finding:
    model = others.load_by_transformers(model_type, folder, tp, ep=tp)
    theirs = others.local_shards(model, first_expert=4 // tp * rank)
    ours = _load(folder, rank, tp, "transformers", ep=True)
    finding = _finding(folder, "transformers, ep", rank, tp, ours, theirs)
    # A rank must not hold others' experts either.
    return replace(finding, wrong=sorted({*finding.wrong, *(ours.keys() - theirs.keys())}))


def _finding(folder: Path, oracle: str, rank: int, tp: int, ours: Tensors, theirs: Tensors) -> Finding:
    whole = load_file(folder / "model.safetensors")
    names = theirs.keys() & whole.keys()
    wrong = sorted(name for name in names if not _is_equal(ours.get(name), theirs[name]))
    cut = sum(name in ours and ours[name].shape != whole[name].shape for name in names)
    return Finding(model=folder.name, oracle=oracle, tp=tp, rank=rank, compared=len(names), cut=cut, wrong=wrong)


def _load(folder: Path, rank: int, tp: int, layout: Any, *, ep: bool = False) -> Tensors:
    session = f"{os.getppid()}-{folder.name}-{layout}-{tp}-{ep}"
    return ray_streamer.load_rank(str(folder), rank=rank, world_size=tp, session=session, layout=layout, ep=ep)


def _load_by_plan(folder: Path, plan: dict[str, str], rank: int, tp: int) -> Tensors:
    source = RuleSlices(mesh=Mesh(tp=tp), rules=ShardRules.from_tp_plan(plan), unmatched="replicate")

    def slices(index: CheckpointIndex, rank: int) -> RankSlices:
        # Without the family's preset, which would go on where the plan says nothing.
        return source(replace(index, config=None), rank)

    session = f"{os.getppid()}-{folder.name}-plan-{tp}"
    return ray_streamer.load_rank(str(folder), rank=rank, world_size=tp, session=session, slices=slices)


def _is_equal(ours: torch.Tensor | None, theirs: torch.Tensor) -> bool:
    if ours is None or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return bytes_of(ours) == bytes_of(theirs.contiguous())


@torch.no_grad()
def _gives_the_same_logits(model_type: str, folder: Path, model: PreTrainedModel, ours: Tensors) -> bool:
    tokens = torch.arange(1, 9)[None]
    whole = model_class(model_type).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    expected = whole(tokens, use_cache=False).logits
    targets = {
        name: value.to_local() if isinstance(value, DTensor) else value for name, value in model.named_parameters()
    }
    for target in targets.values():
        target.fill_(float("nan"))
    for name, target in targets.items():
        # Mixtral's names on disk.
        on_disk = name.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else name
        target.copy_(ours[on_disk] if on_disk in ours else _stacked_experts(on_disk, ours))
    return torch.allclose(model(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


def _stacked_experts(name: str, ours: Tensors) -> torch.Tensor:
    """Mixtral's experts as transformers holds them in memory: all in one tensor, gate and up behind each other."""
    prefix, _, kind = name.rpartition(".")
    parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    numbers = range(sum(key.startswith(prefix) for key in ours) // 3)
    return torch.stack([torch.cat([ours[f"{prefix}.{at}.{part}.weight"] for part in parts]) for at in numbers])


def _compare_fp8(folder: Path, rank: int, tp: int) -> Finding:
    whole = others.dequantized_by_dcp(folder, quantized.FP8_SHAPES)
    ours = _load(folder, rank, tp, "generic")
    wrong = [
        name
        for name, part in _slices(folder, rank, tp).items()
        if name in whole and not torch.equal(quantized.dequantize_fp8(ours, name), whole[name][part])
    ]
    return _quantized_finding("llama", "torch DCP, dequantized FP8", rank, tp, len(whole), wrong)


def _compare_mxfp4(folder: Path, rank: int, tp: int) -> Finding:
    stored = load_file(folder / "model.safetensors")
    ours = _load(folder, rank, tp, "generic")
    wrong: list[str] = []
    slices = _slices(folder, rank, tp)
    for name in quantized.MXFP4_SHAPES:
        if not ours[name].numel():
            continue
        experts, rows, blocks, _ = slices[name]
        whole = quantized.dequantize_mxfp4(stored, name)
        expected = whole[experts, slice(blocks.start * 32, blocks.stop * 32), rows]
        if not torch.equal(quantized.dequantize_mxfp4(ours, name), expected):
            wrong.append(name)
    return _quantized_finding(
        "gpt_oss", "transformers, dequantized MXFP4", rank, tp, len(quantized.MXFP4_SHAPES), wrong
    )


def _slices(folder: Path, rank: int, tp: int) -> dict[str, tuple[slice, ...]]:
    """Where in its tensor each of this rank's slices lies, if it is of four dimensions or two."""
    index = ray_streamer.plan(str(folder), tp=tp).index
    held = resolve(index, ShardRules.for_config(index.config), Mesh(tp=tp))
    found: dict[str, tuple[slice, ...]] = {}
    for number, name in enumerate(index.names):
        part = held.slice_of(number, rank)
        assert part is not None
        if len(part.shape) in (2, 4):
            ((found[name], _),) = boxes_of(part) if part.num_elements else (((slice(0),) * len(part.shape), ()),)
    return found


def _quantized_finding(model: str, oracle: str, rank: int, tp: int, compared: int, wrong: list[str]) -> Finding:
    return Finding(model=model, oracle=oracle, tp=tp, rank=rank, compared=compared, cut=compared, wrong=wrong)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
