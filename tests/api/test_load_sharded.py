"""`load_sharded` on a real local Ray, from local files and from a real S3 server, and the handle that it gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import ray
import safetensors
from api_support import example_tasks, oracle

import ray_streamer
from ray_streamer.errors import ClusterError, ObjectChangedError, ObjectMissingError, RankFailedError, SettingsError
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.faults import Fault, FaultProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ray_streamer import RankContext, ShardedModel
    from ray_streamer.rank.statistics import RankStatistics

# The actors cannot import a test module; they get its functions by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

MIB = 1 << 20
HEAD_BYTES = 256 << 10
"""What is read of each file to get its header."""

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def addresses(context: RankContext) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in context.tensors.items()}


def pid(context: RankContext) -> int:
    return os.getpid()


def fail_on(context: RankContext, rank: int) -> int:
    if context.rank == rank:
        raise LookupError("no such prompt")
    return context.rank


def take_away(context: RankContext, rank: int | None, name: str) -> None:
    if rank in (None, context.rank):
        del context.tensors[name]


def load(uri: str, **arguments: Any) -> ShardedModel:
    return ray_streamer.load_sharded(uri, **{"tp": 2, "concurrency": 4, "memory_limit": "1MiB"} | arguments)


def file_tensor(folder: Path, name: str) -> Any:
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a mapping
                return file.get_tensor(name)
    raise KeyError(name)


@pytest.fixture(scope="module")
def model(local_ray: None, checkpoint: Any) -> Iterator[ShardedModel]:
    """Loaded from files as if they were not in the page cache."""
    settings = ray_streamer.Settings(page_cache="off")
    with load(checkpoint.uri, settings=settings) as loaded:
        yield loaded


def test_every_rank_holds_what_safetensors_gives(model: ShardedModel, checkpoint: Any) -> None:
    assert model.run(oracle.find_faults, checkpoint.uri) == [[], []]
    assert model.run(lambda context: set(context.tensors)) == [checkpoint.names] * 2


def test_each_byte_is_read_once_and_staging_stays_within_the_limit(model: ShardedModel, checkpoint: Any) -> None:
    report = model.stats()
    assert report.bytes_read == report.needed_bytes == report.checkpoint_bytes == checkpoint.num_bytes
    assert report.amplification == 1.0
    assert report.page_cache_bytes == 0
    assert [rank.memory_limit for rank in report.ranks] == [MIB, MIB]
    for rank in report.ranks:
        assert 0 < rank.peak_staging_bytes <= MIB
        assert rank.bytes_delivered == rank.bytes_to_deliver


def test_the_report_agrees_with_itself_and_with_the_plan(model: ShardedModel) -> None:
    report, summary = model.stats(), model.plan.summary()
    assert (report.uri, report.mesh, report.plan_hash) == (
        model.plan.index.uri,
        {"tp": 2, "pp": 1, "dp": 1, "ep": 1},
        summary.plan_hash,
    )
    assert report.nodes == tuple(model.run(lambda context: context.node))
    phases = ("check", "ray", "start", "plan", "import", "load")
    assert tuple(report.seconds) == (*phases, "total")
    assert report.seconds["total"] == pytest.approx(sum(report.seconds[name] for name in phases))
    assert report.reading_seconds == report.seconds["import"] + report.seconds["load"]
    assert all(0 < sum(rank.seconds.values()) <= report.reading_seconds for rank in report.ranks)
    assert report.gigabytes_per_second == pytest.approx(report.needed_bytes / report.reading_seconds / 1e9)
    for rank, planned in zip(report.ranks, summary.ranks, strict=True):
        assert (rank.rank, rank.bytes_read, rank.num_requests) == (planned.rank, planned.read_bytes, planned.requests)
        assert rank.bytes_delivered == planned.result_bytes
    as_json = json.loads(json.dumps(report.as_dict()))
    for total in ("bytes_read", "bytes_delivered", "page_cache_bytes"):
        assert as_json[total] == getattr(report, total) == sum(rank[total] for rank in as_json["ranks"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(Q_PROJ, id="rows"),
        pytest.param(O_PROJ, id="columns"),
        pytest.param("model.norm.weight", id="replicated"),
        pytest.param("lm_head.weight", id="uneven-vocabulary"),
        pytest.param("model.scale", id="scalar"),
        pytest.param("model.nothing", id="empty"),
    ],
)
def test_gather_gives_the_tensor_of_the_file(model: ShardedModel, checkpoint: Any, name: str) -> None:
    assert oracle.is_equal(model.gather(name), file_tensor(checkpoint.folder, name))


@pytest.mark.parametrize("rank", [-1, 2, "x", None, True, 1.0])
def test_a_rank_that_is_not_there_is_not_restarted(model: ShardedModel, rank: Any) -> None:
    with pytest.raises(SettingsError, match=r"a rank is a whole number|there is no rank .*: the ranks are 0 to 1"):
        model.restart(rank)
    assert model.run(lambda context: context.rank) == [0, 1]


def test_gather_of_a_name_that_is_not_there(model: ShardedModel) -> None:
    with pytest.raises(SettingsError, match="there is no tensor 'no_such_tensor'"):
        model.gather("no_such_tensor")


@pytest.mark.parametrize("how", ["argument", "closure", "put", "run"])
def test_a_model_that_is_sent_to_another_process(model: ShardedModel, how: str) -> None:
    task = ray.remote(num_cpus=0)(lambda *_: None if how == "argument" else model)
    send: dict[str, Callable[[], object]] = {
        "argument": lambda: task.remote(model),
        "closure": lambda: task.remote(),
        "put": lambda: ray.put(model),
        "run": lambda: model.run(lambda _: repr(model)),
    }
    with pytest.raises(
        ClusterError, match=r"ShardedModel\(.*belongs to the process that loaded it.*load_sharded in the actor"
    ):
        send[how]()


def test_a_model_is_one_line_and_says_how_it_is(model: ShardedModel, checkpoint: Any) -> None:
    assert repr(model).startswith(f"ShardedModel({checkpoint.uri!r}, ")
    assert "tp=2" in repr(model)
    assert "loaded in" in repr(model)
    assert "\n" not in repr(model)


def test_run_passes_arguments_and_gives_results_in_rank_order(model: ShardedModel) -> None:
    results = model.run(lambda context, *args: (context.rank, context.device, context.mesh, args), "a", {"b": 1})
    assert results == [(rank, "cpu", model.mesh, ("a", {"b": 1})) for rank in (0, 1)]
    assert len(model.workers) == 2


def test_what_a_function_changes_stays_changed(model: ShardedModel) -> None:
    def change(context: RankContext) -> None:
        context.tensors["mine"] = context.tensors["model.scale"] + context.rank

    model.run(change)
    assert model.run(lambda context: "mine" in context.tensors) == [True, True]
    model.run(take_away, None, "mine")


def test_a_function_that_raises_is_told_with_its_rank_and_type_and_the_model_stays(model: ShardedModel) -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 on node .* LookupError: no such prompt") as caught:
        model.run(fail_on, 1)
    assert caught.value.rank == 1
    assert type(caught.value.cause) is LookupError
    assert model.run(fail_on, 7) == [0, 1]


def test_a_tensor_that_a_function_took_away_cannot_be_gathered(model: ShardedModel) -> None:
    taken = "model.positions"
    whole = model.gather(taken)
    model.run(take_away, 0, taken)
    with pytest.raises(RankFailedError, match=r"'model.positions' no longer"):
        model.gather(taken)
    model.run(lambda context: context.tensors.update({taken: whole}) if context.rank == 0 else None)


def test_a_killed_rank_is_named_and_restarted_and_the_other_keeps_its_tensors(
    local_ray: None, checkpoint: Any, single_file: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint.folder, tmp_path / "checkpoint")
    with load(str(folder)) as model:
        pids, before = model.run(pid), model.run(addresses)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(RankFailedError, match="actor died") as caught:
            model.run(pid)
        assert caught.value.rank == 1
        statistics = model.restart(1)
        assert (statistics.rank, statistics.bytes_delivered) == (1, statistics.bytes_to_deliver)
        assert model.run(oracle.find_faults, str(folder)) == [[], []]
        assert model.run(addresses)[0] == before[0]
        assert model.run(pid)[0] == pids[0]
        assert model.run(pid)[1] != pids[1]

        os.utime(folder / "model-00001-of-00003.safetensors", ns=(1, 1))
        with pytest.raises(RankFailedError, match=r"model-00001-of-00003\.safetensors") as caught:
            model.restart(1)
        assert type(caught.value.cause) is ObjectChangedError
        with pytest.raises(RankFailedError, match=r"rank 1 .* holds no tensors"):
            model.run(pid)

        # All ranks load again: from the changed files, then from others.
        assert model.reload() == model.stats()
        assert model.run(oracle.find_faults, str(folder)) == [[], []]
        assert model.run(addresses)[0] == before[0]
        again = model.run(addresses)
        report = model.reload(single_file.uri)
        assert model.run(oracle.find_faults, single_file.uri) == [[], []]
        assert model.run(addresses) == again
        assert (report.uri, model.plan.index.uri, report.plan_hash) == (*[single_file.uri] * 2, model.plan.plan_hash)
        assert list(report.seconds) == ["headers", "plan", "import", "load", "total"]
        with pytest.raises(ObjectMissingError):
            model.reload(f"{single_file.uri}-not")
        assert model.run(addresses) == again, "what cannot be read costs nothing"
        model.reload()
    # The plan was not asked for since.
    with pytest.raises(ClusterError, match="this model was shut down; load it again"):
        model.gather(Q_PROJ)


def test_reloads_and_restarts_of_several_threads_run_one_after_the_other(
    local_ray: None, checkpoint: Any, single_file: Any
) -> None:
    gate = threading.Barrier(3)

    def together(change: Callable[[], Any]) -> Any:
        gate.wait(60)
        return change()

    with load(checkpoint.uri) as model, ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            changes = (
                lambda: model.reload(checkpoint.uri),
                lambda: model.reload(single_file.uri),
                lambda: model.restart(1),
            )
            first, second, restarted = pool.map(together, changes)
            assert (first.uri, second.uri, restarted.rank) == (checkpoint.uri, single_file.uri, 1)
            assert model.run(oracle.find_faults, model.stats().uri) == [[], []]
            assert model.plan.index.uri == model.stats().uri


def test_files_in_the_page_cache_are_copied_and_the_environment_gives_the_settings(
    local_ray: None, checkpoint: Any, monkeypatch: pytest.MonkeyPatch, assert_gone: Any
) -> None:
    monkeypatch.setenv("RAY_STREAMER_PAGE_CACHE", "on")
    monkeypatch.setenv("RAY_STREAMER_MEMORY_LIMIT", "3MiB")
    monkeypatch.setenv("RAY_STREAMER_NODE_MEMORY_LIMIT", "4MiB")
    monkeypatch.setenv("RAY_STREAMER_BLOCK_BYTES", "128KiB")
    uri = f"file://{checkpoint.folder}/model.safetensors.index.json"
    model = ray_streamer.load_sharded(uri, tp=2)
    report = model.stats()
    assert model.run(oracle.find_faults, checkpoint.uri) == [[], []]
    assert (report.bytes_read, report.page_cache_bytes) == (0, report.bytes_delivered)
    assert model.plan.limits.block_bytes == 128 << 10
    assert [rank.memory_limit for rank in report.ranks] == [2 * MIB, 2 * MIB]

    pids = model.run(pid)
    model.shutdown()
    model.shutdown()
    assert_gone(pids)
    assert model.stats() is report
    for use in (lambda: model.run(pid), lambda: model.gather(Q_PROJ), lambda: model.restart(0), lambda: model.workers):
        with pytest.raises(ClusterError, match="was shut down; load it again"):
            use()


def test_s3_sends_each_byte_once(local_ray: None, checkpoint: Any, s3_server: Any) -> None:
    if s3_server.kind != "rgw":
        pytest.skip("only RADOS Gateway counts what it sends")
    uri = s3_server.upload_folder(checkpoint.folder, "load-sharded", "some/model")
    placement = ray_streamer.PlacementOptions(runtime_env={"env_vars": s3_server.environment()})
    sent_before, requests_before = s3_server.bytes_sent(), s3_server.requests()
    with load(uri, placement=placement) as model:
        sent, requests = s3_server.bytes_sent() - sent_before, s3_server.requests() - requests_before
        assert model.run(oracle.find_faults, checkpoint.uri) == [[], []]
        report = model.stats()
    shard_files = list(checkpoint.folder.glob("*.safetensors"))
    head_bytes = sum(min(HEAD_BYTES, path.stat().st_size) for path in shard_files)
    json_bytes = sum(path.stat().st_size for path in checkpoint.folder.glob("*.json"))
    assert report.amplification == 1.0
    assert sent == checkpoint.num_bytes + head_bytes + json_bytes
    assert requests == sum(rank.num_requests for rank in report.ranks) + len(shard_files) + 2


def test_credentials_that_only_the_driver_has_are_told_as_such(
    local_ray: None, checkpoint: Any, s3_credentials: Any
) -> None:
    uri = s3_credentials.upload_folder(checkpoint.folder, "drivers-own")
    with pytest.raises(RankFailedError, match="CredentialsError: no AWS credentials") as caught:
        load(uri, settings=ray_streamer.Settings(s3_endpoint_url=s3_credentials.endpoint_url))
    (note,) = caught.value.__notes__
    assert note.startswith(
        "This process could read the checkpoint. Ranks have the variables and credentials with which Ray"
    )


def test_progress_grows_while_a_load_is_not_waited_for(local_ray: None, checkpoint: Any, s3_credentials: Any) -> None:
    uri = s3_credentials.upload_folder(checkpoint.folder, "progress")
    seen: list[int] = []
    with FaultProxy(s3_credentials.endpoint_url) as proxy:
        planned = ray_streamer.plan(uri, settings=ray_streamer.Settings(s3_endpoint_url=proxy.url))
        assert planned.index.total_bytes == checkpoint.num_bytes
        num_head_requests = len(proxy.ranges)
        # One body stops in its middle; it goes on when progress was seen.
        proxy.fail_next(*[Fault()] * (num_head_requests + 1), Fault(body_bytes=1000, end="stall"))

        def on_progress(statistics: list[RankStatistics | None]) -> None:
            seen.append(sum(rank.bytes_delivered for rank in statistics if rank is not None))
            if seen[-1] > 0:
                proxy.drop_connections()

        model = load(
            uri,
            settings=ray_streamer.Settings(s3_endpoint_url=proxy.url),
            placement=ray_streamer.PlacementOptions(runtime_env={"env_vars": s3_credentials.environment()}),
            on_progress=on_progress,
            wait=False,
        )
        with model:
            with pytest.raises(TimeoutError):
                model.wait(0)
            assert model.wait(200) is model
            assert model.run(oracle.find_faults, checkpoint.uri) == [[], []]
            report = model.stats()
    assert seen == sorted(seen)
    assert any(0 < delivered < report.bytes_delivered for delivered in seen)
    assert report.amplification == 1.0


@pytest.mark.slow
def test_replicas_of_one_file_by_slices_of_the_callers_own(local_ray: None, single_file: Any) -> None:
    def last_layer_and_some_rows(index: Any, rank: int) -> Any:
        boxes = {name: ((0,), index.shape_of(at)) for at, name in enumerate(index.names) if "layers.1." in name}
        num_columns = index.shape_of(index.position("lm_head.weight"))[1]
        boxes["lm_head.weight"] = ((100 * rank,), (50, num_columns))
        specs, rows = [], []
        for name, (first_row, shape) in boxes.items():
            whole = index.shape_of(index.position(name))
            starts = (*first_row, *(0 for _ in shape[1:]))
            specs.append(
                ray_streamer.ResultSpec(name=name, dtype=index.dtype_of(index.position(name)).name, shape=shape)
            )
            move = ray_streamer.Move.box(
                shape, source_shape=whole, source_starts=starts, target_shape=shape, target_starts=(0,) * len(shape)
            )
            rows.append((name, name, [move]))
        return ray_streamer.RankSlices.from_rows(index, specs, rows)

    uri = str(single_file.folder / "model.safetensors")
    settings = ray_streamer.Settings(page_cache="off", max_gap_bytes=0)
    with load(uri, tp=1, replicas=2, slices=last_layer_and_some_rows, settings=settings) as model:
        assert model.mesh == ray_streamer.Mesh(tp=1, dp=2)
        head = file_tensor(single_file.folder, "lm_head.weight")
        whole = file_tensor(single_file.folder, O_PROJ)

        def is_right(context: RankContext) -> bool:
            start = 100 * context.rank
            return (
                len(context.tensors) == 10
                and oracle.is_equal(context.tensors["lm_head.weight"], head[start : start + 50])
                and oracle.is_equal(context.tensors[O_PROJ], whole)
            )

        assert model.run(is_right) == [True, True]
        # Both replicas are on this node, which reads each byte once for both.
        assert model.stats().amplification == 1.0
        layer_bytes = model.stats().bytes_read - 100 * head.shape[1] * 2
        assert model.stats().bytes_delivered == model.stats().bytes_read + layer_bytes


def test_rules_of_the_caller_go_before_the_preset(local_ray: None, tmp_path: Path) -> None:
    tensors = [
        ("model.layers.0.self_attn.o_proj.weight", "F32", (64, 64)),
        ("model.layers.0.mlp.up_proj.weight", "F32", (64, 64)),
        ("model.embed_tokens.weight", "F32", (65, 64)),
        ("strange.table", "F32", (9, 9)),
    ]
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 64}
    folder = write_checkpoint(tmp_path / "checkpoint", tensors, config=config)
    rules = {"*.o_proj.weight": ray_streamer.Split(0), "*.mlp.*": ray_streamer.Skip()}
    with load(str(folder), rules=rules, unmatched="replicate", memory_limit=0) as model:
        shapes = model.run(lambda context: {name: tuple(t.shape) for name, t in sorted(context.tensors.items())})
        assert shapes == [
            {
                "model.embed_tokens.weight": rows,
                "model.layers.0.self_attn.o_proj.weight": (32, 64),
                "strange.table": (9, 9),
            }
            for rows in ((33, 64), (32, 64))
        ]
        for name in shapes[0]:
            assert oracle.is_equal(model.gather(name), file_tensor(folder, name))
        with pytest.raises(SettingsError, match=r"no rank holds any of 'model\.layers\.0\.mlp\.up_proj\.weight'"):
            model.gather("model.layers.0.mlp.up_proj.weight")


def test_the_example_of_a_job_says_what_each_rank_holds(
    local_ray: None, checkpoint: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = example_tasks.loaded_example("load_from_job")
    # As a job's own script, which the actors cannot import.
    monkeypatch.setitem(sys.modules, example.__name__, example)
    ray.cloudpickle.register_pickle_by_value(example)
    example.main(checkpoint.uri, 2, "cpu")
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("(")]  # what actors print
    assert [line.partition(" on ")[0] for line in lines[:2]] == ["rank 0", "rank 1"]
    assert all(f": {len(checkpoint.names)} tensors, " in line for line in lines[:2])
    assert lines[2].endswith("x read")


def test_a_program_of_five_lines_leaves_nothing_running(checkpoint: Any, assert_gone: Any) -> None:
    program = f"""
import os, ray_streamer
model = ray_streamer.load_sharded({checkpoint.uri!r}, tp=2, address="local")
print(model.run(lambda context: os.getpid()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    pids = json.loads(done.stdout)
    assert len(pids) == 2
    assert_gone(pids)
