"""How long do ranks take to agree on what an engine's loaders would copy? DeepSeek-V3 as vLLM stacks it, 8 ranks, no file and no engine.

    python benchmarks/plan_captured.py

Every rank says moves into 3-D stacked experts and fused projections, as a dry run of a loader gives them. Timed, one after the
other in this process: what each rank does (check its slices, tell what it reads, cut its pieces), and what the first one does
for all (parse what was told, plan, tell). Printed: seconds, and the bytes that cross between the ranks.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import numpy as np

from ray_streamer.planning.fills import check_fills
from ray_streamer.planning.limits import ReadLimits
from ray_streamer.planning.node_plan import NodePlan, plan_node
from ray_streamer.planning.rank_plan import RankPlan
from ray_streamer.slices import Move, RankSlices, RankSources, ResultSpec, Side
from ray_streamer.slices.move import row_major
from ray_streamer.testing.layouts import deepseek_v3_layout
from ray_streamer.testing.plan_inputs import header_only_index

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.planning.fills import OpenResults

LIMITS = ReadLimits(block_bytes=8 << 20, min_run_bytes=256 << 10, max_gap_bytes=64 << 10)
NUM_RANKS = 8
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight.*)")


def slices_of(index: CheckpointIndex, rank: int) -> RankSlices:
    """What a rank of 8 would say: experts stacked as w13 and w2, everything else cut by rows where that divides."""
    specs: dict[str, ResultSpec] = {}
    numbers: dict[str, int] = {}
    patterns: dict[tuple[Move, ...], int] = {}
    rows: list[tuple[int, int, int, int]] = []
    for tensor, name in enumerate(index.names):
        shape, dtype = index.shape_of(tensor), index.dtype_of(tensor).name
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            dim, result, result_shape, offset = 0, name, None, 0
        else:
            experts, number, part, kind = expert.groups()
            dim, result = int(part == "down"), f"{experts}.{'w2' if part == 'down' else 'w13'}_{kind}"
            share = -(-shape[dim] // NUM_RANKS)
            one = (shape[0], share) if dim else (2 * share, shape[1])
            result_shape = (256, *one)
            offset = int(number) * one[0] * one[1] + (share * one[1] if part == "up" else 0)
        size = shape[dim] if shape else 0
        share = -(-size // NUM_RANKS) if size >= NUM_RANKS else size
        first = min(rank * share, size) if share < size else 0
        held = tuple(min(share, size - first) if axis == dim else length for axis, length in enumerate(shape))
        result_shape = result_shape or held
        if result not in specs:
            numbers[result] = len(specs)
            specs[result] = ResultSpec(
                name=result, dtype=dtype, shape=result_shape, strides=row_major(result_shape), zeroes_holes=False
            )
        steps = row_major(shape)
        source = Side(first * steps[dim] if shape else 0, steps)
        move = Move(held, source, Side(0, row_major(result_shape)[-len(held) :] if held else ()))
        rows.append((tensor, numbers[result], patterns.setdefault((move,), len(patterns)), offset))
    table = np.array(rows, dtype=np.int64)
    ids = [np.ascontiguousarray(table[:, at], dtype=np.int32) for at in range(3)]
    return RankSlices(tuple(specs.values()), tuple(patterns), *ids, np.ascontiguousarray(table[:, 3]))


def main() -> None:
    """Prints the figures."""
    index = header_only_index(deepseek_v3_layout().tensors, num_files=163)
    said = [slices_of(index, rank) for rank in range(NUM_RANKS)]
    seconds: dict[str, float] = {}
    told: list[bytes] = []
    holes: list[list[OpenResults]] = []
    plans: list[RankPlan] = []

    def timed(what: str, started: float) -> None:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started

    for slices in said:
        started = time.perf_counter()
        holes.append(check_fills(index, slices))
        timed("check", started)
        started = time.perf_counter()
        told.append(RankSources.of(slices).to_bytes())
        timed("tell", started)
    started = time.perf_counter()
    shared = plan_node(index, [RankSources.from_bytes(words) for words in told], LIMITS).to_bytes()
    timed("plan", started)
    for rank, slices in enumerate(said):
        started = time.perf_counter()
        node_plan = NodePlan.from_bytes(shared)
        found = holes[rank]
        plans.append(RankPlan.of(index, node_plan, slices, ranks=tuple(range(NUM_RANKS)), local_rank=rank, holes=found))
        timed("cut", started)
    crossing = NUM_RANKS * sum(map(len, told)) + NUM_RANKS * len(shared)
    print(f"{len(index):,} tensors, {len(said[0].results):,} results of a rank, {len(said[0].patterns)} patterns")
    print(
        ", ".join(f"{what} {value:.2f} s" for what, value in seconds.items()),
        f"; together {sum(seconds.values()):.2f} s",
    )
    print(f"{max(map(len, told)):,} bytes told by a rank, {len(shared):,} of plan; {crossing:,} bytes cross in all")
    print(f"read over needed: {plans[0].node_plan.read_bytes / plans[0].node_plan.needed_bytes:.3f}")


if __name__ == "__main__":
    main()
