"""Loads over one local Ray that all tests of this module share."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import ray_streamer
from ray_streamer.demo.checkpoint import demo_layout, make_checkpoint
from ray_streamer.demo.proof import Proof, prove
from ray_streamer.demo.run import Demo, DemoLoad
from ray_streamer.errors import SettingsError
from ray_streamer.report.load_report import LoadReport
from ray_streamer.report.progress import LoadProgress
from ray_streamer.report.tables import print_load
from ray_streamer.testing.checkpoints import ModelLayout


def test_load_reports_every_rank_and_draws_it(invoke, checkpoint, tmp_path, local_ray):
    file, trace_file = tmp_path / "report.json", tmp_path / "trace.json"
    options = ("--memory-limit", "4MiB", "--page-cache", "off", "--report", file, "--trace", trace_file)
    result = invoke("load", checkpoint, "--tp", 2, *options, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report == json.loads(file.read_text())
    assert list(report["seconds"]) == ["check", "ray", "start", "plan", "import", "load", "total"]
    assert report["bytes_read"] == report["needed_bytes"] == report["checkpoint_bytes"]
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    for rank in report["ranks"]:
        assert rank["peak_staging_bytes"] <= rank["memory_limit"] == 4 << 20
    verdict = report["verdict"]
    assert 0 < verdict["measured_seconds"] <= report["seconds"]["import"] + report["seconds"]["load"]
    assert "Reading and copying took" in verdict["text"]
    assert sum(rank["bytes_delivered"] for rank in report["ranks"]) == report["bytes_delivered"]
    came = [sum(rank["received_bytes"]) for rank in report["timeline"]["ranks"]]
    assert came == [rank["bytes_read"] for rank in report["ranks"]]
    landed = [sum(rank["landed_bytes"]) for rank in report["timeline"]["ranks"]]
    assert landed == [rank["bytes_delivered"] for rank in report["ranks"]]
    kinds = {kind["name"]: kind for kind in report["tensor_kinds"]}
    assert sum(kind["read_bytes"] for kind in kinds.values()) == report["bytes_read"]
    assert kinds["model.layers.*.mlp.up_proj.weight"]["num_tensors"] == 2
    assert report["untold"] == []
    again = invoke("report", file, "--json")
    assert (again.exit_code, json.loads(again.stdout)) == (0, report)
    trace = json.loads(trace_file.read_text())
    assert list(trace["otherData"]["clock_error_microseconds"].values()) == [0]
    events = trace["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert [name.split(" on ")[0] for name in names] == ["driver", "rank 0", "rank 1"]
    drawn = {event["name"]: event["dur"] / 1e6 for event in events if event.get("cat") == "phase" and event["pid"] == 2}
    assert drawn == pytest.approx({name: report["seconds"][name] for name in drawn}, abs=1e-4)
    assert {"start", "plan", "load"} <= drawn.keys()
    extents = [
        event["args"]["stop"] - event["args"]["start"]
        for event in events
        if event.get("cat") == "read" and event["name"].startswith("block ")
    ]
    assert sum(extents) == report["bytes_read"]


def test_a_page_without_plotly_is_refused_before_the_load(invoke, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = invoke("load", checkpoint, "--html", tmp_path / "load.html")
    assert result.exit_code == 2
    assert "pip install 'ray_streamer[report]'" in result.stderr


def test_a_report_is_shown_again(invoke, sound_load, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(sound_load["report"].as_dict()))
    result = invoke("report", file)
    assert result.exit_code == 0
    assert "peak staging / limit" in result.stdout
    assert "No word on what bounded the load" in result.stdout
    missing = invoke("report", tmp_path / "none.json", "--json")
    error = json.loads(missing.stdout)["error"]
    assert (missing.exit_code, error["type"]) == (1, "SettingsError")
    assert "none.json cannot be read: No such file or directory" in error["message"]


def test_load_shows_a_table(invoke, checkpoint, local_ray, monkeypatch):
    phases = []
    tell = LoadProgress.phase
    monkeypatch.setattr(LoadProgress, "phase", lambda progress, name: (phases.append(name), tell(progress, name)))
    result = invoke("load", checkpoint, "--tp", 1)
    assert result.exit_code == 0
    assert "peak staging / limit" in result.stdout
    assert "7.66 MiB" in result.stdout
    assert "Verdict: " in result.stdout
    assert list(dict.fromkeys(phases)) == ["check", "ray", "start", "plan", "load"]


def test_a_load_that_fails_says_so_in_one_object(invoke, checkpoint, local_ray):
    result = invoke("load", checkpoint, "--tp", 3, "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "ShardingError"
    assert "tp that works for every tensor: 1, 2, 4, 8" in error["message"]


def test_demo_proves_every_rank_on_every_storage(invoke, tmp_path, local_ray, dead_port, monkeypatch, caplog):
    # Of a store that is none of the demo's, and answers nobody.
    monkeypatch.setenv("RAY_STREAMER_S3_ENDPOINT_URL", f"http://127.0.0.1:{dead_port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{dead_port}")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another-key")
    result = invoke("demo", "--folder", tmp_path, "--gigabytes", 0.005, "--tp", 2, "--json")
    assert result.exit_code == 0, result.output
    demo = json.loads(result.stdout)
    assert demo["failures"] == []
    cold, warm, s3 = demo["loads"]
    num_tensors = len(demo_layout(5_000_000).tensors)
    for load in (cold, warm, s3):
        assert [proof["num_tensors"] for proof in load["proofs"]] == [num_tensors] * 2
        assert sum(proof["num_bytes"] for proof in load["proofs"]) == load["report"]["bytes_delivered"]
    assert cold["report"]["amplification"] == s3["report"]["amplification"] == 1.0
    # Copied out of a mapping, so what two ranks hold counts twice.
    assert warm["report"]["page_cache_bytes"] + warm["report"]["bytes_read"] >= warm["report"]["needed_bytes"]
    assert s3["report"]["uri"].startswith("s3://")
    assert "the ranks look for themselves" not in caplog.text
    # A second demo finds what this one made.
    (folder,) = tmp_path.iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert not make_checkpoint(folder, demo_layout(5_000_000))
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


@pytest.fixture
def held(tmp_path):
    """A checkpoint's folder, and a rank that holds all of it."""
    folder = tmp_path / "llama"
    make_checkpoint(folder, demo_layout(1))
    tensors = ray_streamer.load_rank(str(folder), rank=0, world_size=1)
    context = ray_streamer.RankContext(rank=0, mesh=ray_streamer.Mesh(), device="cpu", node="here", tensors=tensors)
    return str(folder), context


def test_proof_finds_nothing_wrong_with_what_was_loaded(held):
    folder, context = held
    proof = prove(context, folder)
    assert proof.faults == ()
    assert (proof.num_tensors, proof.num_bytes) == (len(demo_layout(1).tensors), demo_layout(1).total_bytes)


def test_proof_sees_one_bit(held):
    folder, context = held
    context.tensors["lm_head.weight"].view(torch.uint8)[17, 3] ^= 1
    assert prove(context, folder).faults == ("lm_head.weight",)


def test_proof_sees_what_is_missing_too_many_or_of_another_shape(held):
    folder, context = held
    context.tensors["more"] = context.tensors.pop("model.norm.weight")
    context.tensors["lm_head.weight"] = context.tensors["lm_head.weight"][:-1]
    assert sorted(prove(context, folder).faults) == ["lm_head.weight", "model.norm.weight", "more"]


def test_proof_of_a_rank_that_holds_its_neighbours_slices(held):
    folder, context = held
    halves = {name: tensor[: tensor.shape[0] // 2] for name, tensor in context.tensors.items()}
    wrong = ray_streamer.RankContext(rank=1, mesh=ray_streamer.Mesh(tp=2), device="cpu", node="here", tensors=halves)
    assert prove(wrong, folder).num_tensors == 0


def test_a_truncated_checkpoint_is_made_again(tmp_path):
    folder = tmp_path / "llama"
    assert make_checkpoint(folder, demo_layout(1))
    file = sorted(folder.glob("*.safetensors"))[-1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert make_checkpoint(folder, demo_layout(1))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "0", "1e9", "much"])
def test_a_size_that_no_demo_has_is_wrong_usage(invoke, tmp_path, size):
    result = invoke("demo", "--folder", tmp_path / "demo", "--gigabytes", size)
    assert result.exit_code == 2
    assert "'--gigabytes'" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_the_largest_demo_is_a_model_like_any_other():
    assert demo_layout(400_000_000_000).config["num_hidden_layers"] <= 4096


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SettingsError, match="holds no checkpoint"):
        make_checkpoint(tmp_path, ModelLayout([], {}))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("num_bytes", [5_000_000, 100_000_000, 1_000_000_000])
def test_the_layout_has_about_the_bytes_asked_for(num_bytes):
    assert demo_layout(num_bytes).total_bytes == pytest.approx(num_bytes, rel=0.2)


@pytest.fixture
def sound_load(checkpoint):
    statistics = []
    ray_streamer.load_rank(
        str(checkpoint),
        settings=ray_streamer.Settings.resolve(page_cache="off", memory_limit="4MiB"),
        on_statistics=statistics.append,
    )
    report = LoadReport(
        uri="here",
        mesh={"tp": 1, "pp": 1, "dp": 1, "ep": 1},
        seconds={"load": 1.0},
        checkpoint_bytes=statistics[0].bytes_read,
        needed_bytes=statistics[0].bytes_read,
        plan_hash="",
        nodes=("here",),
        ranks=tuple(statistics),
    )
    proof = Proof(rank=0, num_tensors=21, num_bytes=report.bytes_read, faults=())
    return {"storage": "disk", "must_read": True, "report": report, "proofs": (proof,)}


def with_rank(report, **changes):
    return replace(report, ranks=(replace(report.ranks[0], **changes),))


def test_a_report_says_what_the_time_of_blocks_went_into(sound_load, capsys):
    report = sound_load["report"]
    times = {
        "wait_seconds": 1.25,
        "first_byte_seconds": 2.0,
        "read_seconds": 6.5,
        "copy_seconds": 0.25,
        "first_touch_seconds": 0.03,
    }
    ranks = (replace(report.ranks[0], **times), replace(report.ranks[0], **times))
    print_load(replace(report, ranks=ranks, nodes=("here", "here")))
    expected = "2.50 s waiting for a slot, 4.00 s waiting for the first byte, 9.00 s receiving, 0.50 s copying, 0.06 s page faults."
    assert f"Summed over the blocks of all ranks: {expected}" in capsys.readouterr().out


def test_a_demo_fails_for_each_broken_promise(sound_load):
    assert DemoLoad(**sound_load).failures == []
    report = sound_load["report"]
    broken = {
        "rank 0 holds wrong bytes: a, b": {"proofs": (replace(sound_load["proofs"][0], faults=("a", "b")),)},
        "rank 0 holds wrong bytes": {"proofs": (replace(sound_load["proofs"][0], num_tensors=0),)},
        "amplification is 2.00": {"report": replace(report, needed_bytes=report.bytes_read // 2)},
        "amplification is 0.00": {"report": with_rank(report, bytes_read=0)},
        "rank 0 staged 5 bytes of 4 allowed": {"report": with_rank(report, peak_staging_bytes=5, memory_limit=4)},
    }
    for sentence, change in broken.items():
        (failure,) = DemoLoad(**(sound_load | change)).failures
        assert failure.startswith(f"disk: {sentence}")
    # What came out of the page cache was not read, and need not be.
    warm = sound_load | {"must_read": False, "report": with_rank(report, bytes_read=0)}
    assert DemoLoad(**warm).failures == []


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_demo_that_fails_is_exit_code_1(invoke, sound_load, monkeypatch, flags):
    wrong = replace(sound_load["proofs"][0], faults=("a.weight",))
    demo = Demo((DemoLoad(**(sound_load | {"proofs": (wrong,)})),))
    monkeypatch.setattr("ray_streamer.demo.run.run_demo", lambda *_: demo)
    result = invoke("demo", *flags)
    assert result.exit_code == 1
    assert "rank 0 holds wrong bytes: a.weight" in result.stderr
    if flags:
        assert json.loads(result.stdout)["failures"] == ["disk: rank 0 holds wrong bytes: a.weight"]
    else:
        assert "1 DIFFER" in result.stdout
