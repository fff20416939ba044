"""What --model-loader-extra-config may say, and how it is refused; needs no vLLM."""

from __future__ import annotations

import pytest

from ray_streamer.errors import SettingsError
from ray_streamer.integrations.vllm.options import LoaderOptions
from ray_streamer.settings import SECRET_SETTINGS


def test_nothing_said_is_the_models_own_folder_and_the_defaults():
    for nothing in (None, {}):
        options = LoaderOptions.of(nothing)
        assert (options.uri, options.draft_uri, options.settings.concurrency) == (None, None, 16)


def test_keys_of_run_ai_mean_the_same():
    options = LoaderOptions.of({"distributed": False, "concurrency": 4, "memory_limit": 5368709120})
    assert (options.settings.concurrency, options.settings.memory_limit) == (4, 5 << 30)


@pytest.mark.parametrize(
    ("extra", "of_each", "of_all"),
    [
        ({"memory_limit": 1 << 30}, 1 << 30, None),
        ({"memory_limit": 1 << 30, "distributed": True}, None, 1 << 30),
        ({"memory_limit": -1, "distributed": True}, -1, None),
        ({"memory_limit": 0, "distributed": True}, 0, None),
        ({"memory_limit": "1GiB", "node_memory_limit": "4GiB", "distributed": True}, 1 << 30, 4 << 30),
        ({"distributed": True}, None, None),
    ],
)
def test_a_distributed_limit_is_the_nodes_as_with_run_ai(extra, of_each, of_all):
    settings = LoaderOptions.of(extra).settings
    assert (settings.memory_limit, settings.node_memory_limit) == (of_each, of_all)


def test_settings_may_be_written_as_on_the_command_line():
    options = LoaderOptions.of(
        {"uri": "s3://bucket/model", "memory_limit": "512MiB", "s3_endpoint_url": "http://host:1"}
    )
    assert options.uri == "s3://bucket/model"
    assert options.settings.memory_limit == 512 << 20


def test_a_draft_model_has_a_place_of_its_own():
    options = LoaderOptions.of({"uri": "s3://bucket/model", "draft_uri": "s3://bucket/draft"})
    assert (options.uri_of(is_draft=False), options.uri_of(is_draft=True)) == (options.uri, options.draft_uri)
    assert LoaderOptions.of({"uri": "s3://bucket/model"}).uri_of(is_draft=True) is None


def test_what_is_not_said_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_STREAMER_CONCURRENCY", "3")
    assert LoaderOptions.of({"block_bytes": "4MiB"}).settings.concurrency == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"url": "s3://b"}, "'url', which load format ray_streamer does not know; it takes .*block_bytes.*uri"),
        ({"distributed": 1}, "distributed must be true or false, got 1"),
        ({"uri": "https://host/m?sig=planted"}, "RAY_STREAMER_HTTP_QUERY"),
        ({"uri": ""}, "uri must be a path or a URI"),
        ({"draft_uri": 3}, "draft_uri must be a path or a URI .* got 3"),
        ({"concurrency": 0}, "concurrency"),
        ({"hf_token": "hf_planted"}, "has hf_token, and vLLM logs its arguments; set RAY_STREAMER_HF_TOKEN"),
        ([1], "is a JSON object .* got list"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(extra, message):
    with pytest.raises(SettingsError, match=message) as told:
        LoaderOptions.of(extra)
    assert "planted" not in str(told.value)


def test_keys_that_are_listed_may_be_given():
    with pytest.raises(SettingsError) as told:
        LoaderOptions.of({"url": "s3://b"})
    listed = str(told.value).partition("it takes ")[2].split(", ")
    assert "s3_region" in listed
    assert SECRET_SETTINGS.isdisjoint(listed)
