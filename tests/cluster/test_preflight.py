"""What the driver sees before anything starts, and whether it counts for the ranks."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any

import pytest

import ray_streamer
from ray_streamer.api.arguments import Sharding
from ray_streamer.cluster import preflight
from ray_streamer.cluster.preflight import Preflight
from ray_streamer.errors import (
    AccessError,
    BudgetError,
    HeaderError,
    ObjectMissingError,
    RankFailedError,
    RayStreamerError,
    ShardingError,
)
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

LAYOUT = llama_layout(64, 1, 4, 2, 128, 100)


@pytest.fixture(autouse=True)
def much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is seen here does not depend on how busy the machine is."""
    for name in ("_HEAD_START_SECONDS", "_PATIENCE_SECONDS"):
        monkeypatch.setattr(preflight, name, 60.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "llama", LAYOUT.tensors, config=LAYOUT.config)


def look(uri: Any, tp: int = 2, **arguments: Any) -> Preflight:
    settings = ray_streamer.Settings.resolve(**arguments.pop("settings", {}))
    request = Sharding(tp=tp, **arguments).request(uri, settings=settings, device="cpu")
    return Preflight(request)


def test_a_sound_checkpoint_gives_its_index_to_ranks_that_see_the_same(folder: Path) -> None:
    seen = look(folder)
    seen.check_request()
    index = seen.check(is_one_machine=True, is_own_environment=True)
    assert index is not None
    assert len(index) == len(LAYOUT.tensors)
    assert seen.check(is_one_machine=False, is_own_environment=True) is None
    assert seen.check(is_one_machine=True, is_own_environment=False) is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        pytest.param({"tp": 3}, ShardingError, id="tp-that-does-not-divide"),
        pytest.param({"rules": {"nothing.*": ray_streamer.Skip()}}, ShardingError, id="rule-without-a-tensor"),
        pytest.param({"settings": {"node_memory_limit": 5000}}, BudgetError, id="too-little-memory"),
    ],
)
def test_a_fault_of_the_request_is_told_wherever_the_ranks_are(
    folder: Path, arguments: dict[str, Any], error: type[RayStreamerError]
) -> None:
    seen = look(folder, **arguments)
    with pytest.raises(error):
        seen.check_request()
    with pytest.raises(error):
        seen.check(is_one_machine=False, is_own_environment=False)


def broken(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    return folder


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        pytest.param(lambda folder: folder / "not", ObjectMissingError, id="no-such-path"),
        pytest.param(broken, HeaderError, id="malformed"),
    ],
)
def test_a_local_fault_counts_on_one_machine_and_is_a_warning_on_several(
    folder: Path, spoil: Any, error: type[RayStreamerError], caplog: pytest.LogCaptureFixture
) -> None:
    seen = look(spoil(folder))
    seen.check_request()
    with pytest.raises(error):
        seen.check(is_one_machine=True, is_own_environment=True)
    with caplog.at_level(logging.INFO, "ray_streamer"):
        assert seen.check(is_one_machine=False, is_own_environment=True) is None
    (record,) = [record for record in caplog.records if "look for themselves" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert str(folder) in record.getMessage()


def test_an_object_store_is_seen_alike_by_all_who_have_one_environment(s3_credentials: Any, folder: Path) -> None:
    uri = s3_credentials.upload_folder(folder, "preflight", "llama")
    assert look(uri).check(is_one_machine=False, is_own_environment=True) is not None
    assert look(uri).check(is_one_machine=False, is_own_environment=False) is None
    with pytest.raises(ObjectMissingError):
        look(f"{uri}-not").check(is_one_machine=False, is_own_environment=True)
    assert look(f"{uri}-not").check(is_one_machine=True, is_own_environment=False) is None


def test_a_driver_without_credentials_knows_nothing(s3_server: Any, folder: Path) -> None:
    uri = s3_server.upload_folder(folder, "preflight-closed", "llama")
    seen = look(uri, settings={"s3_endpoint_url": s3_server.endpoint_url})
    assert seen.check(is_one_machine=True, is_own_environment=True) is None
    assert seen.check(is_one_machine=True, is_own_environment=False, is_own_ray=True) is None
    with pytest.raises(AccessError, match="no AWS credentials"):
        seen.check(is_one_machine=True, is_own_environment=True, is_own_ray=True)


def test_slices_of_the_callers_own_that_need_the_ranks_are_left_to_them(folder: Path) -> None:
    def needs_more(index: Any, mesh: Any) -> Any:
        raise ImportError("no such engine here")

    seen = look(folder, slices=needs_more)
    seen.check_request()
    assert seen.check(is_one_machine=True, is_own_environment=True) is None


@pytest.mark.parametrize("uri", ["/modles/llama", "file:///modles/llama", "~/no/such/model", "s3a://bucket/model"])
def test_a_bad_path_shows_the_callers_line_and_the_sentence_last(uri: str) -> None:
    with pytest.raises(RayStreamerError) as caught:
        ray_streamer.load_sharded(uri, tp=2, address="local")
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert len(frames) == 2  # this one, and the one that raises
    shown = traceback.format_exception(caught.value)
    assert len("".join(shown).splitlines()) < 12
    assert shown[-1].startswith(f"{type(caught.value).__module__}.{type(caught.value).__name__}: ")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_few_frames_keep_a_cause_that_nobody_foresaw() -> None:
    from ray_streamer.api.frames import with_few_frames

    bug = ZeroDivisionError("mine")

    @with_few_frames
    def fail(cause: BaseException) -> None:
        raise RankFailedError(3, "here", cause) from cause

    with pytest.raises(RankFailedError) as caught:
        fail(bug)
    assert caught.value.__cause__ is bug
    with pytest.raises(RankFailedError) as caught:
        fail(ObjectMissingError("no such file"))
    assert caught.value.__cause__ is None
    assert type(caught.value.cause) is ObjectMissingError
