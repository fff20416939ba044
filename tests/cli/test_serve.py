"""`ray-streamer serve` becomes `vllm serve`; a stand-in for vLLM shows what it was called with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_streamer.cli import main
from ray_streamer.cli.serve import serve_arguments
from ray_streamer.errors import SettingsError
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.testing.file_server import FileServer

FOLDER = Path("/cache/model")


def extra_config_of(arguments: list[str]) -> dict:
    return json.loads(arguments[arguments.index("--model-loader-extra-config") + 1])


def test_arguments_of_vllm_serve():
    arguments = serve_arguments("s3://b/m", FOLDER, ["--tensor-parallel-size", "8"], Settings(concurrency=4))
    assert arguments[:4] == ["serve", "/cache/model", "--load-format", "ray_streamer"]
    assert extra_config_of(arguments)["uri"] == "s3://b/m"
    assert extra_config_of(arguments)["concurrency"] == 4
    assert arguments[-4:] == ["--served-model-name", "s3://b/m", "--tensor-parallel-size", "8"]


@pytest.mark.parametrize("form", ["apart", "joined"])
@pytest.mark.parametrize("flag", ["--model-loader-extra-config", "--model_loader_extra_config", "--model-loader-extra"])
def test_the_callers_extra_config_comes_first(form, flag):
    given = '{"concurrency": 32}'
    arguments = serve_arguments(
        "s3://b/m", FOLDER, [flag, given] if form == "apart" else [f"{flag}={given}"], Settings(concurrency=4)
    )
    assert sum(argument.startswith("--model") for argument in arguments) == 1
    assert extra_config_of(arguments)["concurrency"] == 32


def test_the_callers_served_name_stays():
    arguments = serve_arguments("s3://b/m", FOLDER, ["--served-model-name=mine"], Settings())
    assert [argument for argument in arguments if "served-model-name" in argument] == ["--served-model-name=mine"]


@pytest.mark.parametrize(
    ("files", "given", "said"),
    [
        (["params.json", "tekken.json"], [], ["--config-format", "mistral", "--tokenizer-mode", "mistral"]),
        (["params.json", "tokenizer.model.v3"], ["--config_format=hf"], ["--tokenizer-mode", "mistral"]),
        (["params.json", "config.json", "tekken.json", "tokenizer.json"], [], []),
        (["config.json"], [], []),
    ],
)
def test_vllm_is_told_of_mistrals_own_format(files, given, said, tmp_path):
    """Which it knows by the files of weights, and those are not in the folder."""
    for name in files:
        (tmp_path / name).touch()
    arguments = serve_arguments("s3://b/m", tmp_path, given, Settings())
    assert arguments[6:] == [*said, "--served-model-name", "s3://b/m", *given]


def test_secrets_are_not_on_the_command_line():
    settings = Settings(s3_access_key_id="AKIAPLANTED", s3_secret_access_key="PLANTED", s3_session_token="PLANTED")
    assert "PLANTED" not in " ".join(serve_arguments("s3://b/m", FOLDER, [], settings))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--load-format", "auto"], "--load-format is set by ray-streamer serve"),
        (["--load_format", "auto"], "--load-format is set by ray-streamer serve"),
        (["--load-form=auto"], "--load-format is set by ray-streamer serve"),
        (["--model=/other"], "--model is set by ray-streamer serve"),
        (["/other"], r"'/other' stands where vllm serve takes a model, which is s3://b/m here"),
        (["--model-loader-extra-config.concurrency", "4"], "give one JSON object"),
        (["--model-loader-extra-config", "[1]"], "must be a JSON object"),
        (["--model-loader-extra-config"], "must be a JSON object"),
    ],
)
def test_arguments_that_contradict_are_refused(given, words):
    with pytest.raises(SettingsError, match=words):
        serve_arguments("s3://b/m", FOLDER, given, Settings())


def test_it_becomes_vllm(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    vllm = tmp_path / "vllm"
    vllm.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getpid(), sys.argv[1:]]))\n")
    vllm.chmod(0o755)
    program = "from ray_streamer.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(tmp_path / "model"), "--", "--port", "8001"]
    # The folder of this Python goes first, and has no vllm where the tests run.
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={"PATH": str(tmp_path)}) as process:
        pid, arguments = json.loads(process.communicate()[0])
    assert process.returncode == 0
    assert pid == process.pid
    assert arguments[:2] == ["serve", str(tmp_path / "model")]
    assert arguments[-2:] == ["--port", "8001"]


def test_a_signature_goes_to_vllm_by_the_environment(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: called.append((arguments, dict(os.environ))))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("RAY_STREAMER_CACHE_DIR", str(tmp_path / "cache"))
    # Given back at the end.
    monkeypatch.setenv("RAY_STREAMER_HTTP_SIGNED", "")
    (tmp_path / "vllm").touch(mode=0o755)
    with FileServer({"m/config.json": b"{}"}) as server:
        assert not CliRunner().invoke(main, ["serve", f"{server.url}/m?sig=planted0123456789"]).exception
        ((arguments, environment),) = called
        assert "planted" not in " ".join(arguments)
        monkeypatch.setenv("RAY_STREAMER_HTTP_SIGNED", environment["RAY_STREAMER_HTTP_SIGNED"])
        storage = open_storage(extra_config_of(arguments)["uri"], Settings.resolve())
        assert storage.read_head("config.json", 9)[0] == b"{}"
        assert server.requests[-1].target == "/m/config.json?sig=planted0123456789"
        storage.close()


def test_without_vllm_the_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, ["serve", str(tmp_path)])
    assert result.exit_code == 1
    assert 'pip install "ray_streamer[vllm]"' in result.stderr
