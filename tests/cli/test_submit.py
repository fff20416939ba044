"""What is a job told to do, and what does its log say? tests/serve has jobs on a real cluster."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_streamer.cli.job_log import JobLog
from ray_streamer.cli.submit import load_command
from ray_streamer.cluster.jobs import RayJob, find_dashboard, submit_job
from ray_streamer.errors import ClusterError, SettingsError

REPORT = json.dumps({"seconds": {"load": 1.5}, "ranks": [{"rank": 0}]}, indent=2)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["s3://bucket/model", "--tp", "8", "--memory-limit", "1GiB"], id="uri-first"),
        pytest.param(["--tp=2", "--rule", "*.a b=split:0", "/models/new", "--fuse"], id="uri-between"),
        pytest.param(["--tp", "2", "--", "/models/new"], id="after-dashes"),
    ],
)
def test_a_job_gets_the_arguments_as_they_were_typed(arguments):
    assert load_command(arguments) == ["ray-streamer", "load", *arguments, "--json"]


def test_json_is_not_said_twice():
    assert load_command(["/m", "--json", "--tp", "1"]).count("--json") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["model", "--tp", "2"], f"give {Path('model').absolute()}", id="relative"),
        pytest.param(["s3:/bucket/model", "--tp", "2"], "one slash", id="collapsed"),
        pytest.param(["/m", "--tp", "2", "--report", "r.json"], "--report: the job would write it", id="report"),
        pytest.param(["/m", "--tp", "2", "--html", "r.html"], "--html: the job would write it", id="html"),
        pytest.param(
            ["/m", "--tp", "2", "--report=/no/r.json"], "--report: the job would write it", id="absent-folder"
        ),
        pytest.param(["/m", "--tp", "2", "--trace", "t.json"], "--trace: the job would write it", id="trace"),
    ],
)
def test_what_a_job_elsewhere_cannot_do_is_refused(arguments, said, tmp_path, monkeypatch):
    said = said.replace(str(Path("model").absolute()), str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=said):
        load_command(arguments)


@pytest.mark.parametrize("lines", ["/m", "https://host/m?sig=planted", "https://host/a?sig=planted\nhttps://host/b"])
def test_a_file_of_addresses_stays_here(lines, tmp_path):
    """As do addresses with a signature: the dashboard shows what a job was told."""
    (tmp_path / "files").write_text(lines)
    for uri in (f"@{tmp_path / 'files'}", *(line for line in lines.splitlines() if "?" in line)):
        with pytest.raises(SettingsError, match="RAY_STREAMER_HTTP_QUERY") as caught:
            load_command([uri, "--tp", "2"])
        assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["/m"], "--tp", id="no-tp"),
        pytest.param(["--tp", "2"], "URI", id="no-uri"),
        pytest.param(["/m", "--tp", "2", "--no-such-option"], "--no-such-option", id="unknown"),
        pytest.param(["/m", "--tp", "2", "--block-bytes", "5000"], "--block-bytes", id="bad-value"),
        pytest.param(["/m", "--tp", "2", "--env", "NOBODY_HAS_SET_THIS"], "NOBODY_HAS_SET_THIS", id="no-value"),
    ],
)
def test_wrong_usage_is_told_before_a_cluster_is_looked_for(invoke, arguments, named):
    result = invoke("submit", *arguments, "--address", "http://127.0.0.1:1")
    assert result.exit_code == 2
    assert named in result.stderr


def test_help_shows_the_options_of_load(invoke):
    told = invoke("submit", "--help").stdout
    assert all(option in told for option in ("--wait", "--env", "--tp", "--memory-limit", "--num-cpus-per-rank"))
    assert "--trace" not in told
    assert told.count("--address") == 2  # the option, and the example


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_report_is_found_in_a_log_that_comes_in_parts(size):
    text = f"loading\n(pid=7) {{not it}}\n{REPORT}\nbye"
    log = JobLog()
    shown = [log.take(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(shown) + log.finish() == "loading\n(pid=7) {not it}\nbye"
    assert log.report == json.loads(REPORT)


@pytest.mark.parametrize("text", ["{\nno json\n}\n", "{\n", '{\n "a": 1\n', "{\n{\n}\n"])
def test_nothing_of_a_log_is_lost_that_is_no_report(text):
    log = JobLog()
    shown = log.take(text) + log.finish()
    assert (shown, log.report) == ((text, None) if text.count("{") == 1 else ("{\n", {}))


def test_the_last_object_of_a_log_is_the_report():
    log = JobLog()
    assert log.take(f'{{\n  "first": 1\n}}\n{REPORT}\n') == ""
    assert log.report == json.loads(REPORT)


@pytest.mark.parametrize("variable", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", None])
def test_an_address_at_which_nobody_answers_is_named(variable, monkeypatch, dead_port):
    address = f"http://127.0.0.1:{dead_port}"
    if variable:
        monkeypatch.setenv(variable, address)
    with pytest.raises(ClusterError, match=f"no Ray dashboard answers at {address}.*ray start --head"):
        find_dashboard(None if variable else address, 1.0)


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is not None, reason="what jobs need is installed here")
def test_an_environment_without_jobs_is_told_what_to_install():
    with pytest.raises(SettingsError, match=r'pip install "ray\[default\]"'):
        submit_job(["true"], address="http://127.0.0.1:1", variables={}, connect_timeout_seconds=1.0)


class HandshakeError(Exception):
    """As aiohttp's, which is neither a RuntimeError nor an OSError."""


class ProxiedClient:
    """A client of Ray's dashboard behind a proxy that answers what opens a WebSocket with an error of its own."""

    def get_address(self):
        return "http://head:8265"

    async def tail_job_logs(self, _job_id):
        yield "first line\n"
        raise HandshakeError("400, message='Invalid response status'")

    def get_job_info(self, _job_id):
        status = SimpleNamespace(is_terminal=lambda: True)
        return SimpleNamespace(status=status, driver_exit_code=3, message="")

    def get_job_logs(self, _job_id):
        return "first line\nlast line\n"


def test_a_log_that_cannot_be_followed_is_told_at_the_jobs_end():
    told = []
    end = RayJob(ProxiedClient(), "raysubmit_1").follow(told.append)
    assert (end.exit_code, "".join(told)) == (3, "first line\nlast line\n")
