"""Slices against other people's loaders, bit for bit, on two and on four ranks; docs/families.md shows the same findings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ray_streamer.sharding.families import FAMILIES

if TYPE_CHECKING:
    from types import ModuleType

# All of it happens in one fixture, which takes most of a minute by itself and much longer on a machine that is shared.
pytestmark = [pytest.mark.timeout(900), pytest.mark.oracle]

Findings = list[dict[str, Any]]

_SCRIPT = Path(__file__).parents[2] / "docs" / "write_families.py"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_families", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def findings(page: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return page.run_oracles(tmp_path_factory.mktemp("oracles"))


def test_every_slice_is_what_others_load(findings: Findings) -> None:
    assert [finding for finding in findings if finding["wrong"]] == []


def test_every_family_is_compared_on_every_rank(findings: Findings) -> None:
    found = {(finding["model"], finding["oracle"], finding["tp"], finding["rank"]) for finding in findings}
    ranks = [(tp, rank) for tp in (2, 4) for rank in range(tp)]
    expected = {
        (model_type, oracle, tp, rank)
        for model_type, family in FAMILIES.items()
        for oracle in ("get_slice, generic", "get_slice, vllm", "transformers")
        for tp, rank in ranks
        if (family.transformers is not None or oracle != "transformers") and (tp == 4 or oracle != "get_slice, vllm")
    }
    forward = {
        (model_type, "forward", *at) for model_type in ("llama", "qwen3", "mixtral", "gemma3_text") for at in ranks
    }
    experts = {
        (model_type, "transformers, ep", *at)
        for model_type in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
        for at in ranks
    }
    assert expected | forward | experts <= found
    # Comparing nothing is no comparison; transformers names all of a model's tensors.
    assert all(finding["compared"] and finding["cut"] for finding in findings if finding["oracle"] == "transformers")


def test_the_page_of_families_shows_these_findings(findings: Findings, page: ModuleType) -> None:
    assert page.render(findings) == page.PAGE.read_text(encoding="utf-8"), "run make docs"
