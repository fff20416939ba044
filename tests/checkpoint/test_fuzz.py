"""Config.json and index json made to break it: every one ends in a plan or in one typed, short, printable error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from fuzz_support.mutations import run


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("kind", "num_cases"), [("configs", 250), ("indices", 250)])
def test_mutations_end_in_plans_or_typed_errors(kind: str, num_cases: int, seed: int) -> None:
    outcomes, _ = run(kind, num_cases, seed)
    assert sum(outcomes.values()) == num_cases
    # Some are harmless, and some are refused: otherwise this tries nothing.
    assert outcomes["plan"] > num_cases // 50
    assert outcomes["CheckpointError"] > num_cases // 50
