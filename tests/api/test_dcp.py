"""torch.distributed.checkpoint over this package's reader: the same values as over torch's own, each byte once per node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from api_support import dcp_tasks
from api_support.processes import RankProcesses
from safetensors.torch import save_file

from ray_streamer.integrations.dcp import StorageReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
        assert len(words) == 4
        assert "not there" in words[0]
        assert "nothing.safetensors" in words[1]
        assert "checkpoint_id" in words[2]
        assert "enable_consolidation" in words[3]


def test_what_may_be_a_checkpoint_id() -> None:
    assert StorageReader.validate_checkpoint_id("s3://bucket/llama")
    assert StorageReader.validate_checkpoint_id("/models/llama")
    assert not StorageReader.validate_checkpoint_id("ftp://host/llama")
