"""A draft model loads its own files, though vLLM gives it the options of its target, and though only one stage has it."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
from families import save_checkpoint, save_eagle3, save_with_mtp
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


def propose(load_format: str, extra: dict[str, Any], config: Any, _model: Any) -> dict[str, str]:
    """The draft that vLLM's own proposer loads, by the configuration of the engine."""
    from vllm.config import LoadConfig
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    class Proposer(SpecDecodeBaseProposer):
        def __init__(self) -> None:
            self.vllm_config, self.speculative_config = config, config.speculative_config
            self.draft_model_config = config.speculative_config.draft_model_config

    config.load_config = LoadConfig(load_format=load_format, model_loader_extra_config=extra)
    return hashes_of(Proposer()._get_model())


@pytest.mark.parametrize("is_runai", [False, True], ids=["draft_uri", "replace-runai"])
@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_what_vllms_proposers_load_is_as_with_the_stock_loader(method, is_runai, tmp_path, s3_credentials, monkeypatch):
    """From a store, in the words of this load format and in those of Run:ai's."""
    target, draft = tmp_path / "target", tmp_path / "draft"
    said = {"method": method, "num_speculative_tokens": 1}
    uri, draft_uri = f"s3://drafts/{method}-target", f"s3://drafts/{method}-draft"
    if method == "mtp":
        save_with_mtp(target)
        theirs, extra = said, {"uri": uri}
    else:
        save_checkpoint("llama", target)
        save_eagle3(draft)
        s3_credentials.upload_folder(draft, "drafts", f"{method}-draft")
        theirs, extra = {**said, "model": str(draft)}, {"uri": uri, "draft_uri": draft_uri}
    s3_credentials.upload_folder(target, "drafts", f"{method}-target")
    proposed = partial(propose, "safetensors", {})
    layout = Layout(tp=2, arguments={"speculative_config": theirs})
    expected = [rank.later for [rank] in on_all_ranks(target, layout, [stock], tmp_path, then=proposed)]
    model = target
    if is_runai:
        monkeypatch.setenv("RAY_STREAMER_REPLACE_RUNAI", "1")
        monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
        model, extra = uri, {}
        layout = Layout(
            tp=2, arguments={"speculative_config": said if method == "mtp" else {**said, "model": draft_uri}}
        )
    # Nothing but the store has weights now.
    for path in tmp_path.glob("*/*.safetensors"):
        path.unlink()
    proposed = partial(propose, "runai_streamer" if is_runai else "ray_streamer", extra)
    mine = on_all_ranks(model, layout, [partial(ours, **extra)], tmp_path, then=proposed)
    assert [rank.later for [rank] in mine] == expected
