"""What would loads of real models read, on which mesh and over how many nodes? The table of docs/plans.md, from headers alone.

    python benchmarks/plan_layouts.py > docs/plans.md

Names, dtypes and shapes are those of the published checkpoints (`ray_streamer.testing.layouts`); placements are the presets'.
Nothing is measured: every figure follows from the plan.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.summary import summarize
from ray_streamer.planning.tensor_reads import explain_tensors
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Mesh
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.testing.layouts import deepseek_v3_layout, llama_layout, mixtral_layout, qwen3_layout
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.read_plan import ReadPlan

LIMITS = ReadLimits(block_bytes=8 << 20, min_run_bytes=256 << 10, max_gap_bytes=64 << 10)

DENSE = (Mesh(tp=8), Mesh(tp=16), Mesh(tp=8, pp=2))
MIXTURE = (*DENSE, Mesh(tp=8, ep=8), Mesh(tp=8, pp=2, ep=8))

HEAD = """# What real models are read with

Made by `python benchmarks/plan_layouts.py` from the headers of the published checkpoints; no byte was loaded for it. Limits are those
of an object store: blocks of 8 MiB, runs of at least 256 KiB are read exactly, gaps of up to 64 KiB are read over.

`read / needed` is what all nodes read, over what their ranks need, each node for itself. `read / model` is the same over what is
needed of the checkpoint at all: with replicas, or where nodes share a tensor, a byte may be needed on several nodes. On one node both
are 1.00: every byte is read once. The runs named are those of the largest tensor of that name. DeepSeek-V3 is loaded without its MTP layer, which is not read.

| model | mesh | nodes | needed GB per node | requests | read / needed | read / model | why not 1.00 |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Model:
    """A published checkpoint: its headers and the meshes that it is planned on."""

    name: str
    index: CheckpointIndex
    meshes: tuple[Mesh, ...]


def models() -> list[Model]:
    """The models of the table."""
    layouts = {
        "Llama-3-8B": (llama_layout(4096, 32, 32, 8, 14336, 128256), 4, DENSE),
        "Llama-3-70B": (llama_layout(8192, 80, 64, 8, 28672, 128256), 30, DENSE),
        "Qwen3-32B": (qwen3_layout(5120, 64, 64, 8, 25600, 151936), 17, DENSE),
        "Mixtral-8x7B": (mixtral_layout(4096, 32, 32, 8, 14336, 32000), 19, MIXTURE),
        "DeepSeek-V3": (
            deepseek_v3_layout(),
            163,
            (*DENSE, Mesh(tp=16, ep=16), Mesh(tp=8, pp=2, ep=8), Mesh(dp=16, ep=16)),
        ),
    }
    return [
        Model(name, header_only_index(layout.tensors, num_files=num_files, config=layout.config), meshes)
        for name, (layout, num_files, meshes) in layouts.items()
    ]


def rows(model: Model) -> list[str]:
    """The table's rows of one model."""
    table: list[str] = []
    for mesh in model.meshes:
        source = RuleSlices(mesh=mesh)
        slices = [source(model.index, rank) for rank in range(mesh.num_ranks)]
        for num_nodes in (1, 2) if mesh.num_ranks > 8 else (1,):
            plan = plan_reads(model.index, slices, Topology.even(mesh.num_ranks, num_nodes), LIMITS)
            table.append(_row(model.name, mesh, num_nodes, plan))
    return table


def _row(name: str, mesh: Mesh, num_nodes: int, plan: ReadPlan) -> str:
    summary = summarize(plan)
    index = plan.index
    is_held = np.zeros(len(index), bool)
    for said in plan.slices:
        is_held[said.tensor_ids] = True
    held = int((index.stops - index.starts)[is_held].sum())
    gigabytes = ", ".join(dict.fromkeys(f"{node.needed_bytes / 1e9:.1f}" for node in summary.nodes))
    sizes = {"tp": mesh.tp, "pp": mesh.pp, "replicas": mesh.dp, "ep": mesh.ep}
    shown = " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    return (
        f"| {name} | {shown} | {num_nodes} | {gigabytes} | {summary.requests:,} | {summary.amplification:.2f} "
        f"| {summary.read_bytes / held:.2f} | {_reasons(plan, held)} |"
    )


def _reasons(plan: ReadPlan, needed_bytes: int) -> str:
    """The modules that cost more than half a percent: read with what lies between their runs, or needed on both nodes."""
    between: dict[str, int] = defaultdict(int)
    twice: dict[str, int] = defaultdict(int)
    runs: dict[str, str] = {}
    for read in explain_tensors(plan):
        module = read.name.split(".")[-2]
        between[module] += read.read_bytes - read.needed_bytes
        twice[module] += max(0, read.needed_bytes - read.num_bytes)
        if read.strategy == "covered":
            runs.setdefault(module, read.reason.partition(" are below")[0])
    short = [f"{module} ({runs[module]})" for module in _costly(between, needed_bytes) if module in runs]
    parts = [f"read with what lies between: {', '.join(short)}"] if short else []
    if both := _costly(twice, needed_bytes):
        parts.append(f"needed on both nodes: {', '.join(both)}")
    return "; ".join(parts)


def _costly(extra: dict[str, int], needed_bytes: int) -> list[str]:
    modules = sorted(extra, key=lambda module: -extra[module])
    return [module for module in modules if extra[module] > needed_bytes / 200]


def main() -> None:
    """Prints the page."""
    print(HEAD)
    for model in models():
        for row in rows(model):
            print(row, flush=True)


if __name__ == "__main__":
    main()
