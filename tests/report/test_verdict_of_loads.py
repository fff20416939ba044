"""Real loads through a proxy that makes one thing slow: the verdict names it."""

from __future__ import annotations

import pytest
import torch  # noqa: F401  # imported by the first load, it would be what bounds that load

from ray_streamer.cluster.worker import LoadWorker
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.exchange.place import Place
from ray_streamer.rank.agreement import MemoryTerms
from ray_streamer.rank.request import LoadRequest
from ray_streamer.report.verdict.judge import judge
from ray_streamer.report.verdict.model import RequestedSettings
from ray_streamer.settings import Settings
from ray_streamer.sharding import Mesh, RuleSlices, ShardRules, Split
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint
from ray_streamer.testing.faults import Fault, FaultProxy

BLOCK = 256 << 10
NUM_BLOCKS = 12
NUM_TRIES = 5
"""A machine that has other work may be what bounds a load; the verdict is right then, too."""


@pytest.fixture(scope="module")
def uri(s3_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdict")
    write_checkpoint(folder, [TensorSpec("up_proj.weight", "F32", (NUM_BLOCKS * 64, BLOCK // 256))])
    (file,) = folder.glob("*.safetensors")
    return f"{s3_server.upload_folder(folder, 'verdicts', 'model')}/{file.name}"


@pytest.fixture
def proxy(s3_credentials):
    with FaultProxy(s3_credentials.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def verdict_on(uri, proxy, tmp_path):
    """Loads as the only rank of its node, again if something else bounded the load, and judges."""

    def judged(bound, *faults, **asked):
        for _ in range(NUM_TRIES):
            verdict = load_and_judge(*faults, **asked)
            if verdict.bound == bound:
                break
        assert verdict.bound == bound
        return verdict

    def load_and_judge(*faults, dim=0, **settings):
        mesh = Mesh(tp=2)
        asked = Settings.resolve(s3_endpoint_url=proxy.url, block_bytes=BLOCK, **settings)
        slices = RuleSlices(mesh=mesh, rules=ShardRules({"*": Split(dim)}))
        request = LoadRequest(uri=uri, mesh=mesh, slices=slices, settings=asked, device="cpu")
        limit = settings.get("memory_limit", 16 << 20)
        terms = MemoryTerms(limit, request.read_limits((limit,)))
        worker = LoadWorker(0, request)
        timeouts = Timeouts.of(asked)
        place = Place(session=f"verdict-{tmp_path.name}", rank=0, ranks=(0,), node="here", timeouts=timeouts)
        agreed = worker.agree(request, worker.read_index(request), place, terms)
        proxy.forget_faults()
        proxy.fail_next(*faults)
        statistics = worker.load(agreed.agreement)
        trace = worker.trace()
        worker.close()
        return judge([trace], [statistics], RequestedSettings.of(asked))

    return judged


def test_a_server_that_is_slow_to_its_first_byte(verdict_on):
    verdict = verdict_on("first byte", *[Fault(delay_seconds=0.2)] * NUM_BLOCKS, dim=1, concurrency=2)
    assert verdict.advice.settings == {"concurrency": 4}
    assert verdict.advice.seconds < verdict.measured_seconds


def test_a_bandwidth_that_is_capped(verdict_on):
    verdict = verdict_on("max_bandwidth", dim=1, concurrency=4, max_bandwidth=4_000_000)
    assert verdict.advice is None


def test_one_slot(verdict_on):
    verdict = verdict_on("slots", *[Fault(delay_seconds=0.1)] * NUM_BLOCKS, dim=1, concurrency=4, memory_limit=0)
    assert verdict.advice.settings.keys() == {"memory_limit"}
    assert "1 slot for 4 reads in flight" in verdict.text


def test_a_load_whose_tensors_are_read_in_place(verdict_on):
    """Half of the rows, which no slot is needed for."""
    verdict_on("first byte", *[Fault(delay_seconds=0.2)] * NUM_BLOCKS, dim=0, concurrency=2, memory_limit=0)


def test_a_store_that_refuses_some_requests(verdict_on):
    """Half of the first requests, so that they are what bounds the load on any machine; none at all in the words of the other load."""
    faults = [Fault(status=503), Fault(), Fault(status=503), Fault(status=503)] * 4
    verdict = verdict_on("throttling", *faults, dim=1, concurrency=2)
    assert "12 answers to slow down" in verdict.text
    assert "spread the files over more prefixes" in verdict.text
    calm = verdict_on("first byte", *[Fault(delay_seconds=0.05)] * NUM_BLOCKS, dim=1, concurrency=2)
    assert "slow down" not in calm.text
