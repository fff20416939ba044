"""The doctor asks the nodes of a cluster: what each answer means by invented answers, and how they come by a real cluster of two nodes."""

from __future__ import annotations

import json
import os
import resource
import shutil
from functools import partial
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer.cli import main
from ray_streamer.cluster.clocks import bound_offset
from ray_streamer.cluster.survey import PARCEL_BYTES, ClusterNode, LinkSpeed, NodeReply, ask_nodes
from ray_streamer.doctor.examine import Examination, examine
from ray_streamer.doctor.finding import Finding
from ray_streamer.doctor.memory_speed import MemorySpeed
from ray_streamer.doctor.node_checks import NodeLook, check_link, check_time_of_day
from ray_streamer.doctor.nodes import ClusterFindings, check_cluster_room, node_findings, ranks_on
from ray_streamer.rank.request import LoadRequest
from ray_streamer.report.trace import ClockOffset
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, Replicate, RuleSlices, ShardRules
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.storage.base import Storage

# Read when Ray is imported: without it both nodes of a cluster on one machine get the same address.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

TENSORS = [TensorSpec(f"layers.{layer}.weight", "F32", (64, 64)) for layer in range(4)]
HERE = ClusterNode(node_id="a" * 56, address="10.0.0.1", hostname="head", resources={"CPU": 4.0}, is_here=True)
THERE = ClusterNode(node_id="b" * 56, address="10.0.0.2", hostname="far", resources={"CPU": 2.0})
WITHOUT_ROOM = ClusterNode(node_id="c" * 56, address="10.0.0.3", hostname="idle", resources={"CPU": 0.0})
ONE_CPU = {"CPU": 1}
SEEN = Finding(subject="checkpoint", level="good", found="2 of 2 files looked at")
GONE = Finding(subject="checkpoint", level="error", found="/models/llama: no such folder", why="w", advice="a")
QUICK = LinkSpeed(round_trip_seconds=0.0002, fetch_seconds=0.02)
MEMORY = MemorySpeed(
    copy_bytes_per_second=1e9, touch_bytes_per_second=1e9, exchange_seconds=1e-5, gpu_bytes_per_second=None
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", TENSORS, num_files=2)


def request_of(uri: Path | str, **settings: object) -> LoadRequest:
    slices = RuleSlices(mesh=Mesh(tp=1), rules=ShardRules({"*": Replicate()}))
    return LoadRequest(uri=str(uri), mesh=Mesh(tp=1), slices=slices, settings=Settings(**settings), device="cpu")


def look_at(
    checkpoint: Path, *, num_ranks: int = 1, held_bytes: int = 0, knows_files: bool = True, device: str = "cpu"
) -> NodeLook:
    request = request_of(checkpoint)
    files = request.open_index().files if knows_files else ()
    return NodeLook(
        settings=request.settings,
        request=request,
        files=files,
        num_ranks=num_ranks,
        held_bytes=held_bytes,
        useful_bytes=None,
        device=device,
        devices=checkpoint,
    )


def levels(findings: tuple[Finding, ...]) -> dict[str, str]:
    return {finding.subject: finding.level for finding in findings}


@pytest.mark.parametrize("knows_files", [True, False], ids=["files-told", "files-found"])
def test_a_node_that_sees_all(checkpoint, knows_files):
    found = look_at(checkpoint, knows_files=knows_files)()
    told = {"checkpoint", "open files", "address space", "memory", "CPUs", "GPUs"}
    assert {finding.subject for finding in found} >= told
    assert levels(found)["checkpoint"] == "good"


@pytest.mark.parametrize(("num_gpus", "level"), [(0, "error"), (1, "good")])
def test_a_node_whose_gpus_are_not_there(checkpoint, monkeypatch, num_gpus, level):
    """Ray hides them from a task that reserves none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for number in range(num_gpus):
        (checkpoint / f"nvidia{number}").touch()
    assert levels(look_at(checkpoint, device="cuda")())["GPUs"] == level


def test_a_node_without_room_is_not_looked_at(checkpoint):
    look = look_at(checkpoint, num_ranks=0)
    shutil.rmtree(checkpoint)
    assert look() == ()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        pytest.param(shutil.rmtree, "{folder}", id="no-folder"),
        pytest.param(lambda folder: [path.unlink() for path in folder.iterdir()], "{folder}", id="empty-mount"),
        pytest.param(lambda folder: max(folder.glob("*.safetensors")).unlink(), "{last}", id="one-file-missing"),
        pytest.param(
            lambda folder: os.truncate(max(folder.glob("*.safetensors")), 1000), "{last} has 1000 bytes", id="cut-short"
        ),
    ],
)
def test_a_node_that_sees_another_folder(checkpoint, spoil, told):
    look, last = look_at(checkpoint), max(checkpoint.glob("*.safetensors"))
    spoil(checkpoint)
    (found,) = [finding for finding in look() if finding.subject == "checkpoint"]
    assert found.level == "error"
    assert told.format(folder=checkpoint, last=last) in found.found
    assert found.why
    assert found.advice


def test_a_missing_mount_where_this_node_sees_nothing_either(checkpoint):
    look = look_at(checkpoint, knows_files=False)
    shutil.rmtree(checkpoint)
    assert levels(look())["checkpoint"] == "error"


def test_memory_and_limits_of_a_node(checkpoint, monkeypatch):
    assert levels(look_at(checkpoint, held_bytes=1 << 60)())["memory"] == "error"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    found = levels(look_at(checkpoint)())
    assert (found["open files"], found["address space"]) == ("error", "warning")


@pytest.mark.parametrize(
    ("round_trip", "fetch", "level", "told"),
    [
        pytest.param(0.0002, 0.02, "good", "in 20 ms (800 MiB/s", id="quick"),
        pytest.param(0.0002, 1.0, "warning", "16 MiB/s", id="slow"),
        pytest.param(0.08, 0.02, "warning", "80.00 ms", id="far"),
        pytest.param(None, 0.02, "warning", "no TCP connection", id="port-closed"),
        pytest.param(0.0002, None, "warning", "16 MiB of Ray's object store did not come", id="no-data"),
    ],
)
def test_a_link(round_trip, fetch, level, told):
    assert PARCEL_BYTES == 16 << 20
    found = check_link(LinkSpeed(round_trip_seconds=round_trip, fetch_seconds=fetch))
    assert found.level == level
    assert told in found.found
    assert bool(found.advice) == (level != "good")


@pytest.mark.parametrize(
    ("seconds", "error", "level", "told"),
    [
        (0.4, 0.5, "good", "within 0.9 s"),
        (-299, 1, "good", "within 300.0 s"),
        (302, 1, "warning", "302 s ahead of"),
        (-3600, 2, "warning", "3600 s behind"),
        (320, 30, "good", "within 350.0 s"),
    ],
)
def test_a_clock_counts_as_wrong_when_it_must_be(seconds, error, level, told):
    found = check_time_of_day(ClockOffset(seconds, error))
    assert found.level == level
    assert told in found.found


@given(
    ahead=st.floats(-1e6, 1e6),
    there=st.floats(0, 60),
    looked=st.floats(0, 60),
    back=st.floats(0, 60),
)
def test_one_question_bounds_a_clock(ahead, there, looked, back):
    began = 1000 + there
    offset = bound_offset(
        sent=1000.0, began=began + ahead, ended=began + looked + ahead, received=began + looked + back
    )
    assert abs(offset.seconds - ahead) <= offset.error_seconds + 1e-6
    assert offset.error_seconds == pytest.approx((there + back) / 2, abs=1e-6)


def test_a_missing_mount_names_its_node_and_what_is_well_is_said_once():
    replies = [
        NodeReply(node=HERE, answer=(SEEN,)),
        NodeReply(node=THERE, answer=(GONE,), link=QUICK, clock=ClockOffset(0.0, 0.5)),
    ]
    bad, *good = node_findings(replies, ONE_CPU)
    assert (bad.subject, bad.level) == ("checkpoint on far (10.0.0.2, bbbbbbbb)", "error")
    assert "/models/llama" in bad.found
    assert [finding.subject for finding in good] == ["checkpoint on 1 node", "link on 1 node", "time of day on 1 node"]
    (together,) = node_findings([NodeReply(node=HERE, answer=(SEEN,)), NodeReply(node=THERE, answer=(SEEN,))], ONE_CPU)
    assert (together.subject, together.found) == ("checkpoint on 2 nodes", SEEN.found)


def test_good_figures_of_many_nodes_are_told_of_a_few():
    nodes = [ClusterNode(node_id=f"{i:056d}", address=f"10.0.0.{i}", hostname=f"n{i}") for i in range(6)]
    memory = [Finding(subject="memory", level="good", found=f"{i} GiB available") for i in range(6)]
    replies = [NodeReply(node=node, answer=(found,)) for node, found in zip(nodes, memory, strict=True)]
    (together,) = node_findings(replies, ONE_CPU)
    assert together.subject == "memory on 6 nodes"
    assert together.found.startswith("n0 (10.0.0.0, 00000000): 0 GiB available; n1 (10.0.0.1, 00000000): 1 GiB")
    assert together.found.endswith("3 GiB available; and 2 more nodes")


@pytest.mark.parametrize(("node", "level"), [(THERE, "error"), (WITHOUT_ROOM, "warning")])
def test_a_node_that_does_not_answer(node, level):
    (found,) = node_findings([NodeReply(node=node, failure="no answer within 60 s")], ONE_CPU)
    assert (found.subject, found.level) == (f"answer on {node.name}", level)
    assert found.found == "no answer within 60 s"


@pytest.mark.parametrize(
    ("answers", "is_healthy"),
    [
        pytest.param([SEEN, SEEN], True, id="all-nodes-see-it"),
        pytest.param([SEEN, GONE], False, id="one-does-not"),
        pytest.param([GONE, GONE], False, id="none-does"),
    ],
)
def test_this_node_may_lack_the_mount_where_the_nodes_of_the_ranks_have_it(answers, is_healthy):
    replies = tuple(NodeReply(node=node, answer=(seen,)) for node, seen in zip((HERE, THERE), answers, strict=True))
    of_this_node = [Finding(subject=subject, level="error", found="too little") for subject in ("memory", "GPUs")]
    local = (GONE, *of_this_node)
    alone = Examination(uri="/models/llama", num_ranks=2, findings=local, memory=MEMORY)
    joined = ClusterFindings(replies, tuple(node_findings(replies, ONE_CPU))).joined_to(alone)
    assert joined.is_healthy == is_healthy
    assert joined.nodes == replies
    assert {"memory", "GPUs"}.isdisjoint(finding.subject for finding in joined.findings)


@pytest.mark.parametrize(
    ("num_ranks", "level", "told"),
    [
        (4, "good", "2 nodes, 2 of them with room for ranks; 4 ranks on one of them"),
        (6, "good", "6 ranks on several of them"),
        (7, "error", "cannot fit"),
    ],
)
def test_room_in_the_cluster(num_ranks, level, told):
    found = check_cluster_room([HERE, THERE], ONE_CPU, num_ranks)
    assert found.level == level
    assert told in found.found
    assert [ranks_on(node, ONE_CPU, 3) for node in (HERE, THERE, WITHOUT_ROOM)] == [3, 2, 0]


@pytest.mark.parametrize(
    ("address", "told"), [("local", "names no running cluster"), ("127.0.0.1:1", "no Ray cluster answers")]
)
def test_an_address_without_a_cluster(checkpoint, address, told):
    result = CliRunner().invoke(main, ["doctor", str(checkpoint), "--address", address, "--quick"])
    assert result.exit_code == 1
    assert told in result.output


def test_headers_are_read_once_for_this_node_and_for_the_cluster(checkpoint, monkeypatch):
    num_reads, looks = [], []
    read_index = LoadRequest.read_index

    def counted(request: LoadRequest, storage: Storage) -> CheckpointIndex:
        num_reads.append(1)
        return read_index(request, storage)

    def answered(look: Callable[[ClusterNode], NodeLook], **_: object) -> list[NodeReply[tuple[Finding, ...]]]:
        looks.append(look(HERE))
        return [NodeReply(node=HERE, answer=(SEEN,))]

    monkeypatch.setattr(LoadRequest, "read_index", counted)
    monkeypatch.setattr("ray_streamer.doctor.nodes.ask_nodes", answered)
    examination = examine(request_of(checkpoint), devices=checkpoint, is_quick=True, address="10.0.0.1:6379")
    assert len(num_reads) == 1
    assert looks[0].files == request_of(checkpoint).open_index().files
    assert looks[0].held_bytes == 4 * 64 * 64 * 4
    assert looks[0].useful_bytes == 2 * Settings().block_bytes
    assert (looks[0].device, looks[0].devices) == ("cpu", checkpoint)
    assert examination.is_healthy
    assert examination.prediction is not None
    assert [reply.node for reply in examination.nodes] == [HERE]


@pytest.fixture
def disks(tmp_path, monkeypatch):
    """A folder for each of two nodes, both with the checkpoint; this process works in the first."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        write_checkpoint(folder / "model", TENSORS, num_files=2)
    monkeypatch.chdir(folders[0])
    return folders


@pytest.fixture
def mount(disks, tmp_path):
    """One path that is another folder for the processes of each node: that of the node's working directory."""
    path = tmp_path / "mount"
    path.symlink_to("/proc/self/cwd/model")
    return path


@pytest.fixture
def cluster_address(disks, monkeypatch):
    """Two nodes of one machine, whose processes work in the folders of `disks`."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=2, node_ip_address="127.0.0.2", include_dashboard=False)
        with monkeypatch.context() as there:
            there.chdir(disks[1])
            cluster.add_node(num_cpus=1, node_ip_address="127.0.0.3")
        ray.init(address=cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False, logging_level="ERROR")
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_two_nodes_of_which_one_loses_its_mount(disks, mount, cluster_address):
    def doctor(expected_exit: int) -> dict:
        options = ["--tp", "2", "--rule", "*=replicate", "--address", cluster_address, "--quick", "--json"]
        result = CliRunner().invoke(main, ["doctor", str(mount), *options])
        assert result.exit_code == expected_exit, result.output
        return json.loads(result.stdout)

    healthy = doctor(0)
    here, there = healthy["nodes"]
    assert (here["node"]["address"], there["node"]["address"]) == ("127.0.0.2", "127.0.0.3")
    assert here["node"]["is_here"]
    assert here["link"] is None
    assert there["link"]["round_trip_seconds"] > 0
    assert there["link"]["fetch_seconds"] > 0
    offset, error = there["clock"]
    assert abs(offset) <= error, "both nodes have the clock of this machine"
    assert {finding["subject"] for finding in healthy["findings"]} >= {"cluster", "checkpoint on 2 nodes"}

    file = max((disks[1] / "model").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    assert f"{mount / file.name} has " in _error_of(doctor(1))["found"]
    shutil.rmtree(disks[1] / "model")
    missing = _error_of(doctor(1))
    assert "127.0.0.3" in missing["subject"]
    assert str(mount) in missing["found"]

    # The other way round: this node has no mount, and the nodes look for themselves.
    shutil.move(disks[0] / "model", disks[1] / "model")
    swapped = _error_of(doctor(1))
    assert "127.0.0.2" in swapped["subject"]


def _error_of(examined: dict) -> dict:
    (error,) = [finding for finding in examined["findings"] if finding["level"] == "error"]
    return error


@pytest.mark.slow
def test_a_node_whose_mount_hangs_is_not_waited_for(tmp_path, cluster_address):
    fifo = tmp_path / "mount_without_server"
    os.mkfifo(fifo)

    def ask(there: Callable[[], object], timeout_seconds: float) -> list[NodeReply[object]]:
        return ask_nodes(
            lambda node: partial(int, "1") if node.is_here else there,
            address=cluster_address,
            connect_timeout_seconds=10,
            timeout_seconds=timeout_seconds,
        )

    here, there = ask(partial(int, "none"), 60)
    assert (here.answer, here.failure) == (1, "")
    assert there.answer is None
    assert there.failure.startswith("ValueError: invalid literal")
    # Opening it to read waits for a writer, which never comes.
    here, there = ask(partial(fifo.read_bytes), 10)
    assert here.answer == 1
    assert (there.answer, there.failure) == (None, "no answer within 10 s")
    # The process that hangs was ended: the node answers again.
    assert [reply.answer for reply in ask(partial(int, "2"), 60)] == [1, 2]
