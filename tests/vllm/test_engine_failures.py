"""What cannot be loaded ends the engine, each of its processes, with a sentence of this package's."""

from __future__ import annotations

import os
import re
import shutil
import signal

import pytest
from engines import try_engine
from families import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures") / "model"
    save_checkpoint("llama", folder, hidden_size=256, head_dim=64)
    return folder


@pytest.fixture
def end_of(model, tmp_path):
    """The log of an engine over two ranks that must not come up."""

    def run(extra, prepare=lambda: None):
        engine = {"model": str(model), "tensor_parallel_size": 2, "load_format": "ray_streamer"}
        status, answer, log = try_engine(tmp_path / "engine", {**engine, "model_loader_extra_config": extra}, prepare)
        assert (status, answer) == (1, None), log[-6000:]
        return log

    return run


def test_nothing_at_the_uri(end_of, tmp_path):
    log = end_of({"uri": str(tmp_path / "nothing")})
    assert "ObjectMissingError" in log
    assert str(tmp_path / "nothing") in log


def test_an_unknown_key(end_of):
    assert "model_loader_extra_config has 'url', which load format ray_streamer does not know" in end_of({"url": "x"})


def test_no_credentials(end_of, model, s3_credentials, monkeypatch):
    uri = s3_credentials.upload_folder(model, "failures", "llama")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    log = end_of({"uri": uri})
    assert "CredentialsError" in log
    assert uri in log


def test_a_missing_shard(end_of, model, s3_credentials, tmp_path):
    lacking = shutil.copytree(model, tmp_path / "lacking")
    lost = sorted(lacking.glob("*.safetensors"))[1]
    lost.unlink()
    log = end_of({"uri": s3_credentials.upload_folder(lacking, "failures", "lacking")})
    assert "CheckpointError" in log or "ObjectMissingError" in log or "IndexMismatchError" in log
    assert lost.name in log


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_of_another_model(end_of, family, tmp_path):
    sizes = {} if family == "gpt2" else {"hidden_size": 128, "head_dim": 32}
    save_checkpoint(family, tmp_path / "other", **sizes)
    log = end_of({"uri": str(tmp_path / "other")})
    assert f"CheckpointError: {tmp_path / 'other'}: vLLM's LlamaForCausalLM failed at " in log
    assert "Look whether the model's config.json belongs to these weights" in log


def test_a_worker_that_is_killed_while_it_loads(end_of):
    def kill_the_second_rank():
        from vllm.distributed import get_tensor_model_parallel_rank
        from vllm.model_executor.models.llama import LlamaForCausalLM

        load_weights = LlamaForCausalLM.load_weights

        def die_at_the_fifth_tensor(self, weights):
            def mortal():
                for number, named in enumerate(weights):
                    if number == 5 and get_tensor_model_parallel_rank() == 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield named

            return load_weights(self, mortal())

        LlamaForCausalLM.load_weights = die_at_the_fifth_tensor

    log = end_of({}, kill_the_second_rank)
    assert re.search("RankFailedError: rank 1 on node .* failed: its process ended while others waited for it", log)
