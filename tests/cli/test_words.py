"""Messages in the words of the place, and outputs that are checked before the work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_streamer.cli.words import in_flags

FLAGS = {
    "tp": "--tp",
    "strategy": "--strategy",
    "memory_limit": "--memory-limit",
    "node_memory_limit": "--node-memory-limit",
    "num_cpus_per_rank": "--num-cpus-per-rank",
    "wait_for_nodes": "--wait-for-nodes",
    "rules": "--rule",
}


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("raise memory_limit.", "raise --memory-limit."),
        ("memory_limit=512MiB is too small", "--memory-limit 512MiB is too small"),
        ("node_memory_limit of 5 bytes", "--node-memory-limit of 5 bytes"),
        ('or strategy="PACK".', "or --strategy PACK."),
        ("another strategy, more nodes", "another strategy, more nodes"),
        ("less per rank (num_cpus_per_rank=, resources=)", "less per rank (--num-cpus-per-rank, resources=)"),
        ("or wait_for_nodes=True if nodes are to come", "or --wait-for-nodes if nodes are to come"),
        ("tp=3 does not divide", "--tp 3 does not divide"),
        ("tp that works: 1, 2", "tp that works: 1, 2"),
        ("no file /models/memory_limit/x", "no file /models/memory_limit/x"),
        ("no file memory_limit.safetensors", "no file memory_limit.safetensors"),
        ("environment variable RAY_STREAMER_MEMORY_LIMIT='x'", "environment variable RAY_STREAMER_MEMORY_LIMIT='x'"),
    ],
)
def test_arguments_become_flags(message, wanted):
    assert in_flags(message, FLAGS) == wanted


def test_a_failure_speaks_of_flags(invoke, checkpoint):
    result = invoke("plan", checkpoint, "--tp", 2, "--memory-limit", 1)
    assert result.exit_code == 1
    assert "--memory-limit of" in result.stderr
    assert "memory_limit of" not in result.stderr
    error = json.loads(invoke("plan", checkpoint, "--tp", 2, "--memory-limit", 1, "--json").stdout)["error"]
    assert "--memory-limit of" in error["message"]


OUTPUTS = [
    pytest.param("missing/report", "does not exist", id="no-such-folder"),
    pytest.param("a-folder", "Is a directory", id="a-folder"),
    pytest.param("a-file/report", "Not a directory", id="below-a-file"),
    pytest.param("x" * 300, "too long", id="name-too-long"),
]


@pytest.mark.parametrize(("name", "reason"), OUTPUTS)
def test_a_report_that_cannot_be_written_is_refused_before_anything_starts(invoke, checkpoint, tmp_path, name, reason):
    (tmp_path / "a-folder").mkdir()
    (tmp_path / "a-file").touch()
    # The uri is not there either: the first thing that is looked at is what was typed.
    result = invoke("load", "/no/such/checkpoint", "--tp", 2, "--report", tmp_path / name)
    assert result.exit_code == 2
    assert "'--report'" in result.stderr
    assert reason in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-file", "a-folder"]


def test_a_report_that_is_there_already_stays_until_it_is_written(invoke, tmp_path):
    report = tmp_path / "report.json"
    report.write_text("mine")
    assert invoke("load", "/no/such/checkpoint", "--tp", 2, "--report", report).exit_code == 1
    assert report.read_text() == "mine"
    assert invoke("load", "/no/such/checkpoint", "--tp", 2, "--report", tmp_path / "other").exit_code == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("command", "option"), [("plan", "--out"), ("demo", "--folder")])
def test_a_folder_that_cannot_be_made_is_refused(invoke, checkpoint, tmp_path, command, option):
    (tmp_path / "a-file").touch()
    arguments = [checkpoint, "--tp", 2] if command == "plan" else []
    result = invoke(command, *arguments, option, tmp_path / "a-file" / "folder")
    assert result.exit_code == 2
    assert f"'{option}'" in result.stderr


STARTS_NO_RAY = """
import sys, ray
def refuse(*args, **kwargs):
    raise AssertionError("Ray was started")
ray.init = refuse
from ray_streamer.cli import main
main(sys.argv[1:])
"""


def load_without_ray(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, "-c", STARTS_NO_RAY, "load", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("place", [("--address", "local"), ()], ids=["local", "none-running"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(("/modles/llama", "--tp", 2), "/modles/llama", id="wrong-path"),
        pytest.param(("file:///modles/llama", "--tp", 2), "/modles/llama", id="wrong-file-uri"),
        pytest.param(("CHECKPOINT", "--tp", 3), "tp that works for every tensor: 1, 2, 4, 8", id="wrong-tp"),
        pytest.param(("CHECKPOINT", "--tp", 2, "--memory-limit", 1), "--memory-limit", id="too-little-memory"),
        pytest.param(("CHECKPOINT", "--tp", 2, "--rule", "nothing.*=skip"), "nothing.*", id="rule-without-a-tensor"),
    ],
)
def test_what_the_driver_can_see_is_told_before_ray_starts(checkpoint, tmp_path, arguments, sentence, place):
    typed = [checkpoint if argument == "CHECKPOINT" else argument for argument in arguments]
    ended = load_without_ray(*typed, *place, RAY_TMPDIR=str(tmp_path))
    assert ended.returncode == 1
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_only_object_stores_can_know_is_told_before_ray_starts(checkpoint, s3_credentials, tmp_path):
    uri = s3_credentials.upload_folder(Path(checkpoint), "before-ray")
    variables = s3_credentials.environment() | {"RAY_TMPDIR": str(tmp_path)}
    wrong_tp = load_without_ray(uri, "--tp", 3, "--address", "local", **variables)
    assert "tp that works for every tensor: 1, 2, 4, 8" in wrong_tp.stderr
    wrong_path = load_without_ray(f"{uri}-not", "--tp", 2, "--address", "local", **variables)
    assert wrong_path.returncode == 1
    assert "before-ray" in wrong_path.stderr
    assert "Ray was started" not in wrong_tp.stderr + wrong_path.stderr


def test_a_driver_that_may_not_read_starts_ray_all_the_same(checkpoint, s3_server, tmp_path):
    uri = s3_server.upload_folder(Path(checkpoint), "not-for-the-driver")
    variables = {"AWS_ENDPOINT_URL": s3_server.endpoint_url, "RAY_TMPDIR": str(tmp_path)}
    ended = load_without_ray(uri, "--tp", 2, "--address", "local", **variables)
    assert "Ray was started" in ended.stderr
