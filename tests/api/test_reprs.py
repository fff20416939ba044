"""What a notebook shows of a value is one line, however large the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import ray_streamer
from ray_streamer.report.load_report import LoadReport
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import llama_layout

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    layout = llama_layout(hidden=64, layers=30, heads=8, kv_heads=8, intermediate=64, vocab=64)
    folder: Path = write_checkpoint(
        tmp_path_factory.mktemp("llama"), layout.tensors, num_files=40, config=layout.config
    )
    return ray_streamer.plan(folder, tp=8, num_nodes=2)


def test_a_plan_and_what_it_holds_are_one_line(plan: Any) -> None:
    summary = plan.summary()
    for value in (plan, plan.index, plan.node_plans[0], summary):
        text = repr(value)
        assert text.startswith(f"{type(value).__name__}(")
        assert "\n" not in text
        assert len(text) < 200
    assert "8 ranks on 2 nodes" in repr(plan)
    assert "8 ranks on 2 nodes" in repr(summary)
    assert "40 files" in repr(plan.index)


def test_a_report_is_one_line(plan: Any) -> None:
    statistics: list[Any] = []
    ray_streamer.load_rank(plan.index.uri, rank=0, world_size=1, on_statistics=statistics.append)
    report = LoadReport(
        uri=plan.index.uri,
        mesh={"tp": 1},
        seconds={"load": 1.25, "total": 2.5},
        checkpoint_bytes=3 << 20,
        needed_bytes=3 << 20,
        plan_hash="0",
        nodes=("here",),
        ranks=tuple(statistics),
    )
    assert repr(report) == f"LoadReport({plan.index.uri!r}, 1 rank, 3 MiB in 1.25 s, total 2.50 s)"
