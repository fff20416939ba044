"""A whole load over a network that fails: every byte is right or the right error is raised, and nothing is left behind."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from api_support import oracle

import ray_streamer
from ray_streamer.errors import CredentialsError, ObjectChangedError, StorageError
from ray_streamer.report.load_report import LoadReport
from ray_streamer.report.tables import print_load
from ray_streamer.storage import lateness
from ray_streamer.testing.faults import Fault, FaultProxy
from ray_streamer.testing.possessions import package_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_streamer.rank.statistics import RankStatistics

NUM_FAULTS = 8
_numbers = itertools.count()


@pytest.fixture
def proxy(s3_server: Any) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def uri(checkpoint: Any, s3_credentials: Any, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """The small checkpoint behind the proxy; what is late is known at once."""
    monkeypatch.setattr(lateness, "_UNTIL_KNOWN_SECONDS", 0.2)
    monkeypatch.setattr(lateness, "_SEGMENT_NOT_BEFORE_SECONDS", 0.2)
    monkeypatch.setattr(lateness, "_FIRST_CREDIT", 1000.0)
    monkeypatch.setattr(lateness, "_LARGEST_CREDIT", 1000.0)
    return s3_credentials.upload_folder(checkpoint.folder, "faults", f"model-{next(_numbers)}")


def load(uri: str, proxy: FaultProxy, *, hedge_percent: float = 5, **arguments: Any) -> dict[str, Any]:
    settings = ray_streamer.Settings(
        s3_endpoint_url=proxy.url,
        concurrency=4,
        block_bytes=64 << 10,
        memory_limit=1 << 20,
        hedge_percent=hedge_percent,
        retry_deadline_seconds=20,
    )
    return ray_streamer.load_rank(uri, rank=0, world_size=1, settings=settings, **arguments)


def spread(fault: Fault) -> list[Fault]:
    """One in five requests, none of the first ones, which are for headers."""
    return [Fault()] * 5 + [*[Fault()] * 4, fault] * NUM_FAULTS


def assert_nothing_is_left(proxy: FaultProxy) -> None:
    assert package_threads() == []
    port = int(proxy.url.rpartition(":")[2])
    connections = psutil.Process().net_connections("tcp")
    assert [
        each for each in connections if each.raddr and each.raddr.port == port and each.status == "ESTABLISHED"
    ] == []
    proxy.forget_faults()
    proxy.wait_until_left()


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        pytest.param(Fault(status=503), "num_throttled", id="slow-down"),
        pytest.param(Fault(status=500, code="InternalError"), "num_retries", id="internal-error"),
        pytest.param(Fault(body_bytes=20_000, end="reset"), "num_retries", id="reset"),
        pytest.param(Fault(body_bytes=20_000), "num_retries", id="truncated"),
        pytest.param(Fault(is_mute=True), "num_hedges", id="never-answered"),
        pytest.param(Fault(body_bytes=20_000, end="stall"), "num_cuts", id="stalled"),
    ],
)
def test_every_byte_is_right(uri: str, checkpoint: Any, proxy: FaultProxy, fault: Fault, counted: str) -> None:
    told: list[RankStatistics] = []
    proxy.fail_next(*spread(fault))
    loaded = load(uri, proxy, on_statistics=told.append)
    assert oracle.faults(loaded, checkpoint.folder) == []
    (statistics,) = told
    assert proxy.num_faults == NUM_FAULTS
    # Some do no harm: a body may be shorter than what is passed on of it, and the other request of a race may win.
    assert getattr(statistics.storage, counted) >= NUM_FAULTS // 2
    assert_nothing_is_left(proxy)


@pytest.mark.parametrize(
    ("fault", "error_class"),
    [
        pytest.param(Fault(status=403, code="ExpiredToken"), CredentialsError, id="expired"),
        pytest.param(Fault(status=200), StorageError, id="ranges-ignored"),
        pytest.param(Fault(headers=(("content-length", "7"),), body_bytes=7), StorageError, id="another-length"),
        pytest.param(Fault(headers=(("etag", '"another"'),)), ObjectChangedError, id="another-object"),
    ],
)
def test_the_right_error(uri: str, proxy: FaultProxy, fault: Fault, error_class: type[StorageError]) -> None:
    proxy.fail_next(*[Fault()] * 15, *[fault] * 1000)
    with pytest.raises(StorageError, match=r"s3://faults/model-.*\[\d+, \d+\)") as caught:
        load(uri, proxy)
    assert type(caught.value) is error_class
    assert_nothing_is_left(proxy)


def test_an_object_that_is_replaced_in_the_middle(
    uri: str, checkpoint: Any, proxy: FaultProxy, s3_credentials: Any
) -> None:
    replaced = sorted(checkpoint.folder.glob("*.safetensors"))[-1]
    # All four readers wait until the object is another one.
    proxy.fail_next(*[Fault()] * 10, *[Fault(body_bytes=1000, end="stall")] * 4)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            load(uri, proxy, hedge_percent=0)
        except StorageError as error:
            errors.append(error)

    loading = threading.Thread(target=run)
    loading.start()
    proxy.wait_until_stalled(4)
    client = s3_credentials.client()
    prefix = uri.removeprefix("s3://faults/")
    client.put_object(Bucket="faults", Key=f"{prefix}/{replaced.name}", Body=bytes(replaced.stat().st_size))
    client.close()
    proxy.drop_connections()
    loading.join(60)
    assert [type(error) for error in errors] == [ObjectChangedError]
    assert_nothing_is_left(proxy)


def test_credentials_that_expire_in_the_middle(uri: str, checkpoint: Any, proxy: FaultProxy) -> None:
    proxy.fail_next(*[Fault()] * 10, Fault(status=400, code="ExpiredToken"))
    assert oracle.faults(load(uri, proxy), checkpoint.folder) == []
    assert_nothing_is_left(proxy)


def test_the_report_tells(uri: str, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[RankStatistics] = []
    proxy.fail_next(*[Fault()] * 5, Fault(status=503), Fault(status=500, code="InternalError"))
    load(uri, proxy, hedge_percent=0, on_statistics=told.append)
    report = LoadReport(
        uri=uri,
        mesh={"tp": 2},
        seconds={"load": 1.0, "total": 1.0},
        checkpoint_bytes=1,
        needed_bytes=1,
        plan_hash="0",
        nodes=("a", "b"),
        ranks=(told[0], told[0]),
    )
    assert (report.storage.num_retries, report.storage.num_throttled) == (4, 2)
    assert report.as_dict()["storage"]["num_retries"] == 4
    assert report.as_dict()["ranks"][1]["storage"]["num_retries"] == 2
    print_load(report)
    assert "On the way: 4 retries, 2 answers to slow down" in capsys.readouterr().out
