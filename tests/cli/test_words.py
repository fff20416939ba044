"""Messages in the words of the place, and outputs that are checked before the work."""

import json
import os
import subprocess
import sys

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


@pytest.fixture
def starts(monkeypatch, tmp_path):
    """How often Ray was asked to start; it does not."""
    import ray

    asked = []

    def refuse(**arguments):
        asked.append(arguments)
        raise RuntimeError("not in this test")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return asked


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
def test_what_the_driver_can_see_is_told_before_ray_starts(invoke, checkpoint, starts, arguments, sentence, place):
    typed = [checkpoint if argument == "CHECKPOINT" else argument for argument in arguments]
    result = invoke("load", *typed, *place)
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not starts


def test_what_only_object_stores_can_know_is_told_before_ray_starts(invoke, checkpoint, s3_credentials, starts):
    uri = s3_credentials.upload_folder(checkpoint, "before-ray")
    wrong_tp = invoke("load", uri, "--tp", 3, "--address", "local")
    assert "tp that works for every tensor: 1, 2, 4, 8" in wrong_tp.stderr
    wrong_path = invoke("load", f"{uri}-not", "--tp", 2, "--address", "local")
    assert wrong_path.exit_code == 1
    assert "before-ray" in wrong_path.stderr
    assert not starts


def test_a_driver_that_may_not_read_is_told_before_it_starts_ray(invoke, checkpoint, s3_server, starts, caplog):
    uri = s3_server.upload_folder(checkpoint, "not-for-the-driver")
    result = invoke("load", uri, "--tp", 2, "--address", "local", "--s3-endpoint-url", s3_server.endpoint_url)
    assert result.exit_code == 1
    assert "no AWS credentials" in result.stderr
    assert not starts
    # The store was not asked, so nothing can be said of what it allows.
    assert "not allowed" not in caplog.text


IMPORTS_NEITHER = """
import sys
from ray_streamer.cli import main
try:
    main(sys.argv[1:])
finally:
    print(sorted({"ray", "torch"} & set(sys.modules)))
"""


def test_a_fault_of_the_request_is_told_without_importing_ray_or_torch(checkpoint):
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTS_NEITHER, "load", str(checkpoint), "--tp", "3"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "tp that works" in ended.stderr
    assert ended.stdout == "[]\n"
