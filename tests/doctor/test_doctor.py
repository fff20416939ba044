"""The doctor finds what stands in the way of a load, and predicts one by arithmetic that a reader can repeat."""

from __future__ import annotations

import base64
import http.server
import json
import math
import re
import threading
from contextlib import ExitStack, closing
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from click.testing import CliRunner

import ray_streamer
from ray_streamer.cli import main
from ray_streamer.doctor.examine import examine, examine_node
from ray_streamer.doctor.machine_checks import (
    check_address_space,
    check_cpus,
    check_gpus,
    check_memory,
    check_open_files,
)
from ray_streamer.doctor.memory_speed import MemorySpeed, measure_exchange
from ray_streamer.doctor.prediction import Fleet, Node, predict
from ray_streamer.doctor.storage_checks import check_clock
from ray_streamer.doctor.storage_speed import Measured
from ray_streamer.planning.topology import Topology
from ray_streamer.rank.request import LoadRequest
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split
from ray_streamer.storage.server_clock import clock_skew_seconds
from ray_streamer.testing.checkpoints import TensorSpec, llama_layout, write_checkpoint
from ray_streamer.testing.faults import Fault, FaultProxy
from ray_streamer.units import human_bytes

MIB = 1 << 20
GPU_FILES = ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm")
NO_DEVICES = Path("/nowhere")
IDEAL = MemorySpeed(
    copy_bytes_per_second=math.inf, touch_bytes_per_second=math.inf, exchange_seconds=0.0, gpu_bytes_per_second=None
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    layout = llama_layout(256, 2, 8, 4, 1024, 4001)
    return write_checkpoint(tmp_path_factory.mktemp("llama"), layout.tensors, num_files=2, config=layout.config)


@pytest.fixture
def invoke():
    return lambda *args: CliRunner().invoke(main, ["doctor", *map(str, args)])


def request_of(uri, *, tp=1, dim=0, **settings):
    mesh = Mesh(tp=tp)
    slices = RuleSlices(mesh=mesh, rules=ShardRules({"*": Split(dim)}))
    return LoadRequest(uri=str(uri), mesh=mesh, slices=slices, settings=Settings.resolve(**settings), device="cpu")


def test_a_healthy_node_and_checkpoint(invoke, checkpoint, tmp_path):
    file = tmp_path / "settings.env"
    result = invoke(checkpoint, "--tp", 2, "--block-bytes", "256KiB", "--write-settings", file, "--json", "--quick")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["is_healthy"]
    subjects = {finding["subject"] for finding in found["findings"]}
    assert subjects >= {"checkpoint", "file system", "open files", "memory", "CPUs", "GPUs", "Ray"}
    measured = found["storage"]
    assert [each["num_streams"] for each in measured if each["block_bytes"] == 256 << 10][:3] == [1, 2, 4]
    assert all(each["bytes_per_second"] > 0 for each in measured)
    assert found["memory"]["copy_bytes_per_second"] > 0
    assert found["prediction"]["read_bytes"] == ray_streamer.plan(str(checkpoint), tp=2).summary().read_bytes
    assert found["prediction"]["seconds"] > 0
    assert found["rehearsal"] is None
    for line in file.read_text().splitlines():
        assert line.startswith(("#", "RAY_STREAMER_"))


def test_tables_say_what_why_and_what_to_do(invoke, checkpoint, monkeypatch):
    monkeypatch.setattr("ray_streamer.doctor.machine_checks.resource.getrlimit", lambda _: (40, 40))
    result = invoke(checkpoint, "--quick")
    assert result.exit_code == 1
    first, *_ = result.stdout.splitlines()
    assert first.startswith("error   open files: 40 descriptors for each process; a rank may need 97")
    assert "Each read in flight has a connection" in result.stdout
    assert "Raise the limit (`ulimit -n 4096`)." in result.stdout
    assert "Expected: " in result.stdout


def test_many_nodes_that_share_a_storage(invoke, checkpoint):
    needed = ray_streamer.plan(str(checkpoint)).summary().read_bytes
    options = (checkpoint, "--nodes", 1000, "--storage-bandwidth", "1GB/s", "--quick")
    result = invoke(*options, "--json")
    assert result.exit_code == 0, result.output
    fleet = json.loads(result.stdout)["prediction"]["fleet"]
    assert (fleet["num_nodes"], fleet["storage_rate"], fleet["read_bytes"]) == (1000, 1e9, 1000 * needed)
    assert (
        "On 1000 nodes like this one at the same time, from a storage that serves 1.00 GB/s to all"
        in invoke(*options).stdout
    )


@pytest.mark.parametrize(("num_nodes", "storage_rate"), [(1000, 1e6), (3, 1e6), (3, 1e15), (1, 1e15)])
def test_a_fleet_waits_for_its_storage_when_that_is_what_is_short(tmp_path, num_nodes, storage_rate):
    write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (512, 1024))])
    request = request_of(tmp_path, block_bytes=256 << 10)
    plan = request.plan(Topology.even(1), memory_limits=(1 << 30,))
    alone = Measured(
        num_streams=1,
        num_reads=2,
        block_bytes=256 << 10,
        bytes_per_second=2e6,
        first_byte_seconds=0.01,
        receive_seconds=0.1,
    )
    predicted = predict(plan, Node((alone,), IDEAL, 1 << 30, 4, concurrency=16), fleet=Fleet(num_nodes, storage_rate))
    by_storage = num_nodes * predicted.read_bytes / storage_rate
    assert predicted.fleet.seconds == pytest.approx(max(by_storage, predicted.seconds), rel=0.05)


def test_other_nodes_read_what_this_one_has_in_its_page_cache(tmp_path):
    write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (512, 1024))])
    plan = request_of(tmp_path, block_bytes=256 << 10).plan(Topology.even(1), memory_limits=(1 << 30,))
    node = Node((), IDEAL, 1 << 30, 4, concurrency=16, is_cached=True)
    predicted = predict(plan, node, fleet=Fleet(64, 1e6))
    by_storage = 64 * predicted.read_bytes / 1e6
    assert predicted.seconds < 1
    assert predicted.fleet.seconds == pytest.approx(by_storage, rel=0.05)
    assert predicted.as_rehearsed(0.5, "copies").fleet.seconds == predicted.fleet.seconds


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        (["CHECKPOINT", "--nodes", "2"], "needs --storage-bandwidth"),
        (["--nodes", "2", "--storage-bandwidth", "1GB"], "needs the URI of a checkpoint"),
        (["CHECKPOINT", "--nodes", "2", "--storage-bandwidth", "fast"], "'fast' is no number of bytes per second"),
        (["CHECKPOINT", "--nodes", "2", "--storage-bandwidth", "0GB"], "'0GB' is no number of bytes per second"),
    ],
)
def test_many_nodes_need_a_storage_and_a_checkpoint(invoke, checkpoint, options, needed):
    result = invoke(*(checkpoint if option == "CHECKPOINT" else option for option in options))
    assert result.exit_code == 2
    assert needed in " ".join(result.output.replace("│", " ").split())


def test_without_a_checkpoint_the_machine_is_examined(invoke):
    result = invoke("--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["uri"] is None


def test_a_mount_that_is_not_there(invoke, tmp_path):
    result = invoke(tmp_path / "missing", "--json")
    assert result.exit_code == 1
    (error,) = [finding for finding in json.loads(result.stdout)["findings"] if finding["level"] == "error"]
    assert error["subject"] == "checkpoint"
    assert "mount" in error["advice"]


def test_a_tp_that_does_not_divide(invoke, checkpoint):
    result = invoke(checkpoint, "--tp", 3, "--json")
    assert result.exit_code == 1
    (error,) = [finding for finding in json.loads(result.stdout)["findings"] if finding["level"] == "error"]
    assert error["subject"] == "plan"
    assert "tp that works" in error["found"]


def test_credentials_that_are_wrong(checkpoint, s3_server, s3_credentials, monkeypatch):
    if s3_server.kind != "rgw":
        pytest.skip("moto checks no signatures")
    uri = s3_server.upload_folder(checkpoint, "doctor", "model")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "somebodyelses")
    findings = examine(request_of(uri), devices=NO_DEVICES, is_quick=True).findings
    (error,) = [finding for finding in findings if finding.level == "error"]
    assert error.subject == "checkpoint"
    assert "credentials" in error.why
    assert any(finding.subject == "clock" and finding.level == "good" for finding in findings)


def test_an_endpoint_that_is_slow_to_answer(s3_server, s3_credentials, tmp_path):
    write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (512, 1024))])
    (file,) = tmp_path.glob("*.safetensors")
    uri = f"{s3_server.upload_folder(tmp_path, 'doctor-slow', 'model')}/{file.name}"
    with FaultProxy(s3_credentials.endpoint_url) as proxy:
        request = request_of(uri, s3_endpoint_url=proxy.url, block_bytes=256 << 10, concurrency=2)
        proxy.fail_next(*[Fault(delay_seconds=0.25)] * 1000)
        examination = examine(request, devices=NO_DEVICES, is_quick=True)
    assert examination.prediction.bound == "first byte"
    assert min(each.first_byte_seconds for each in examination.storage) >= 0.24
    assert examination.prediction.best_settings["concurrency"] > 2
    # Eight blocks at once and not two at a time: the waits are not counted as a slow network besides.
    assert examination.prediction.best_seconds < examination.prediction.seconds / 2


def test_files_without_a_whole_block_are_measured_with_smaller_ones(s3_server, s3_credentials, tmp_path):
    write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (512, 1024))])
    uri = s3_server.upload_folder(tmp_path, "doctor-small", "model")
    with FaultProxy(s3_credentials.endpoint_url) as proxy:
        request = request_of(uri, s3_endpoint_url=proxy.url)
        proxy.fail_next(*[Fault(delay_seconds=0.25)] * 1000)
        examination = examine(request, devices=NO_DEVICES, is_quick=True)
    assert [each.block_bytes for each in examination.storage] == [2 << 20]
    assert examination.prediction.bound == "first byte"


@pytest.fixture
def examined(s3_server, s3_credentials, tmp_path):
    """What the doctor says of a checkpoint of eight blocks on an S3 server, whose requests meet these faults."""

    def made(*faults):
        write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (512, 1024))])
        (file,) = tmp_path.glob("*.safetensors")
        uri = f"{s3_server.upload_folder(tmp_path, 'doctor-faults', 'model')}/{file.name}"
        with FaultProxy(s3_credentials.endpoint_url, faults) as proxy:
            request = request_of(uri, s3_endpoint_url=proxy.url, block_bytes=256 << 10, concurrency=2)
            return examine(request, devices=NO_DEVICES, is_quick=True)

    return made


@pytest.mark.parametrize(
    ("fault", "subject", "found"),
    [
        (Fault(status=503), "throttling", "the store answered 2 requests with the wish to slow down"),
        (Fault(status=429), "throttling", "the store answered 2 requests with the wish to slow down"),
        (Fault(status=500, code="InternalError"), "requests", "2 requests failed and had to be sent again"),
    ],
    ids=["503", "429", "500"],
)
def test_a_store_that_refuses_requests_now_and_then(examined, fault, subject, found):
    # The headers come first, unharmed.
    findings = examined(Fault(), Fault(), fault, Fault(), fault).findings
    (warning,) = [finding for finding in findings if finding.subject in ("throttling", "requests")]
    assert (warning.level, warning.subject) == ("warning", subject)
    assert warning.found.startswith(found)
    assert warning.advice


def test_a_store_that_refuses_nothing_is_not_told_of(examined):
    assert {finding.subject for finding in examined().findings}.isdisjoint({"throttling", "requests"})


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=301, code="PermanentRedirect", headers=(("x-amz-bucket-region", "eu-west-9"),)),
        Fault(status=400, code="AuthorizationHeaderMalformed</Code><Region>eu-west-9</Region><Code>"),
    ],
    ids=["redirect", "signature"],
)
def test_a_region_that_is_wrong(examined, fault):
    examination = examined(*[fault] * 8)
    (error,) = [finding for finding in examination.findings if finding.level == "error"]
    assert error.subject == "checkpoint"
    assert "the bucket is in region eu-west-9; set s3_region" in error.found
    assert not examination.is_healthy


class Clock(http.server.BaseHTTPRequestHandler):
    """A server whose clock is wrong by `ahead` seconds."""

    ahead = 0.0

    def date_time_string(self, timestamp=None):
        import time

        return formatdate((time.time() if timestamp is None else timestamp) + self.ahead, usegmt=True)

    def do_HEAD(self):
        self.send_response(403)
        self.end_headers()

    def log_message(self, format, *args):
        pass


@pytest.fixture
def clock_server():
    """Gives the address of a server whose clock is ahead by so much."""
    with ExitStack() as owned:

        def started(ahead):
            handler = type("Ahead", (Clock,), {"ahead": ahead})
            server = owned.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            owned.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield started


@pytest.mark.parametrize("ahead", [0, 3600, -7200])
def test_how_far_a_clock_is_from_the_servers(clock_server, ahead):
    skew = clock_skew_seconds(clock_server(ahead), ca_file="", timeout_seconds=30)
    assert skew == pytest.approx(-ahead, abs=120)


@pytest.mark.parametrize(
    "uri",
    [
        "SERVER/model",
        "s3://bucket/model",
        "gs://bucket/model",
        "az://container/model",
        "hf://org/model",
    ],
)
@pytest.mark.parametrize(
    ("ahead", "words"), [(3600, "behind the server's"), (-7200, "ahead of the server's")], ids=["slow", "fast"]
)
def test_a_clock_that_is_wrong(clock_server, monkeypatch, uri, ahead, words):
    """With every store that is read over HTTP."""
    address = clock_server(ahead)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    text = f"AccountName=acme;AccountKey={base64.b64encode(bytes(64)).decode()};BlobEndpoint={address}/acme"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    request = request_of(
        uri.replace("SERVER", address), s3_endpoint_url=address, s3_region="us-east-1", s3_unsigned=True
    )
    with closing(request.open_storage()) as storage:
        (finding,) = check_clock(storage, timeout_seconds=30)
    assert (finding.level, finding.subject) == ("error", "clock")
    assert finding.found.endswith(words)
    assert "chrony" in finding.advice


def test_files_and_servers_that_are_gone_have_no_clock(checkpoint):
    with closing(request_of(checkpoint).open_storage()) as storage:
        assert check_clock(storage, timeout_seconds=30) == []
    with closing(request_of("http://127.0.0.1:1/model").open_storage()) as storage:
        (finding,) = check_clock(storage, timeout_seconds=30)
    assert (finding.level, finding.subject) == ("error", "server")


@pytest.mark.parametrize(("limit", "level"), [(-1, "good"), (4096, "good"), (90, "warning"), (30, "error")], ids=str)
def test_limits_of_descriptors(limit, level):
    finding = check_open_files(Settings(concurrency=16), num_ranks=4, limit=limit)
    assert finding.level == level
    assert bool(finding.advice) == (level != "good")


@pytest.mark.parametrize(
    ("num_ranks", "limit", "advice"),
    [
        (4, 90, r"\(`ulimit -n (?P<limit>4096)`\), or use concurrency=(?P<concurrency>11)\."),
        (
            100_000,
            20_000,
            r"\(`ulimit -n (?P<limit>100096)`\), or use at most (?P<num_ranks>19904) ranks on this node\.",
        ),
        (4, 30, r"\(`ulimit -n (?P<limit>4096)`\)\."),
    ],
    ids=["fewer-reads", "fewer-ranks", "neither-helps"],
)
def test_each_advice_about_descriptors_is_enough(num_ranks, limit, advice):
    said = {"num_ranks": num_ranks, "limit": limit, "concurrency": 16}
    finding = check_open_files(Settings(concurrency=16), num_ranks=num_ranks, limit=limit)
    found = re.fullmatch(f"Raise the limit {advice}", finding.advice)
    assert found is not None, finding.advice
    for name, value in found.groupdict().items():
        mended = said | {name: int(value)}
        settings = Settings(concurrency=mended.pop("concurrency"))
        assert check_open_files(settings, **mended).level == "good"


@pytest.mark.parametrize(
    ("available", "held", "level"),
    [(100 << 30, 10 << 30, "good"), (11 << 30, 10 << 30, "warning"), (9 << 30, 10 << 30, "error")],
    ids=["enough", "tight", "too-little"],
)
def test_memory_for_tensors_and_staging(available, held, level):
    finding = check_memory(Settings(memory_limit="256MiB"), num_ranks=4, held_bytes=held, available=available)
    assert finding.level == level
    assert "1 GiB for staging by 4 ranks" in finding.found


@pytest.mark.parametrize(
    ("limit", "useful_bytes", "staged", "level"),
    [
        ("100GiB", 3 << 30, "3 GiB", "good"),
        ("1GiB", 3 << 30, "2 GiB", "good"),
        (-1, 3 << 30, "3 GiB", "good"),
        ("100GiB", 30 << 30, "30 GiB", "warning"),
        (-1, 30 << 30, "30 GiB", "warning"),
        ("100GiB", None, "200 GiB", "warning"),
    ],
)
def test_staging_counts_no_more_than_reads_can_use(limit, useful_bytes, staged, level):
    settings = Settings(memory_limit=limit)
    finding = check_memory(settings, num_ranks=2, held_bytes=0, available=20 << 30, useful_bytes=useful_bytes)
    assert finding.level == level
    assert f"{staged} for staging by 2 ranks" in finding.found


def test_a_memory_limit_that_is_larger_than_the_checkpoint(tmp_path):
    write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (4096, 1024))])
    request = request_of(tmp_path, tp=2, block_bytes=MIB, memory_limit="100TiB")
    plan = request.plan(Topology.even(2), memory_limits=(100 << 40,) * 2)
    findings = examine(request, devices=NO_DEVICES, is_quick=True).findings
    (memory,) = [finding for finding in findings if finding.subject == "memory"]
    assert memory.level == "good"
    assert f"{human_bytes(len(plan.node_plans[0].blocks) * MIB)} for staging by 2 ranks" in memory.found


@pytest.mark.parametrize(
    ("settings", "smallest"),
    [
        ({"node_memory_limit": "8KiB"}, "smallest that can work is 16 KiB"),
        ({"node_memory_limit": "512KiB"}, "smallest that works is 256 KiB per rank"),
        ({"memory_limit": "1KB"}, "smallest that works is 256 KiB per rank"),
    ],
)
def test_a_memory_limit_that_no_block_fits_in(settings, smallest):
    finding = check_memory(Settings(**settings), num_ranks=4, held_bytes=0, available=1 << 30)
    assert finding.level == "error"
    assert smallest in finding.found


@pytest.mark.parametrize("option", ["--memory-limit", "--node-memory-limit"])
def test_a_memory_limit_that_is_refused_is_one_finding_among_the_others(invoke, checkpoint, option):
    result = invoke(checkpoint, "--tp", 2, option, "8KB", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    (error,) = [finding for finding in found["findings"] if finding["level"] == "error"]
    assert error["subject"] == "memory"
    assert "the smallest that works is 256 KiB per rank" in error["found"] or option != "--memory-limit"
    assert {finding["subject"] for finding in found["findings"]} >= {"checkpoint", "file system", "CPUs", "Ray"}
    assert found["prediction"] is None


def test_other_limits(tmp_path):
    assert check_address_space(1 << 30).level == "warning"
    assert check_cpus(8, 2).level == "warning"
    assert check_cpus(2, 2).level == "good"
    assert check_gpus(tmp_path, device="cpu", visible=None).found.startswith("none")
    for name in GPU_FILES:
        (tmp_path / name).touch()
    assert check_gpus(tmp_path, device="cpu", visible=None).found == "2 GPUs"
    assert check_gpus(tmp_path, device="cpu", visible="").level == "warning"


@pytest.mark.parametrize(
    ("files", "device", "visible", "level"),
    [
        pytest.param((), "cuda", None, "error", id="none"),
        pytest.param(GPU_FILES, "cuda", None, "good", id="there"),
        pytest.param(GPU_FILES, "cuda:1", None, "good", id="the-last"),
        pytest.param(GPU_FILES, "cuda:2", None, "error", id="one-too-many"),
        pytest.param(GPU_FILES, "cuda", "", "error", id="all-hidden"),
        pytest.param(GPU_FILES, "cuda:1", "1", "error", id="one-hidden"),
        pytest.param(GPU_FILES, "cuda:1", "1,0", "good", id="none-hidden"),
        pytest.param(("kfd",), "cuda:3", None, "good", id="of-AMD"),
    ],
)
def test_a_device_that_is_asked_for(tmp_path, files, device, visible, level):
    for name in files:
        (tmp_path / name).touch()
    found = check_gpus(tmp_path, device=device, visible=visible)
    assert found.level == level
    assert (f'device="{device}" is not there' in found.found) == (level == "error")


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_load_into_gpus_of_a_node_without_gpus(checkpoint, tmp_path, has_checkpoint):
    if has_checkpoint:
        request = replace(request_of(checkpoint), device="cuda")
        examination = examine(request, devices=tmp_path, is_quick=True)
    else:
        examination = examine_node(Settings(), num_ranks=1, devices=tmp_path, device="cuda")
    (error,) = [finding for finding in examination.findings if finding.level == "error"]
    assert error.subject == "GPUs"


def test_a_device_of_no_known_kind(invoke):
    result = invoke("--device", "tpu")
    assert result.exit_code == 1
    assert "device 'tpu' is not supported" in result.stderr


def test_words_between_processes_take_some_time():
    assert 0 < measure_exchange() < math.inf


@pytest.mark.parametrize(
    ("first_byte", "seconds", "rate"),
    [(0.2, 0.3, 64 * MIB / 0.1), (0.19, 0.8, 64 * MIB / 0.78), (0.0, 0.8, 64 * MIB / 0.8)],
    ids=["late-answers", "answers-wait-for-each-other", "first-bytes-are-not-told"],
)
def test_a_bandwidth_leaves_out_what_one_answer_alone_waits_for(tmp_path, first_byte, seconds, rate):
    """64 reads at once; the second case has first bytes that are late since the storage serves others before."""
    write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (64 << 10, 1024))])
    request = request_of(tmp_path, block_bytes=MIB, concurrency=64)
    plan = request.plan(Topology.even(1), memory_limits=(1 << 30,))
    waits = (0.02 if first_byte == 0.19 else first_byte, first_byte)
    measured = [
        Measured(
            num_streams=number,
            num_reads=number,
            block_bytes=MIB,
            bytes_per_second=number * MIB / took,
            first_byte_seconds=wait,
            receive_seconds=took - wait if number == 1 else 0.1,
        )
        for number, wait, took in zip((1, 64), waits, (waits[0] + 0.01, seconds), strict=True)
    ]
    predicted = predict(plan, Node(measured, IDEAL, 1 << 30, 4, concurrency=64))
    by_bandwidth = predicted.read_bytes / rate
    assert predicted.seconds == pytest.approx(by_bandwidth + 4 * waits[0], rel=0.3)


@pytest.mark.parametrize(("concurrency", "num_rounds"), [(4, 4), (16, 1)])
def test_a_prediction_is_the_arithmetic_of_its_rounds(tmp_path, concurrency, num_rounds):
    """16 whole blocks for one rank: each takes 0.2 s to its first byte and 0.1 s to come."""
    write_checkpoint(tmp_path, [TensorSpec("up_proj.weight", "F32", (4096, 1024))])
    request = request_of(tmp_path, block_bytes=MIB, concurrency=concurrency)
    plan = request.plan(ray_streamer.plan(str(tmp_path), rules={"*": Split(0)}).topology, memory_limits=(1 << 30,))
    measured = [
        Measured(
            num_streams=number,
            num_reads=2 * number,
            block_bytes=MIB,
            bytes_per_second=number * MIB / 0.3,
            first_byte_seconds=0.2,
            receive_seconds=0.1,
        )
        for number in (1, 16)
    ]
    node = Node(measured, IDEAL, 1 << 30, 4, concurrency=concurrency)
    predicted = predict(plan, node)
    # The header moves blocks on their grid: the first and the last one are parts.
    num_blocks = len(plan.node_plans[0].blocks)
    assert num_rounds <= math.ceil(num_blocks / concurrency) <= num_rounds + 1
    expected = math.ceil(num_blocks / concurrency) * 0.3
    assert predicted.seconds == pytest.approx(expected, rel=0.35)
    assert predicted.bound == "first byte"
    assert predicted.best_seconds <= predicted.seconds
    cached = predict(
        plan,
        node._replace(
            is_cached=True,
            memory=MemorySpeed(
                copy_bytes_per_second=16 * MIB,
                touch_bytes_per_second=math.inf,
                exchange_seconds=0.0,
                gpu_bytes_per_second=None,
            ),
        ),
    )
    assert cached.bound == "copies"
    assert cached.seconds <= 1.1
