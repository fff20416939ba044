"""What a request hands to storage: ranks that read at the same time share their node's bandwidth."""

from __future__ import annotations

import pytest

from ray_streamer.rank import request as request_module
from ray_streamer.rank.request import LoadRequest
from ray_streamer.settings import Settings
from ray_streamer.sharding.mesh import Mesh
from ray_streamer.sharding.source import RuleSlices


@pytest.mark.parametrize(
    ("max_bandwidth", "num_sharers", "share"),
    [(None, 4, None), ("1GB", 1, 1_000_000_000), ("1GB", 4, 250_000_000), (3, 4, 1)],
)
def test_bandwidth_is_shared(monkeypatch, max_bandwidth, num_sharers, share):
    opened = []
    monkeypatch.setattr(request_module, "open_storage", lambda uri, settings: opened.append((uri, settings)))
    settings = Settings.resolve(max_bandwidth=max_bandwidth, s3_access_key_id="id", s3_secret_access_key="secret")
    request = LoadRequest(uri="s3://bucket/a", mesh=Mesh(tp=4), slices=RuleSlices(), settings=settings, device="cpu")
    request.open_storage(num_sharers=num_sharers)
    ((uri, given),) = opened
    assert (uri, given.max_bandwidth) == ("s3://bucket/a", share)
    assert given.s3_secret_access_key.get_secret_value() == "secret"
    assert settings.max_bandwidth == Settings.resolve(max_bandwidth=max_bandwidth).max_bandwidth
