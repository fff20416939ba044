"""torch.distributed.checkpoint over this package's reader: the same values as over torch's own, each byte once per node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from api_support import dcp_tasks
from api_support.processes import RankProcesses
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from ray_streamer.api.rank import load_rank
from ray_streamer.integrations.dcp import StorageReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch.distributed.checkpoint.planner import LoadPlan

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def quartet() -> Iterator[RankProcesses]:
    """Four processes that can be ranks."""
    with RankProcesses(4) as processes:
        yield processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with tensors that no number of ranks divides."""
    folder = tmp_path_factory.mktemp("dcp")
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in dcp_tasks.WHOLE.items()} | {"half": torch.randn(12, 20)}
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, folder / "model-00002-of-00002.safetensors")
    return folder


def num_bytes(folder: Path) -> int:
    """Bytes of all tensors and headers."""
    return sum(path.stat().st_size for path in folder.iterdir())


def test_four_ranks_get_what_torchs_reader_gives(
    quartet: RankProcesses, folder: Path, s3_server: Any, tmp_path: Path
) -> None:
    uri = s3_server.upload_folder(str(folder), "dcp-bucket")
    for rank in range(4):
        arguments: dict[str, Any] = {"folder": str(folder), "uri": uri, "store": str(tmp_path / "store")}
        environment = s3_server.environment() | {"RAY_STREAMER_PAGE_CACHE": "off"}
        quartet.order(rank, dcp_tasks.load_everyhow, environment=environment, rank=rank, world_size=4, **arguments)
    answers = [quartet.answer(rank) for rank in range(4)]
    for answer in answers:
        assert answer.wrong == {case: [] for case in ("disk", "s3", "id", "group", "no_dist")}
    for case in ("disk", "s3", "id"):
        assert 0 < sum(answer.bytes_read[case] for answer in answers) <= num_bytes(folder)


def test_what_cannot_be_loaded_is_named_on_every_rank(quartet: RankProcesses, folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    save_file({"whole": torch.ones(33)}, shards / "a.safetensors", {"DCP_SHARDING_INFO": "{}"})
    arguments = {"folder": str(folder), "shards": str(shards), "store": str(tmp_path / "store")}
    told = quartet.run(dcp_tasks.load_wrongly, [{"rank": rank, "world_size": 4, **arguments} for rank in range(4)])
    for words in told:
        assert len(words) == 5
        assert "not there" in words[0]
        assert "nothing.safetensors" in words[1]
        assert "checkpoint_id" in words[2]
        assert "enable_consolidation" in words[3]
        # Of one rank alone: the others wait for it no longer than it takes to say so.
        assert "'whole': the plan reads a box of (33,) into memory of (32,)" in words[4]
        assert "StartupTimeoutError" not in words[4]


def load_alone(folder: Path, state_dict: dict[str, torch.Tensor], reader: Any = None, planner: Any = None) -> None:
    dcp.load(state_dict, storage_reader=reader or StorageReader(folder), planner=planner, no_dist=True)


def test_one_memory_under_two_names_holds_what_torchs_reader_leaves_there(tmp_path: Path) -> None:
    save_file({"embed": torch.ones(4, 3), "head": torch.full((4, 3), 2.0)}, tmp_path / "model.safetensors")
    for names in (("embed", "head"), ("head", "embed")):
        found = []
        for reader in (HuggingFaceStorageReader(str(tmp_path)), StorageReader(tmp_path)):
            tied = torch.zeros(4, 3)
            load_alone(tmp_path, dict.fromkeys(names, tied), reader)
            found.append(tied)
        assert torch.equal(*found)


def test_memory_that_two_tensors_share_in_part_is_refused(tmp_path: Path) -> None:
    save_file({"one": torch.ones(4, 3), "other": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    memory = torch.zeros(5, 3)
    with pytest.raises(CheckpointException, match="share memory"):
        load_alone(tmp_path, {"one": memory[:4], "other": memory[1:]})
    assert not memory.any()


def test_memory_that_a_planner_carries_each_tensor_on_from_is_refused(tmp_path: Path) -> None:
    class Staged(DefaultLoadPlanner):
        memory = torch.zeros(4, 3)

        def resolve_tensor(self, read_item: Any) -> torch.Tensor:
            return self.memory

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            super().resolve_tensor(read_item).copy_(tensor)

    save_file({"one": torch.ones(4, 3), "other": torch.full((4, 3), 2.0)}, tmp_path / "model.safetensors")
    one, other = torch.zeros(4, 3), torch.zeros(4, 3)
    with pytest.raises(CheckpointException, match="share memory"):
        load_alone(tmp_path, {"one": one, "other": other}, planner=Staged())
    load_alone(tmp_path, {"other": other}, planner=Staged())
    assert other.unique().tolist() == [2.0]


def test_a_checkpoint_that_was_replaced_after_the_plan_is_refused(tmp_path: Path) -> None:
    class Late(DefaultLoadPlanner):
        def finish_plan(self, new_plan: Any) -> Any:
            save_file({"w": torch.full((4, 3), 2.0)}, tmp_path / "model.safetensors")
            return new_plan

    save_file({"w": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    target = torch.zeros(4, 3)
    with pytest.raises(CheckpointException, match="was replaced or written to"):
        load_alone(tmp_path, {"w": target}, planner=Late())
    assert not target.any()


def test_a_rank_that_saw_other_shapes_than_the_coordinator_is_told(tmp_path: Path) -> None:
    class Rank(StorageReader):
        def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
            save_file({"w": torch.ones(6, 3)}, tmp_path / "model.safetensors")
            return StorageReader(tmp_path).prepare_global_plan(plans)

    save_file({"w": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    target = torch.zeros(4, 3)
    with pytest.raises(
        CheckpointException, match=r"has shape \(4, 3\) for this rank, and \(6, 3\) for the coordinator"
    ):
        load_alone(tmp_path, {"w": target}, reader=Rank(tmp_path))
    assert not target.any()


def test_a_rank_that_reads_alone_asks_for_headers_once(tmp_path: Path, s3_credentials: Any) -> None:
    if s3_credentials.kind != "rgw":
        pytest.skip("only RADOS Gateway counts requests")
    save_file({"w": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    uri = s3_credentials.upload_folder(tmp_path, "dcp-requests")
    counts = []
    for load in (
        lambda: load_rank(uri, rank=0, world_size=1),
        lambda: load_alone(tmp_path, {"w": torch.zeros(4, 3)}, StorageReader(uri)),
    ):
        before = s3_credentials.requests()
        load()
        counts.append(s3_credentials.requests() - before)
    assert counts[0] == counts[1]


def test_a_dtype_that_safetensors_lacks_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointException, match="'w' is float32, and cannot be loaded as complex128"):
        load_alone(tmp_path, {"w": torch.zeros(4, dtype=torch.complex128)})


def test_what_may_be_a_checkpoint_id() -> None:
    assert StorageReader.validate_checkpoint_id("s3://bucket/llama")
    assert StorageReader.validate_checkpoint_id("/models/llama")
    assert not StorageReader.validate_checkpoint_id("ftp://host/llama")
