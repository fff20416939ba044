"""How long does planning take? Plans of real models' headers on one machine; no file and no Ray.

    python benchmarks/plan_deepseek.py --repeats 5

Prints medians over `--repeats` plans for each case: seconds by the clock, and of processor time, which other work on the
machine does not stretch. Only `plan_reads` is timed; index and slices are made before.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.read_plan import plan_reads
from ray_streamer.planning.summary import summarize
from ray_streamer.planning.topology import Topology
from ray_streamer.sharding import Mesh, ShardRules
from ray_streamer.sharding.source import RuleSlices
from ray_streamer.testing.layouts import deepseek_v3_layout, llama_layout
from ray_streamer.testing.plan_inputs import DEEPSEEK_V3_RULES, header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.read_plan import ReadPlan

LIMITS = ReadLimits(block_bytes=8 << 20, min_run_bytes=256 << 10, max_gap_bytes=64 << 10)


@dataclass(frozen=True, slots=True)
class Case:
    """One model on one cluster."""

    model: str
    index: CheckpointIndex
    rules: ShardRules
    mesh: Mesh
    num_nodes: int


def cases() -> list[Case]:
    """The cases of the table."""
    deepseek = header_only_index(deepseek_v3_layout().tensors, num_files=163)
    layout = llama_layout(8192, 80, 64, 8, 28672, 128256)
    llama = header_only_index(layout.tensors, num_files=30)
    llama_rules = ShardRules.for_config(layout.config)
    return [
        Case("DeepSeek-V3", deepseek, DEEPSEEK_V3_RULES, Mesh(tp=16), 1),
        Case("DeepSeek-V3", deepseek, DEEPSEEK_V3_RULES, Mesh(tp=16), 2),
        Case("DeepSeek-V3", deepseek, DEEPSEEK_V3_RULES, Mesh(tp=8, dp=64), 64),
        Case("Llama-3-70B", llama, llama_rules, Mesh(tp=8), 1),
        Case("Llama-3-70B", llama, llama_rules, Mesh(tp=64), 64),
    ]


def measure(case: Case, repeats: int) -> str:
    """One row of the table."""
    source = RuleSlices(mesh=case.mesh, rules=case.rules)
    slices = [source(case.index, rank) for rank in range(case.mesh.num_ranks)]
    topology = Topology.even(case.mesh.num_ranks, case.num_nodes)
    plans: list[ReadPlan] = []
    cpu_seconds: list[float] = []
    for _ in range(repeats):
        cpu_started = time.process_time()
        plans.append(plan_reads(case.index, slices, topology, LIMITS))
        cpu_seconds.append(time.process_time() - cpu_started)
    summary = summarize(plans[0])
    return (
        f"{case.model:12} {case.mesh.tp:3} {case.mesh.dp:3} {case.num_nodes:5} {summary.num_tensors:7}"
        f" {median(plan.plan_seconds for plan in plans):8.3f} {median(cpu_seconds):6.3f} {summary.requests:9} {summary.amplification:6.3f}"
        f" {summary.nodes[0].checkpoint_fraction:6.3f}"
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=_positive, default=5, help="plans per case; the median is printed")
    arguments = parser.parse_args()
    print("model         tp  dp nodes tensors  seconds    cpu  requests   read/  read/")
    print("                                                             needed   ckpt")
    for case in cases():
        print(measure(case, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
