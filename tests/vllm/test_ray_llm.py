"""Ray Serve LLM serves from S3 over HTTP, with nothing but config and tokenizer on the node."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import serve_llm_process
import yaml
from engine_process import PROMPTS
from engines import in_a_fork, run_engine
from families import save_checkpoint, save_tokenizer
from measures import assert_read_once

from ray_streamer.errors import SettingsError
from ray_streamer.testing.s3_server import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("grpc_reflection") is None, reason="Ray Serve is not installed here"
)


def test_the_example_and_a_manifest_of_run_ai_answer_from_s3(s3_credentials, tmp_path, monkeypatch):
    save_checkpoint("llama", tmp_path / "model", hidden_size=256, head_dim=64)
    save_tokenizer(tmp_path / "model")
    theirs = run_engine(tmp_path / "stock", {"model": str(tmp_path / "model"), "tensor_parallel_size": 2})
    uri = s3_credentials.upload_folder(tmp_path / "model", "ray-llm", "tiny")
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    serve = functools.partial(serve_llm_process.main, uri, s3_credentials, free_port(), PROMPTS)
    status, said, log = in_a_fork(tmp_path / "ray.log", serve)
    assert (status, bool(said)) == (0, True), log[-8000:]
    assert set(said) == {"example", "runai"}
    for ours in said.values():
        assert ours["answers"] == [token_ids for token_ids, _ in theirs["answers"]]
        assert_read_once(tmp_path / "model", ours["sent"], ours["requests"])
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def config_of(**words):
    from ray.serve.llm import LLMConfig

    return LLMConfig(
        callback_config={"callback_class": "ray_streamer.integrations.ray_llm:StreamerCallback"},
        accelerator_config={"kind": "cpu"},
        **words,
    )


def callback_of(config):
    from ray_streamer.integrations.ray_llm import StreamerCallback

    return StreamerCallback(llm_config=config)


@pytest.mark.parametrize("source", ["s3://bucket/m", {"bucket_uri": "s3://bucket/m"}])
@pytest.mark.parametrize("engine", [{}, {"load_format": "ray_streamer"}])
def test_a_configuration_needs_to_say_where_the_model_is_and_no_more(source, engine):
    config = config_of(model_loading_config={"model_id": "m", "model_source": source}, engine_kwargs=engine)
    callback = callback_of(config)
    assert not callback.ctx.worker_node_download_model
    assert config.engine_kwargs["load_format"] == "ray_streamer"
    assert config.engine_kwargs["model_loader_extra_config"] == {"uri": "s3://bucket/m"}


def test_what_a_configuration_says_stays():
    from ray_streamer.integrations.ray_llm import llm_config

    config = llm_config("s3://bucket/m/", tp=4, extra_config={"memory_limit": "2GiB"}, engine_kwargs={"seed": 1})
    assert config.model_id == "m"
    assert config.engine_kwargs == {
        "seed": 1,
        "tensor_parallel_size": 4,
        "load_format": "ray_streamer",
        "model_loader_extra_config": {"uri": "s3://bucket/m/", "memory_limit": "2GiB"},
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"engine_kwargs": {"load_format": "runai_streamer"}}, "load_format='runai_streamer', but .*StreamerCallback"),
        ({"engine_kwargs": {"model_loader_extra_config": {"url": "x"}}}, "'url', which load format ray_streamer"),
    ],
)
def test_what_does_not_fit_together_is_refused(words, message):
    config = config_of(model_loading_config={"model_id": "m", "model_source": "s3://bucket/m"}, **words)
    with pytest.raises(SettingsError, match=message):
        callback_of(config)


def test_a_model_without_a_place_is_refused():
    with pytest.raises(SettingsError, match="'m' has no model_source"):
        callback_of(config_of(model_loading_config={"model_id": "m"}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"engine_kwargs": {"tensor_parallel_size": 2}}, "engine_kwargs says tensor_parallel_size"),
        ({"model_loading_config": {}}, "config says model_loading_config"),
        ({"extra_config": {"uris": 1}}, "'uris', which"),
    ],
)
def test_what_llm_config_sets_itself_is_refused(words, message):
    from ray_streamer.integrations.ray_llm import llm_config

    with pytest.raises(SettingsError, match=message):
        llm_config("s3://bucket/m", **words)


def test_the_manifest_for_kuberay_is_understood():
    from ray.serve.llm import LLMServingArgs
    from ray.serve.schema import ServeDeploySchema

    manifests = yaml.safe_load_all((EXAMPLES / "serve_llm.yaml").read_text())
    [service] = [manifest for manifest in manifests if manifest["kind"] == "RayService"]
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = serve.applications
    [config] = LLMServingArgs(**application.args).llm_configs
    callback = callback_of(config)
    assert f"{type(callback).__module__}:{type(callback).__name__}" == config.callback_config.callback_class
    assert config.engine_kwargs["model_loader_extra_config"] == {"memory_limit": "2GiB", "uri": "s3://bucket/llama"}
