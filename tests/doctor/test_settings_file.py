"""What doctor writes as settings is what shells and docker read, and the load that it predicted; secrets are in no file."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from ray_streamer.cli import main
from ray_streamer.cli.doctor import settings_text
from ray_streamer.doctor.prediction import Prediction
from ray_streamer.settings import ENV_PREFIX, SECRET_SETTINGS, Settings
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

GIVEN = {
    "concurrency": 16,
    "memory_limit": -1,
    "node_memory_limit": "1GiB",
    "block_bytes": "1MiB",
    "direct_io": "on",
    "hedge_percent": 2.5,
    "max_bandwidth": "1GB",
    "metrics": True,
    "cache_dir": "~/models",
    "s3_endpoint_url": "http://[::1]:9000",
    "s3_ca_bundle": "/etc/ssl/ca.pem",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", [TensorSpec("up_proj.weight", "F32", (64, 64))])


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in filter(is_ours, list(os.environ)):
        monkeypatch.delenv(variable)


def predicted(**best_settings: int) -> Prediction:
    return Prediction(seconds=2.0, bound="slots", best_settings=best_settings, best_seconds=1.0, read_bytes=1)


def read_by_shell(file: Path) -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if not is_ours(name)}
    command = ["sh", "-euc", f"set -a; . {file}; env"]
    told = subprocess.run(command, env=bare, capture_output=True, text=True, check=True).stdout
    return {name: value for name, _, value in (line.partition("=") for line in told.splitlines()) if is_ours(name)}


def read_by_docker(file: Path) -> dict[str, str]:
    """As `docker run --env-file`: what follows the first = is the value as it is."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def is_ours(name: str) -> bool:
    return name.startswith(ENV_PREFIX)


@pytest.mark.parametrize("read", [read_by_shell, read_by_docker])
def test_settings_in_force_and_better_ones_come_back(read, tmp_path, monkeypatch):
    given = Settings(**GIVEN)
    file = tmp_path / "load.env"
    file.write_text(settings_text(predicted(concurrency=32), given))
    variables = read(file)
    assert len(variables) == len(GIVEN)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    home = os.path.expanduser("~/models")
    assert os.path.expanduser(Settings().cache_dir) == home
    assert Settings(cache_dir=home) == given.override(concurrency=32, cache_dir=home)


def test_settings_of_flags_and_of_the_environment_are_written(checkpoint, tmp_path, monkeypatch):
    """Also 16 reads in flight: where nobody gives a number, a load from a disk has 4."""
    file = tmp_path / "load.env"
    monkeypatch.setenv("RAY_STREAMER_PAGE_CACHE", "off")
    options = ["--block-bytes", "1MiB", "--concurrency", "16", "--write-settings", str(file)]
    assert CliRunner().invoke(main, ["doctor", str(checkpoint), "--quick", *options]).exit_code == 0
    written = read_by_shell(file)
    assert written["RAY_STREAMER_PAGE_CACHE"] == "off"
    assert written["RAY_STREAMER_BLOCK_BYTES"] == str(1 << 20)
    assert "RAY_STREAMER_CONCURRENCY" in written


def test_secrets_are_named_and_not_written(checkpoint, tmp_path, monkeypatch):
    file = tmp_path / "load.env"
    for name in SECRET_SETTINGS:
        monkeypatch.setenv(f"{ENV_PREFIX}{name.upper()}", '{"query": "PLANTED"}')
    result = CliRunner().invoke(main, ["doctor", str(checkpoint), "--quick", "--json", "--write-settings", str(file)])
    assert result.exit_code == 0, result.output
    assert "PLANTED" not in file.read_text() + result.output
    for name in SECRET_SETTINGS:
        assert f"# {ENV_PREFIX}{name.upper()} is a secret" in file.read_text()
    assert read_by_shell(file) == {}


@pytest.mark.parametrize("value", ["my profile", "a'b", "$HOME", "a\nRAY_STREAMER_METRICS=1", "`true`", "a#b", "ä"])
def test_a_value_that_shells_and_docker_read_differently_is_named(value, tmp_path):
    file = tmp_path / "load.env"
    file.write_text(settings_text(predicted(), Settings(s3_profile=value)))
    assert file.read_text().startswith("# RAY_STREAMER_S3_PROFILE is not written")
    assert read_by_shell(file) == read_by_docker(file) == {}


def test_defaults_that_are_as_good_as_any_are_said_to_be(tmp_path):
    assert settings_text(predicted(), Settings()) == "# the defaults are as good as any that were tried\n"


@pytest.mark.parametrize("uri", [[], ["/nowhere"]], ids=["no-checkpoint", "missing"])
def test_a_file_is_left_as_it_is_where_no_load_was_predicted(uri, tmp_path):
    file = tmp_path / "load.env"
    file.write_text("RAY_STREAMER_CONCURRENCY=32\n")
    result = CliRunner().invoke(main, ["doctor", *uri, "--write-settings", str(file), "--quick"])
    assert file.read_text() == "RAY_STREAMER_CONCURRENCY=32\n"
    assert "load.env is not written: no load was predicted" in result.stderr


@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["tables", "json"])
def test_settings_that_cannot_be_written(checkpoint: Path, flags: tuple[str, ...]) -> None:
    command = ["doctor", str(checkpoint), "--quick", "--write-settings", "/dev/full", *flags]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    said = "/dev/full cannot be written: No space left on device"
    if flags:
        assert json.loads(result.stdout)["error"]["message"] == said
    else:
        assert "Expected:" in result.stdout
        assert said in result.stderr
