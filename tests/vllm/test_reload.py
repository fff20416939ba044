"""Other weights in a model that is loaded already: as if it had been loaded with them, each byte read once, also after a failure."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from families import save_broken, save_checkpoint, save_in_mistrals_format
from loading import ours, total_bytes
from ranks import Layout, hashes_of, on_all_ranks, stock
from safetensors.torch import load_file, save_file

from ray_streamer.checkpoint.header_reads import HEAD_BYTES

CASES = [
    pytest.param("llama", Layout(tp=2), id="padded-vocabulary"),
    pytest.param("gemma3_text", Layout(tp=2), id="tied"),
    pytest.param("llama", Layout(tp=1, pp=2), id="stages"),
    pytest.param("llama", Layout(tp=1), id="one-rank"),
]


def reload(uris: list[Any], config: Any, model: Any, load_format: str = "ray_streamer", **extra: Any) -> list[Any]:
    """Reloads from each of `uris`; for each of them hashes, and whether parameters stayed where they were, or the error.

    None is a reload without a path; a mapping is such a one after `update_config` with these options, or with options of another kind.
    """
    from vllm.config.utils import update_config
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    from ray_streamer.integrations.vllm import register

    register()
    config.load_config.load_format = load_format
    config.load_config.model_loader_extra_config = (
        {"page_cache": "off", **extra} if load_format == "ray_streamer" else {}
    )
    before, said = addresses_of(model), []
    for uri in uris:
        if isinstance(uri, dict):
            # As it comes from another process.
            options = {"page_cache": "off", "uri": "".join([*uri["uri"]])} if "uri" in uri else None
            said_now = {"model_loader_extra_config": options} if options else {"use_tqdm_on_load": False}
            config.load_config = update_config(config.load_config, said_now)
            uri = None
        try:
            reload_weights(config, model, None, uri, True)
            said.append((hashes_of(model), addresses_of(model) == before))
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def addresses_of(model: Any) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def check(first, second, uris, layout, scratch):
    """Loads `first`, reloads from all of `uris`, of which the last one means `second`; gives what each rank said of the others."""
    (scratch / "theirs").mkdir()
    theirs = on_all_ranks(second, layout, [stock], scratch / "theirs")
    (scratch / "ours").mkdir()
    reloaded = on_all_ranks(first, layout, [ours], scratch / "ours", then=partial(reload, uris))
    for [mine], [other] in zip(reloaded, theirs, strict=True):
        hashes, is_in_place = mine.later[-1]
        assert hashes == other.after
        assert hashes != mine.after
        assert is_in_place
    return [mine.later[:-1] for [mine] in reloaded]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_reloaded_twice_is_as_loaded(family, layout, tmp_path):
    for seed in (0, 1):
        save_checkpoint(family, tmp_path / str(seed), seed=seed)
    uris = [str(tmp_path / seed) for seed in ("1", "0", "1")]
    for [one, zero] in check(tmp_path / "0", tmp_path / "1", uris, layout, tmp_path):
        assert one[0] != zero[0]


def test_a_reload_in_mistrals_own_format_is_as_loaded(tmp_path):
    for name in ("0", "1"):
        save_in_mistrals_format(tmp_path / name, is_sharded=name == "1")
    path = tmp_path / "0" / "consolidated.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
    check(tmp_path / "0", tmp_path / "1", [str(tmp_path / "1")], Layout(tp=2), tmp_path)


def test_experts_are_reloaded_as_by_the_stock_loader(tmp_path):
    """Which is not as loaded: on CPUs vLLM's own reload of experts leaves others than its load."""
    for seed in (0, 1):
        save_checkpoint("deepseek_v2", tmp_path / str(seed), seed=seed)
    layout, uris = Layout(tp=2, ep=True), [str(tmp_path / "1")]
    said = []
    for name, fill in (("safetensors", stock), ("ray_streamer", ours)):
        (tmp_path / name).mkdir()
        then = partial(reload, uris, load_format=name)
        said.append([rank.later for [rank] in on_all_ranks(tmp_path / "0", layout, [fill], tmp_path / name, then=then)])
    assert said[0] == said[1]


def test_from_s3_every_byte_leaves_once_for_all_ranks(tmp_path, s3_credentials):
    for seed in (0, 1):
        save_checkpoint("llama", tmp_path / str(seed), seed=seed, hidden_size=512, intermediate_size=1024)
    uri = s3_credentials.upload_folder(tmp_path / "1", "reload", "llama")
    sent = s3_credentials.bytes_sent()
    check(tmp_path / "0", tmp_path / "1", [uri], Layout(tp=2), tmp_path)
    sent = s3_credentials.bytes_sent() - sent
    needed = total_bytes(tmp_path / "1")
    heads = sum(min(HEAD_BYTES, path.stat().st_size) for path in (tmp_path / "1").glob("*.safetensors"))
    # The page in which a file's header ends, and index and configuration.
    assert needed <= sent - heads < 1.02 * needed + 50_000


def test_a_reload_that_fails_is_an_error_and_the_next_one_is_whole(tmp_path):
    for seed in (0, 1, 2):
        save_checkpoint("llama", tmp_path / str(seed), seed=seed)
    save_broken(tmp_path / "2", tmp_path / "broken")
    uris = [str(tmp_path / name) for name in ("nothing", "broken", "1")]
    for nothing, broken in check(tmp_path / "0", tmp_path / "1", uris, Layout(tp=2), tmp_path):
        assert nothing.startswith(("ObjectMissingError", "RankFailedError"))
        assert str(tmp_path / "nothing") in nothing
        assert isinstance(broken, str)


def test_what_cannot_be_read_leaves_the_model_as_it_was(tmp_path):
    save_checkpoint("llama", tmp_path / "0")
    for [mine] in on_all_ranks(
        tmp_path / "0", Layout(tp=2), [ours], tmp_path, then=partial(unchanged_by, str(tmp_path / "nothing"))
    ):
        assert mine.later == mine.after


def unchanged_by(uri, config, model):
    [error] = reload([uri], config, model)
    assert isinstance(error, str), error
    return hashes_of(model)


def test_weights_path_is_read_also_where_it_is_the_folder_that_the_engine_was_started_with(tmp_path):
    for seed, name in enumerate(("model", "at-uri", "other")):
        save_checkpoint("llama", tmp_path / name, seed=seed)
    model, at_uri, other = (str(tmp_path / name) for name in ("model", "at-uri", "other"))
    held = {}
    for folder in (model, at_uri, other):
        [[rank]] = on_all_ranks(folder, Layout(), [stock], tmp_path)
        held[folder] = rank.after
    named = [other, None, model, None]
    [[mine]] = on_all_ranks(
        model, Layout(), [partial(ours, uri=at_uri)], tmp_path, then=partial(reload, [model, *named], uri=at_uri)
    )
    assert mine.after == held[at_uri]
    assert [hashes for hashes, _ in mine.later] == [held[folder] for folder in (model, other, other, model, model)]


def test_what_is_said_last_is_read_and_what_cannot_be_read_is_forgotten(tmp_path):
    """A uri that update_config says again counts, also where it is the one of the start; a wrong path does not."""
    for seed, name in enumerate(("model", "other")):
        save_checkpoint("llama", tmp_path / name, seed=seed)
    save_checkpoint("llama", tmp_path / "larger", intermediate_size=512)
    model, other, larger, nothing = (str(tmp_path / name) for name in ("model", "other", "larger", "nothing"))
    [[theirs]] = on_all_ranks(other, Layout(), [stock], tmp_path)
    uris = [other, None, {"uri": model}, other, {"use": "nothing else"}, nothing, None, larger, None, {"uri": model}]
    [[mine]] = on_all_ranks(
        model, Layout(), [partial(ours, uri=model)], tmp_path, then=partial(reload, uris, uri=model)
    )
    said = [step if isinstance(step, str) else step[0] for step in mine.later]
    missing, of_another = said.pop(5), said.pop(6)
    assert "ObjectMissingError" in missing
    assert "CheckpointError" in of_another
    assert "has shape" in of_another
    assert "of shape" in of_another
    of_model, of_other = mine.after, theirs.after
    assert said == [of_other, of_other, of_model, of_other, of_other, of_other, of_other, of_model]


def failing_on_one_rank(uri, config, model):
    """What a reload says where the loader of rank 1 fails at the fifth tensor, and what the next one says."""
    import torch.distributed as dist

    load_weights = type(model).load_weights

    def load(self, weights):
        for number, pair in enumerate(weights):
            if number == 5 and dist.get_rank() == 1:
                raise MemoryError("planted")
            load_weights(self, [pair])
        return set()

    type(model).load_weights = load
    try:
        [failed] = reload([uri], config, model)
    finally:
        type(model).load_weights = load_weights
    return [failed, *reload([uri], config, model)]


def test_a_reload_that_fails_on_one_rank_ends_on_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_PROGRESS_TIMEOUT_SECONDS", "3600")
    for seed in (0, 1):
        save_checkpoint("llama", tmp_path / str(seed), seed=seed)
    then = partial(failing_on_one_rank, str(tmp_path / "1"))
    [first], [second] = on_all_ranks(tmp_path / "0", Layout(tp=2), [ours], tmp_path, then=then)
    assert "rank 1" in first.later[0]
    assert "vLLM's loader took no more tensors on that rank" in first.later[0]
    assert second.later[0] == "MemoryError: planted"
    for rank in (first, second):
        assert rank.later[1][0] != rank.after
