"""Files that commands write: refused before the work, written before anything is shown, and in words when they cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ray_streamer.report.load_report import LoadReport

PROGRAM = "from ray_streamer.cli import main; main()"
NEEDS_PLOTLY = "plotly draws the page: pip install 'ray_streamer[report]'"


@pytest.fixture
def saved(tmp_path):
    """The file of a report."""
    report = LoadReport(
        uri="s3://bucket/model",
        mesh={"tp": 1},
        seconds={"load": 1.0},
        checkpoint_bytes=1,
        needed_bytes=1,
        plan_hash="0",
        nodes=(),
        ranks=(),
    )
    file = tmp_path / "saved.json"
    file.write_text(json.dumps(report.as_dict()))
    return file


def told(result):
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("command", [("load", "--report"), ("load", "--trace"), ("doctor", "--write-settings")])
def test_a_named_pipe_is_refused_before_the_work(invoke, checkpoint, tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    name, option = command
    result = invoke(name, checkpoint, option, tmp_path / "pipe")
    assert result.exit_code == 2
    assert f"'{option}': cannot write to {tmp_path}/pipe: it is a named pipe" in told(result)


@pytest.mark.parametrize("other", ["a.out", "./a.out", "link", "hard"])
def test_one_file_for_two_outputs_is_refused_before_the_work(invoke, checkpoint, tmp_path, monkeypatch, other):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a.out")
    if other == "hard":
        (tmp_path / "a.out").touch()
        os.link("a.out", "hard")
    result = invoke("load", checkpoint, "--report", "a.out", "--trace", other)
    assert result.exit_code == 2
    assert "'--trace': " in told(result)
    assert "is the file of --report, too; give each output a file of its own" in told(result)
    assert (tmp_path / "a.out").exists() == (other == "hard")


def test_an_output_that_is_given_again_replaces_itself(invoke, checkpoint, tmp_path):
    result = invoke("load", checkpoint, "--tp", 3, "--report", tmp_path / "a", "--report", tmp_path / "a")
    assert "tp that works" in result.stderr


def test_files_are_written_although_stdout_is_closed(saved, tmp_path):
    pytest.importorskip("plotly", reason=NEEDS_PLOTLY)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PROGRAM, "report", saved, "--html", tmp_path / "page.html"]
    try:
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert (tmp_path / "page.html").read_text().endswith("</html>\n")


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_stdout_that_takes_nothing_is_told_in_a_line(saved, flags):
    command = [sys.executable, "-c", PROGRAM, "report", saved, *flags]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, "OSError: [Errno 28] No space left on device\n")


def test_a_command_that_fails_keeps_a_link_that_leads_nowhere_yet(invoke, tmp_path):
    pytest.importorskip("plotly", reason=NEEDS_PLOTLY)
    (tmp_path / "link.html").symlink_to("page.html")
    assert invoke("report", tmp_path / "none.json", "--html", tmp_path / "link.html").exit_code == 1
    assert (tmp_path / "link.html").is_symlink()
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_file_that_cannot_be_written_in_the_end_is_named_with_its_option(invoke, saved, flags):
    pytest.importorskip("plotly", reason=NEEDS_PLOTLY)
    result = invoke("report", saved, "--html", "/dev/full", *flags)
    message = "--html /dev/full cannot be written: No space left on device"
    assert result.exit_code == 1
    if flags:
        assert json.loads(result.stdout) == {"error": {"type": "SettingsError", "message": message}}
    else:
        assert told(result) == f"SettingsError: {message}"
        assert "s3://bucket/model: 1 B in 1.00 s" in result.stdout, "the tables are shown all the same"


def test_a_report_that_cannot_be_written_costs_no_other_file(invoke, checkpoint, tmp_path, local_ray):
    pytest.importorskip("plotly", reason=NEEDS_PLOTLY)
    files = ("--report", "/dev/full", "--html", tmp_path / "page.html", "--trace", "/dev/null")
    result = invoke("load", checkpoint, "--tp", 1, *files, "--json")
    assert result.exit_code == 1
    message = "the load succeeded, but --report /dev/full cannot be written: No space left on device"
    assert json.loads(result.stdout)["error"]["message"] == message
    assert (tmp_path / "page.html").read_text().endswith("</html>\n")


def test_devices_take_all_outputs_of_a_load(invoke, checkpoint, local_ray):
    files = ("--report", "/dev/null", "--trace", "/dev/null")
    assert invoke("load", checkpoint, "--tp", 1, *files).exit_code == 0


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_process_without_stdout_or_stderr_loads(checkpoint, ray_of_one_node, tmp_path, closed):
    file = tmp_path / "report.json"
    command = [sys.executable, "-c", PROGRAM, "load", checkpoint, "--tp", "1", "--report", file]
    command += ["--address", ray_of_one_node.address()]
    shell = ["sh", "-c", f'exec "$@" {"1" if closed == "stdout" else "2"}>&-', "sh", *command]
    ended = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    assert json.loads(file.read_text())["bytes_delivered"] > 0
    assert ("peak staging / limit" in ended.stdout) == (closed == "stderr")
