"""Bad input: each kind has an error class of its own, and its message says what, where and what to do."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

import ray_streamer
from ray_streamer import PlacementOptions, Replicate, Settings, ShardRules, Split
from ray_streamer.errors import (
    AccessError,
    BudgetError,
    CheckpointError,
    ClusterError,
    CredentialsError,
    DeviceError,
    HeaderError,
    IndexMismatchError,
    ObjectMissingError,
    PlanError,
    RayStreamerError,
    SettingsError,
    ShardingError,
    StorageError,
)
from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.faults import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILE_2 = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leave_only_config(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def truncate(folder: Path) -> None:
    content = (folder / FILE_2).read_bytes()
    (folder / FILE_2).write_bytes(content[:-1])


def lead_out_of_the_folder(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {"model.norm.weight": "../../etc/passwd.safetensors"})


def forget_a_tensor(folder: Path) -> None:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    edit_json(folder / INDEX, weight_map=weight_map)


def garble_a_header(folder: Path) -> None:
    content = bytearray((folder / FILE_2).read_bytes())
    content[8:10] = b"[]"
    (folder / FILE_2).write_bytes(content)


@pytest.mark.parametrize(
    ("tamper", "error_class", "says"),
    [
        pytest.param(shutil.rmtree, ObjectMissingError, ["checkpoint", "check the path"], id="no-such-path"),
        pytest.param(
            lambda folder: [path.unlink() for path in folder.iterdir()],
            ObjectMissingError,
            ["nothing is there", INDEX, "check the path"],
            id="empty-folder",
        ),
        pytest.param(leave_only_config, CheckpointError, ["found only config.json"], id="no-checkpoint-in-the-folder"),
        pytest.param(
            lambda folder: (folder / FILE_2).unlink(),
            ObjectMissingError,
            [INDEX, "names 3 files, of which 1 does not exist", FILE_2],
            id="missing-file-of-an-index",
        ),
        pytest.param(truncate, HeaderError, [FILE_2, "truncated"], id="truncated-file"),
        pytest.param(garble_a_header, HeaderError, [FILE_2, "JSON"], id="garbled-header"),
        pytest.param(
            lead_out_of_the_folder,
            CheckpointError,
            [INDEX, "../../etc/passwd.safetensors", "without empty or '..' components"],
            id="path-traversal-in-an-index",
        ),
    ],
)
def test_a_checkpoint_that_is_not_what_it_should_be(
    checkpoint: Any, tmp_path: Path, tamper: Callable[[Path], None], error_class: type[Exception], says: list[str]
) -> None:
    folder = shutil.copytree(checkpoint.folder, tmp_path / "checkpoint")
    tamper(folder)
    with pytest.raises(RayStreamerError) as caught:
        ray_streamer.plan(str(folder), tp=2)
    expect(caught.value, error_class, [str(folder), *says])


def test_an_index_of_another_version(checkpoint: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(checkpoint.folder, tmp_path / "checkpoint")
    forget_a_tensor(folder)
    strict = ray_streamer.Settings.resolve(strict_index=True)
    with pytest.raises(IndexMismatchError) as caught:
        ray_streamer.plan(str(folder), tp=2, settings=strict)
    expect(caught.value, IndexMismatchError, [str(folder), INDEX, "model.norm.weight", "1 tensor is not in the index"])
    # Headers have it, so it is loaded, and that is told once.
    assert "model.norm.weight" in ray_streamer.plan(str(folder), tp=2).index.names
    assert caplog.text.count("model.norm.weight") == 1


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        pytest.param(
            lambda folder: edit_json(folder / "config.json", model_type="mamba"),
            ["'mamba'", "known are", "llama", "Give rules of your own"],
            id="unknown-model-type",
        ),
        pytest.param(
            lambda folder: (folder / "config.json").unlink(),
            ["model type None", "Give rules of your own"],
            id="no-config",
        ),
        pytest.param(
            lambda folder: edit_json(folder / "config.json", num_attention_heads=None),
            ["num_attention_heads", "None"],
            id="config-without-a-size",
        ),
    ],
)
def test_a_config_that_gives_no_rules(
    checkpoint: Any, tmp_path: Path, tamper: Callable[[Path], None], says: list[str]
) -> None:
    folder = shutil.copytree(checkpoint.folder, tmp_path / "checkpoint")
    tamper(folder)
    with pytest.raises(RayStreamerError) as caught:
        ray_streamer.plan(str(folder), tp=2)
    expect(caught.value, ShardingError, says)


def expect(error: BaseException, error_class: type[Exception], says: list[str]) -> None:
    assert type(error) is error_class, repr(error)
    for text in says:
        assert text in str(error), str(error)


@pytest.mark.parametrize(
    ("arguments", "error_class", "says"),
    [
        pytest.param(
            {"tp": 3},
            ShardingError,
            ["cannot be split over tp=3", "q_proj.weight", "tp that works for every tensor: 1, 2, 4, 8"],
            id="tp",
        ),
        pytest.param({"tp": 0}, SettingsError, ["tp", "0"], id="tp-zero"),
        pytest.param({"tp": 2.0}, SettingsError, ["tp", "2.0"], id="tp-not-a-whole-number"),
        pytest.param({"tp": 2, "replicas": 0}, SettingsError, ["dp", "0"], id="no-replicas"),
        pytest.param({"tp": 2, "num_nodes": 4}, PlanError, ["2 ranks", "4 nodes"], id="more-nodes-than-ranks"),
        pytest.param(
            {"tp": 2, "rules": {"*.typo": Split(0)}},
            ShardingError,
            ["'*.typo'", "matches"],
            id="rule-that-matches-nothing",
        ),
        pytest.param({"rules": "*.weight"}, ShardingError, ["'*.weight'"], id="rules-of-the-wrong-type"),
        pytest.param(
            {"rules": {"*": 0}}, ShardingError, ["'*'", "Split(0)", "got 0"], id="placement-of-the-wrong-type"
        ),
        pytest.param({"rules": 7}, ShardingError, ["got 7"], id="rules-that-are-a-number"),
        pytest.param(
            {"rules": {"*": Replicate()}, "slices": lambda index, mesh: None},
            SettingsError,
            ["rules or slices, not both"],
            id="rules-and-slices",
        ),
        pytest.param(
            {"unmatched": "ignore"}, SettingsError, ["error, replicate", "'ignore'"], id="unmatched-of-no-kind"
        ),
        pytest.param(
            {"layout": "megatron"},
            SettingsError,
            ["layout is one of generic, transformers, vllm", "'megatron'"],
            id="layout-of-no-kind",
        ),
        pytest.param(
            {"layout": "vllm", "slices": lambda index, mesh: None},
            SettingsError,
            ["layout='vllm'", "choose a preset", "slices need none"],
            id="layout-and-slices",
        ),
    ],
)
def test_an_argument_that_cannot_be(
    checkpoint: Any, arguments: dict[str, Any], error_class: type[Exception], says: list[str]
) -> None:
    with pytest.raises(RayStreamerError) as caught:
        ray_streamer.plan(checkpoint.uri, **arguments)
    expect(caught.value, error_class, says)


def test_a_uri_that_names_nothing(checkpoint: Any) -> None:
    for uri, says in (
        (f"{checkpoint.uri}/nothing.safetensors", ["nothing.safetensors", "check the path"]),
        (f"{checkpoint.uri}/nothing.json", ["nothing.json"]),
    ):
        with pytest.raises(RayStreamerError) as caught:
            ray_streamer.plan(uri)
        expect(caught.value, ObjectMissingError, says)
    for uri in ("", "gopher://bucket/model", "s3://", "file://otherhost/model"):
        with pytest.raises(SettingsError):
            ray_streamer.plan(uri)


def test_tensors_without_a_rule_are_listed_with_the_way_out(checkpoint: Any, tmp_path: Path) -> None:
    tensors = [
        ("model.norm.weight", "F32", (4,)),
        ("model.memory.slots", "F32", (8, 4)),
        ("other.table", "F32", (8, 4)),
    ]
    config = json.loads((checkpoint.folder / "config.json").read_text())
    folder = write_checkpoint(tmp_path, tensors, config=config)
    with pytest.raises(ShardingError) as caught:
        ray_streamer.plan(str(folder), tp=2)
    for text in ("model.memory.slots", "other.table", "rules=", 'unmatched="replicate"'):
        assert text in str(caught.value)
    assert "model.norm.weight" not in str(caught.value)
    assert ray_streamer.plan(str(folder), tp=2, unmatched="replicate")
    assert ray_streamer.plan(str(folder), tp=2, rules=ShardRules({"*.slots": Split(0), "*.table": Split(1)}))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param({"concurrency": 0}, ["concurrency=0", "greater than or equal to 1"], id="no-reads"),
        pytest.param({"concurrency": "many"}, ["concurrency='many'"], id="no-number"),
        pytest.param({"memory_limit": "much"}, ["memory_limit='much'"], id="no-size"),
        pytest.param({"memory_limit": -2}, ["memory_limit=-2"], id="negative-limit"),
        pytest.param({"node_memory_limit": -1}, ["node_memory_limit=-1"], id="negative-node-limit"),
    ],
)
def test_a_setting_that_cannot_be(checkpoint: Any, arguments: dict[str, Any], says: list[str], no_ray: None) -> None:
    with pytest.raises(SettingsError) as caught:
        ray_streamer.load_sharded(checkpoint.uri, tp=2, **arguments)
    expect(caught.value, SettingsError, says)


@pytest.mark.parametrize(
    ("name", "value"),
    [("CONCURRENCY", "many"), ("MEMORY_LIMIT", "lots"), ("PAGE_CACHE", "sometimes"), ("BLOCK_BYTES", "5000")],
)
def test_an_environment_variable_that_cannot_be(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, no_ray: None
) -> None:
    monkeypatch.setenv(f"RAY_STREAMER_{name}", value)
    for call in (ray_streamer.load_sharded, ray_streamer.load_rank, ray_streamer.plan):
        with pytest.raises(SettingsError, match=f"environment variable RAY_STREAMER_{name}='{value}'"):
            call(checkpoint.uri)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for Ray fails the test."""

    def connect(*_: object, **__: object) -> NoReturn:
        pytest.fail("Ray was asked for")

    monkeypatch.setattr("ray_streamer.cluster.driver.connect", connect)


@pytest.mark.parametrize(
    ("arguments", "error_class", "says"),
    [
        pytest.param(
            {"memory_limit": "100KiB"},
            BudgetError,
            ["memory_limit of 100 KiB", "smallest that works is 256 KiB"],
            id="memory-limit-too-small",
        ),
        pytest.param({"device": "tpu"}, DeviceError, ["'tpu'", 'device="cpu"'], id="device"),
        pytest.param({"tp": 0}, SettingsError, ["tp"], id="tp-zero"),
        pytest.param({"rules": 7}, ShardingError, ["got 7"], id="rules"),
        pytest.param(
            {"rules": {"*": Replicate()}, "slices": print}, SettingsError, ["not both"], id="rules-and-slices"
        ),
    ],
)
def test_what_is_refused_before_ray_is_asked_for(
    checkpoint: Any, no_ray: None, arguments: dict[str, Any], error_class: type[Exception], says: list[str]
) -> None:
    with pytest.raises(RayStreamerError) as caught:
        ray_streamer.load_sharded(checkpoint.uri, **{"tp": 2} | arguments)
    expect(caught.value, error_class, says)


def test_a_node_memory_limit_that_is_too_small_names_the_smallest(checkpoint: Any) -> None:
    settings = Settings(node_memory_limit=300 << 10)
    with pytest.raises(BudgetError, match=r"smallest that works is 256 KiB per rank"):
        ray_streamer.plan(checkpoint.uri, tp=2, settings=settings)
    assert ray_streamer.plan(checkpoint.uri, tp=2, settings=Settings(node_memory_limit=512 << 10))


class TestS3:
    """What an S3 server refuses, and what it is never asked for."""

    @pytest.fixture
    def uri(self, checkpoint: Any, s3_server: Any) -> str:
        return s3_server.upload_folder(checkpoint.folder, "bad-input", "model")

    def test_no_credentials(self, uri: str, s3_server: Any) -> None:
        with pytest.raises(AccessError) as caught:
            ray_streamer.plan(uri, settings=Settings(s3_endpoint_url=s3_server.endpoint_url))
        expect(caught.value, CredentialsError, ["AWS_ACCESS_KEY_ID", "s3_unsigned"])

    @pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    def test_wrong_credentials(self, uri: str, s3_credentials: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        if s3_credentials.kind != "rgw":
            pytest.skip("moto takes any credentials")
        monkeypatch.setenv(name, "wrong")
        with pytest.raises(AccessError) as caught:
            ray_streamer.plan(uri)
        expect(caught.value, CredentialsError, [uri, "HTTP 403"])
        assert "wrong" not in str(caught.value)

    def test_missing_bucket(self, s3_credentials: Any) -> None:
        with pytest.raises(
            ObjectMissingError, match=r"no such bucket, .*s3://no-such-bucket-here/model.* check the path"
        ):
            ray_streamer.plan("s3://no-such-bucket-here/model")

    def test_missing_prefix(self, uri: str, s3_credentials: Any) -> None:
        with pytest.raises(ObjectMissingError, match=r"s3://bad-input/other: nothing is there.*bucket and prefix"):
            ray_streamer.plan("s3://bad-input/other")

    def test_wrong_endpoint(self, uri: str, s3_credentials: Any, dead_port: int) -> None:
        endpoint_url = f"http://127.0.0.1:{dead_port}"
        with pytest.raises(StorageError) as caught:
            ray_streamer.plan(uri, settings=Settings(s3_endpoint_url=endpoint_url))
        expect(caught.value, StorageError, [endpoint_url])

    def test_no_tensor_is_asked_for_by_a_load_that_cannot_be(
        self, uri: str, s3_credentials: Any, checkpoint: Any
    ) -> None:
        with FaultProxy(s3_credentials.endpoint_url) as proxy:
            with pytest.raises(ShardingError, match="tp=3"):
                ray_streamer.plan(uri, tp=3, settings=Settings(s3_endpoint_url=proxy.url))
            # One request for each of two json files and three headers, of which only the length is bounded.
            assert len(proxy.ranges) == 5
            assert {byte_range.split("-")[0] for byte_range in proxy.ranges} == {"bytes=0"}


class TestOnRay:
    """The same errors from a worker: they keep their class, and nothing stays behind."""

    pytestmark = pytest.mark.usefixtures("local_ray")

    def test_tp_larger_than_the_cluster_is_refused_at_once(self, checkpoint: Any) -> None:
        with pytest.raises(ClusterError, match=r"8 ranks with CPU 1 each.* cannot fit.*Use a smaller tp"):
            ray_streamer.load_sharded(checkpoint.uri, tp=8)

    def test_no_such_path(self, tmp_path: Path, nothing_left: None) -> None:
        with pytest.raises(RayStreamerError) as caught:
            ray_streamer.load_sharded(str(tmp_path / "nothing"), tp=1)
        expect(caught.value, ObjectMissingError, [str(tmp_path / "nothing"), "check the path"])

    def test_tp_that_does_not_divide(self, checkpoint: Any, nothing_left: None) -> None:
        placement = PlacementOptions(num_cpus_per_rank=0.5)
        with pytest.raises(RayStreamerError) as caught:
            ray_streamer.load_sharded(checkpoint.uri, tp=3, placement=placement)
        expect(caught.value, ShardingError, ["cannot be split over tp=3", "tp that works for every tensor: 1, 2, 4, 8"])

    def test_no_credentials_on_the_node(self, checkpoint: Any, s3_server: Any, nothing_left: None) -> None:
        uri = s3_server.upload_folder(checkpoint.folder, "on-ray")
        environment = {"AWS_ENDPOINT_URL": s3_server.endpoint_url}
        with pytest.raises(RayStreamerError) as caught:
            ray_streamer.load_sharded(uri, placement=PlacementOptions(runtime_env={"env_vars": environment}))
        expect(caught.value, CredentialsError, ["AWS_ACCESS_KEY_ID"])

    def test_a_node_memory_limit_that_is_too_small(self, checkpoint: Any, nothing_left: None) -> None:
        with pytest.raises(BudgetError, match="smallest that works is 256 KiB per rank"):
            ray_streamer.load_sharded(checkpoint.uri, node_memory_limit="100KiB")

    @pytest.fixture
    def nothing_left(self, wait_until: Callable[..., None]) -> Any:
        import ray
        from ray.util.placement_group import placement_group_table

        yield
        wait_until(lambda: ray.available_resources().get("CPU") == 4)
        assert {entry["state"] for entry in placement_group_table().values()} <= {"REMOVED"}
