"""Writes docs/families.md: the families from their data, the oracles from a run of the tests' own comparison.

python docs/write_families.py                loads every tiny model on two and on four ranks; about a minute
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from ray_streamer.sharding.families import FAMILIES, RENAMED, Family, Role, Weight

PAGE = Path(__file__).with_name("families.md")
ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "sharding"
ORACLES = (
    "transformers",
    "from_tp_plan",
    "torch DCP",
    "get_slice, generic",
    "get_slice, vllm",
    "transformers, ep",
    "forward",
)

_HEAD = """\
# Model families

Which part of each tensor a rank holds follows from `model_type` in the checkpoint's config.json. A family is a few lines of data in
`ray_streamer/sharding/families`; names are those on disk, with any prefix. Other models: `rules=`, for
example `ShardRules.from_tp_plan(model.tp_plan)` from the plan that transformers has of a model on the meta device.

This page is made by `make docs`; a test checks that it is current.

## Layouts

`layout=` says what the tensors are for. Names and dtypes are always the checkpoint's.

| | `generic` | `transformers` | `vllm` |
|---|---|---|---|
| convention | Megatron-LM | the tensor-parallel plan of transformers 5.23 | the layers of vLLM 0.32 |
| vocabulary | ceil(size / tp) rows, the last ranks fewer | the same | rounded up to a multiple of 64, equal shares, rows that the checkpoint does not have are zero |
| fewer key-value heads than ranks | neighbours share a head | refused | neighbours share a head |
| dimensions that do not divide | refused | cut as `torch.chunk` does, but between heads | refused |
| q, k, v in one tensor (`qkv_proj`, `c_attn`) | each part cut by itself | Phi-3: one run of rows; its module gathers them | each part cut by itself |
| heads in turn (`query_key_value`) | whole groups, in their order | the same (GPT-NeoX) | sorted into queries, keys, values |
| gate and up in one tensor | each half cut by itself | experts: the same; Phi-3, GLM: one run of rows | each half cut by itself |
| gpt-oss experts | whole blocks of 32, the last ranks fewer | whole on every rank: it has no plan for them | whole blocks of 32, the last ranks fewer |
| latent attention (DeepSeek) | by heads | V2 by heads, V3 whole | by heads |
| what the plan does not name | | whole on every rank | |

`make test-vllm` compares `layout="vllm"` with what the loader of vLLM 0.32.0 takes, for every model type of this page that it loads, and for int8, AWQ and FP8, with tp=2: the same
elements of each tensor, in the same order. It found these differences, which are left to the engine:

- vLLM's layers hold weights of GPT-2 and stacked experts of gpt-oss and Llama 4 transposed.
- vLLM turns the queries and keys of Llama 4 for its rotary embedding.
- vLLM 0.32.0 runs GPT-NeoX and GLM by transformers, whose layers take one run of rows of `query_key_value` and `gate_up_proj`.

The load format of [vllm.md](vllm.md) does not use these rules: there vLLM's own loader decides the shards.

The bias of a row-parallel layer is replicated. The engine must add it on one rank only, or after the all-reduce.
vLLM joins q, k, v and gate, up of separate tensors; here `fuse=True` does. MTP layers (multi-token prediction) are not read unless `mtp=True`.

## Adapters

A folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT writes it, loads by its uri. `lora_A` and `lora_B` are cut as the module
that they sit on, so that each rank's `lora_B @ lora_A` is its own part of the change of the weight.

| the module's weight is cut along | `lora_A` | `lora_B`, its bias, `lora_magnitude_vector` |
|---|---|---|
| outputs (column-parallel) | whole | cut along outputs |
| inputs (row-parallel) | cut along inputs | whole |

Embeddings, modules saved whole (`modules_to_save`) and weights with their inputs first (Conv1D of GPT-2) have rules, too. Other kinds of
adapters (`peft_type`) and adapters of stacked experts have none: they are refused by name, unless you give rules. With `tp=1` every adapter loads whole.
`fuse` is refused.

The base model's config.json is needed for `tp` above 1. It is looked for beside the adapter, then at `base_model_name_or_path`, if that is a folder of
this machine or a model of the Hub.

## Families

| model_type | cut by heads | columns | rows | vocabulary | special |
|---|---|---|---|---|---|
"""

_ORACLES = """
## Compared with others

Every family is made with tiny sizes by transformers' own class and saved by transformers; then each rank of 2 and of 4 loads it as
ray_streamer does and as others do. Cells say how many tensors were compared, and how many of them are cut; every bit is alike on every rank.

- transformers: `from_pretrained` with its own tensor-parallel plan over gloo; ours with `layout="transformers"`.
- from_tp_plan: the same, and ours from `ShardRules.from_tp_plan(model.tp_plan)` alone, where the plan's names are those on disk.
- torch DCP: `HuggingFaceStorageReader` into tensors distributed as transformers does, where its names are those on disk.
- get_slice: safetensors cuts each box; this tells that the right bytes came, not that the rule is right.
- transformers, ep: its expert-parallel plan beside the tensor-parallel one; ours with `ep=True`: whole experts, a share on each rank.
- forward: the tensor-parallel model of transformers with our slices in place of its own gives the whole model's logits
  (float32, rtol 1e-4, atol 1e-5).

"""

_COLUMNS: dict[Role, int] = {
    Role.QUERY: 0,
    Role.KEY_VALUE: 0,
    Role.ATTENTION_OUTPUT: 0,
    Role.COLUMN_PARALLEL: 1,
    Role.ROW_PARALLEL: 2,
    Role.VOCABULARY: 3,
}


def render(findings: list[dict[str, Any]]) -> str:
    """The page; `findings` are those of tests/sharding/family_support/oracle_run.py."""
    return (
        _HEAD
        + "".join(_family_rows())
        + _renamed()
        + _ORACLES
        + "".join(_oracle_rows(findings))
        + "".join(_quantized(findings))
    )


def _renamed() -> str:
    types = ", ".join(f"`{renamed}` ({family})" for renamed, family in RENAMED.items())
    return (
        "\nSome model types are another family's architecture under a name of their own, and have its rules in the layouts "
        f"`generic` and `vllm`: {types}.\n"
    )


def _family_rows() -> list[str]:
    alike: dict[str, list[str]] = defaultdict(list)
    for model_type, family in FAMILIES.items():
        alike[" | ".join(_family_cells(family))].append(f"`{model_type}`")
    return [f"| {', '.join(model_types)} | {cells} |\n" for cells, model_types in alike.items()]


def _family_cells(family: Family) -> list[str]:
    cells: list[list[str]] = [[], [], [], [], []]
    for glob, meaning in (family.modules | family.tensors).items():
        weight = meaning if isinstance(meaning, Weight) else Weight(meaning)
        name = glob.removeprefix("*.").removeprefix("*").removeprefix("self_attn.")
        if weight.role in _COLUMNS and weight == Weight(weight.role):
            cells[_COLUMNS[weight.role]].append(name)
        elif weight.role is not Role.REPLICATED:
            cells[4].append(f"{name}: {_described(weight)}")
    cells[4] += [f"{glob}: not read" for glob in family.skipped]
    if family.num_mtp_layers or family.mtp:
        cells[4].append("MTP layers: not read unless asked")
    if family.towers:
        cells[4].append("other modalities: whole")
    if family.transformers is None:
        cells[4].append("no plan in transformers")
    return [", ".join(f"`{name}`" if " " not in name else name for name in cell) for cell in cells]


def _described(weight: Weight) -> str:
    words = weight.role.name.lower().replace("_", " ")
    where = f" [dimension {weight.inputs if weight.role is Role.ROW_PARALLEL else weight.outputs}]"
    unit = f" in units of {weight.unit}" if weight.unit else ""
    return words + (where if weight != Weight(weight.role) else "") + unit


def _oracle_rows(findings: list[dict[str, Any]]) -> list[str]:
    rows = ["| model | tp | " + " | ".join(ORACLES) + " |\n", "|---" * (2 + len(ORACLES)) + "|\n"]
    cells = _cells(findings)
    for model, tp in sorted({(model, tp) for model, tp, _ in cells}):
        shown = [cells.get((model, tp, oracle), "") for oracle in ORACLES]
        rows.append(f"| {model} | {tp} | " + " | ".join(shown) + " |\n")
    return rows


def _quantized(findings: list[dict[str, Any]]) -> list[str]:
    rows = [
        "\nQuantized weights, as numbers after dequantization:\n\n| model | tp | oracle | weights |\n|---|---|---|---|\n"
    ]
    for (model, tp, oracle), cell in sorted(_cells(findings).items()):
        if oracle not in ORACLES:
            rows.append(f"| {model} | {tp} | {oracle} | {cell} |\n")
    return rows


def _cells(findings: list[dict[str, Any]]) -> dict[tuple[str, int, str], str]:
    by_cell: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for finding in findings:
        by_cell[finding["model"], finding["tp"], finding["oracle"]].append(finding)
    return {key: _cell(key[2], ranks) for key, ranks in by_cell.items()}


def _cell(oracle: str, ranks: list[dict[str, Any]]) -> str:
    wrong = sorted({name for finding in ranks for name in finding["wrong"]})
    if wrong:
        return f"DIFFERENT: {', '.join(wrong)}"
    if oracle == "forward":
        return "same logits"
    return f"{ranks[0]['compared']}, {max(finding['cut'] for finding in ranks)} cut"


def run_oracles(folder: Path) -> list[dict[str, Any]]:
    """What every rank found; see tests/sharding/family_support/oracle_run.py."""
    command = [sys.executable, str(SUPPORT / "family_support" / "oracle_run.py"), str(folder)]
    # The families of these sources, whatever is installed.
    environment = os.environ | {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the comparison failed:\n{done.stderr[-4000:]}")
    return json.loads((folder / "oracles.json").read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        PAGE.write_text(render(run_oracles(Path(scratch))), encoding="utf-8")
