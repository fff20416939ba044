"""A draft model loads its own files, though vLLM gives it the options of its target, and though only one stage has it."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
from families import save_checkpoint
from loading import loader, ours
from ranks import Layout, hashes_of, on_all_ranks, stock


def load_draft(folder: str, extra: dict[str, Any], config: Any, _model: Any) -> dict[str, str] | None:
    """As vLLM's proposers do it: on the last stage, by the format and the options of the target. With `extra` as for the target."""
    from vllm.config import LoadConfig, ModelConfig
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.model_executor.model_loader import DefaultModelLoader

    if not get_pp_group().is_last_rank:
        return None
    draft = ModelConfig(
        model=folder,
        tokenizer=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=128,
    )
    config.compilation_config.static_forward_context.clear()
    made = loader(**extra) if extra else DefaultModelLoader(LoadConfig(load_format="safetensors"))
    return hashes_of(made.load_model(config, draft, prefix="draft"))


@pytest.mark.parametrize("is_said", [False, True], ids=["own-folder", "draft_uri"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=1, pp=2)], ids=["tp2", "pp2"])
def test_a_draft_model_loads_its_own_files(layout, is_said, tmp_path):
    target, draft, other = (tmp_path / name for name in ("target", "draft", "other"))
    for seed, folder in enumerate((target, draft, other)):
        save_checkpoint("llama", folder, seed=seed)
    extra = {"uri": str(target)} | ({"draft_uri": str(other)} if is_said else {})
    expected = other if is_said else draft
    said = []
    for folder, fill, options in ((draft, partial(ours, uri=str(target)), extra), (expected, stock, {})):
        then = partial(load_draft, str(folder), options)
        said.append([rank.later for [rank] in on_all_ranks(target, layout, [fill], tmp_path, then=then)])
    assert sum(hashes is not None for hashes in said[0]) == layout.tp
    assert said[0] == said[1]


def test_a_draft_in_the_targets_folder_is_read_where_the_target_is(tmp_path):
    target, config = tmp_path / "target", tmp_path / "config"
    save_checkpoint("llama", target)
    config.mkdir()
    shutil.copy(target / "config.json", config)
    then = partial(load_draft, str(config), {"uri": str(target)})
    for [rank] in on_all_ranks(config, Layout(tp=2), [partial(ours, uri=str(target))], tmp_path, then=then):
        # The names of a draft's layers differ by a prefix that is no part of parameters.
        assert rank.later == rank.after
