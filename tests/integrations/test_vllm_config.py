"""Does the engine's config.json belong to the weights? Values that differ are named; in the node's own copy they are an error. Needs no vLLM."""

from __future__ import annotations

import json

import pytest

from ray_streamer.errors import ObjectChangedError
from ray_streamer.integrations.vllm.mismatch import compare_configs
from ray_streamer.settings import Settings

STORED = {"model_type": "llama", "hidden_size": 64, "rope_theta": 10000.0}
URI = "s3://bucket/model"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "cache" / "model-1"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps({**STORED, "rope_theta": 500000.0, "eos_token_id": None}))
    return made


def settings_of(cache):
    return Settings.resolve(cache_dir=str(cache))


def test_values_that_differ_are_named(folder, tmp_path):
    said = compare_configs(STORED, URI, str(folder), settings_of(tmp_path / "elsewhere"))
    assert "takes eos_token_id, rope_theta from" in said
    assert str(folder / "config.json") in said
    assert URI in said


def test_in_the_nodes_copy_that_is_an_error(folder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    for cache in ("cache", "link"):
        with pytest.raises(
            ObjectChangedError, match=r"config\.json was replaced after.*eos_token_id, rope_theta\. Start"
        ):
            compare_configs(STORED, URI, str(folder), settings_of(tmp_path / cache))


def test_the_same_values_are_no_news(folder, tmp_path):
    (folder / "config.json").write_text(json.dumps(STORED, indent=1))
    assert compare_configs(STORED, URI, str(folder), settings_of(tmp_path / "cache")) is None


@pytest.mark.parametrize("stored", [None, STORED])
def test_what_cannot_be_compared_is_not(stored, folder, tmp_path):
    (folder / "config.json").unlink()
    for model in (str(folder), "meta-llama/Llama-3.1-8B", str(tmp_path / "nothing")):
        assert compare_configs(stored, URI, model, settings_of(tmp_path / "cache")) is None
