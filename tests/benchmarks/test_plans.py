"""The page of plans says what is planned today."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan_layouts

REPOSITORY = Path(__file__).parents[2]


def test_the_rows_of_the_smallest_model_stand_in_the_page():
    page = (REPOSITORY / "docs" / "plans.md").read_text().splitlines()
    rows = plan_layouts.rows(plan_layouts.models()[0])
    assert rows
    assert [row for row in page if row.startswith("| Llama-3-8B ")] == rows
