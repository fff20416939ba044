"""Many small tensors or files do not become as many requests, and the plan knows beforehand how many there will be."""

from __future__ import annotations

import itertools
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors import safe_open

import ray_streamer
from ray_streamer import Settings, Split
from ray_streamer.planning.summary import summarize
from ray_streamer.testing.checkpoints import write_checkpoint

_numbers = itertools.count()


@pytest.mark.parametrize(
    ("num_tensors", "num_files", "num_header_requests", "num_body_requests"),
    [
        # A header of so many tensors is longer than the first read of its file.
        pytest.param(6000, 2, 4, 2, id="small-tensors"),
        pytest.param(60, 60, 60, 60, id="small-files"),
    ],
)
def test_the_server_sees_the_requests_of_the_plan(
    s3_server: Any, tmp_path: Any, num_tensors: int, num_files: int, num_header_requests: int, num_body_requests: int
) -> None:
    if s3_server.kind != "rgw":
        pytest.skip("only RADOS Gateway counts what it is asked")
    tensors = [(f"model.experts.{number}.weight", "BF16", (8, 16)) for number in range(num_tensors)]
    write_checkpoint(tmp_path, tensors, num_files=num_files, config={"model_type": "experts"})
    uri = s3_server.upload_folder(tmp_path, f"request-counts-{next(_numbers)}")
    settings = Settings.resolve(
        s3_endpoint_url=s3_server.endpoint_url,
        s3_access_key_id=s3_server.access_key,
        s3_secret_access_key=s3_server.secret_key,
        memory_limit="8MiB",
        concurrency=4,
    )
    arguments = {"rules": {"*.weight": Split(1)}, "settings": settings}
    before = s3_server.requests()
    plan = ray_streamer.plan(uri, 2, **arguments)
    num_opening_requests = s3_server.requests() - before
    # Beside headers: the index json and config.json.
    assert num_opening_requests == num_header_requests + 2
    assert summarize(plan).requests == num_body_requests
    session = secrets.token_hex(8)

    def load(rank: int) -> dict[str, torch.Tensor]:
        return ray_streamer.load_rank(uri, rank=rank, world_size=2, session=session, **arguments)

    before = s3_server.requests()
    with ThreadPoolExecutor(2) as ranks:
        loaded = list(ranks.map(load, range(2)))
    # The first rank of the node reads the headers for both.
    assert s3_server.requests() - before == num_body_requests + num_opening_requests
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                halves = torch.cat([tensors[name] for tensors in loaded], dim=1)
                assert halves.view(torch.uint8).equal(file.get_tensor(name).view(torch.uint8)), name
