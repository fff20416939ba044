"""Ranks that are to hold a model of transformers, and do not find each other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from ray_streamer.errors import StartupTimeoutError
from ray_streamer.integrations.transformers.worker import ModelWorker
from ray_streamer.rank.request import LoadRequest
from ray_streamer.settings import Settings
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.source import RuleSlices

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def environment() -> Iterator[None]:
    """What a rank says of itself to torch is gone afterwards."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if dist.is_initialized():
        dist.destroy_process_group()


def worker_of(rank: int) -> ModelWorker:
    settings = Settings.resolve(startup_timeout_seconds=1)
    return ModelWorker(
        rank, LoadRequest(uri="/models/a", mesh=Mesh(tp=2), slices=RuleSlices(), settings=settings, device="cpu")
    )


def test_nobody_is_where_the_ranks_were_to_meet(environment: None, dead_port: int) -> None:
    with pytest.raises(StartupTimeoutError, match=r"rank 1 of 2 could not meet .* startup_timeout_seconds=1: "):
        worker_of(1).meet("127.0.0.1", dead_port)


def test_the_first_rank_does_not_wait_for_ever(environment: None) -> None:
    first = worker_of(0)
    port = first.open_meeting("127.0.0.1")
    with pytest.raises(StartupTimeoutError, match=rf"rank 0 of 2 could not meet .* 127\.0\.0\.1 port {port}, "):
        first.meet("127.0.0.1", port)
