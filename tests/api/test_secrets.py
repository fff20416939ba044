"""Keys reach the ranks and the store, and nothing else: no plan, report, repr, log, error or line of output."""

from __future__ import annotations

import io
import logging
import pickle
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from click.testing import CliRunner

import ray_streamer
from ray_streamer import PlacementOptions, Settings
from ray_streamer.cli import main
from ray_streamer.errors import AccessError, RayStreamerError, SettingsError
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray_streamer.testing.hostile_store import Asked

WRONG_SECRET = "plantedwrongsecret0123456789"
TOKEN = "plantedsessiontoken0123456789"
OTHERS = ("plantedsignature0123456789", "plantedbearer0123456789", "hf_plantedtoken0123456789")


@pytest.fixture
def uri(checkpoint: Any, s3_server: Any) -> str:
    return s3_server.upload_folder(checkpoint.folder, "secrets", "model")


@pytest.fixture
def signed(uri: str, s3_server: Any) -> list[str]:
    """The signed addresses of the checkpoint's files."""
    client = s3_server.client()
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    keys = [found["Key"] for found in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    addresses = [client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}) for key in keys]
    client.close()
    return addresses


@pytest.fixture
def settings(s3_server: Any) -> Settings:
    """Everything that is needed to read, and nothing of it in the environment."""
    return Settings.resolve(
        s3_endpoint_url=s3_server.endpoint_url,
        s3_access_key_id=s3_server.access_key,
        s3_secret_access_key=s3_server.secret_key,
        http_query=f"sig={OTHERS[0]}",
        http_authorization=f"Bearer {OTHERS[1]}",
        hf_token=OTHERS[2],
        memory_limit="1MiB",
        concurrency=4,
    )


@pytest.fixture
def wrong_settings(settings: Settings, s3_server: Any) -> Settings:
    if s3_server.kind != "rgw":
        pytest.skip("moto believes everybody")
    return settings.override(s3_secret_access_key=WRONG_SECRET, s3_session_token=TOKEN, retry_deadline_seconds=1)


@pytest.fixture
def assert_clean(s3_server: Any, signed: list[str]) -> Callable[..., None]:
    """None of these texts or pickles holds a key, or a signature, which is as good as one for a while."""
    secrets = (s3_server.access_key, s3_server.secret_key, WRONG_SECRET, TOKEN, *OTHERS, "X-Amz-Signature=")
    signatures = [address.partition("Signature=")[2][:12] for address in signed]
    assert len(set(signatures)) == len(signed)
    secrets += tuple(signatures)

    def check(*outputs: str | bytes) -> None:
        for output in outputs:
            text = output if isinstance(output, str) else output.decode("latin-1")
            assert text
            for secret in secrets:
                assert secret not in text, f"{secret} in {text[:2000]}"

    return check


@pytest.fixture
def everything_logged() -> Iterator[io.StringIO]:
    """What our loggers say when they say everything."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = logging.getLogger("ray_streamer")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(level)


def everything_said(error: BaseException) -> tuple[str, bytes]:
    """An error with all that caused it, and as it travels."""
    return "".join(traceback.format_exception(error)) + repr(error), pickle.dumps(error)


def ray_logs() -> dict[Path, bytes]:
    """All that Ray and its actors have logged so far."""
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_load_in_this_process(uri, settings, wrong_settings, assert_clean, everything_logged) -> None:
    plan = ray_streamer.plan(uri, settings=settings)
    tensors = ray_streamer.load_rank(uri, rank=0, world_size=1, settings=settings)
    assert tensors.keys() == set(plan.index.names)
    assert_clean(repr(plan), pickle.dumps(plan), repr(settings), everything_logged.getvalue())
    with pytest.raises(RayStreamerError) as caught:
        ray_streamer.load_rank(uri, rank=0, world_size=1, settings=wrong_settings)
    assert isinstance(caught.value, AccessError)
    assert_clean(*everything_said(caught.value), everything_logged.getvalue())


def test_a_load_over_ray(
    local_ray: None, uri, signed, settings, wrong_settings, assert_clean, everything_logged, tmp_path
) -> None:
    # Earlier tests gave actors an environment with keys, which Ray itself logs.
    before = ray_logs()
    with ray_streamer.load_sharded(uri, tp=2, settings=settings) as model:
        report = model.stats()
        assert report.bytes_read > 0
        assert_clean(repr(model), repr(report), str(report.as_dict()), pickle.dumps(report))
        # The same files by signed addresses, which the ranks get, too.
        report = model.reload(signed)
        assert report.bytes_read > 0
        model.write_trace(tmp_path / "trace.json")
        assert_clean(repr(model), repr(report), str(report.as_dict()), pickle.dumps(report), repr(model.plan))
    assert_clean((tmp_path / "trace.json").read_bytes())
    # Keys in the settings are those of the ranks, too: the driver sees by itself that they are wrong.
    with pytest.raises(RayStreamerError) as caught:
        ray_streamer.load_sharded(uri, tp=2, settings=wrong_settings)
    assert isinstance(caught.value, AccessError)
    assert_clean(*everything_said(caught.value), everything_logged.getvalue())
    written = [text[len(before.get(path, b"")) :] for path, text in ray_logs().items()]
    assert_clean(*filter(None, written))


def test_credentials_in_a_uri_are_refused_and_not_repeated(assert_clean) -> None:
    with pytest.raises(SettingsError, match="credentials") as caught:
        ray_streamer.load_sharded(f"s3://key:{WRONG_SECRET}@models/llama", tp=2)
    assert_clean(str(caught.value), pickle.dumps(caught.value))


def test_the_command_line(uri, signed, s3_server, assert_clean, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RAY_STREAMER_S3_ENDPOINT_URL", s3_server.endpoint_url)
    monkeypatch.setenv("RAY_STREAMER_S3_ACCESS_KEY_ID", s3_server.access_key)
    monkeypatch.setenv("RAY_STREAMER_S3_SECRET_ACCESS_KEY", s3_server.secret_key)
    (tmp_path / "files.txt").write_text("# of this hour\n" + "\n".join(signed))
    files = f"@{tmp_path / 'files.txt'}"
    for arguments in (
        *(["plan", files, "--tp", "2"], ["inspect", files, "--json"], ["ls", files, "--json"], ["ls", signed[0]]),
        ["pull", files, str(tmp_path / "copies"), "--allow", "*.json", "--json"],
        *(["plan", uri, "--tp", "2", "--json"], ["plan", uri, "--tp", "2"], ["inspect", uri, "--json"]),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert_clean(result.output)
    monkeypatch.delenv("RAY_STREAMER_S3_ACCESS_KEY_ID")
    result = CliRunner().invoke(main, ["plan", uri, "--tp", "2"])
    assert result.exit_code == 1
    assert "go together" in result.output
    assert_clean(result.output)


def test_an_environment_for_the_actors_is_not_shown(s3_server: Any, assert_clean) -> None:
    assert_clean(repr(PlacementOptions(runtime_env={"env_vars": s3_server.environment()})))


@pytest.mark.parametrize("status", [206, 400, 403])
def test_a_store_that_repeats_the_request(assert_clean, everything_logged, status) -> None:
    """The signed url in every header that reaches a message, and in the body."""

    def answer(asked: Asked) -> bytes:
        words = asked.target.replace("&", "&amp;")
        headers = dict.fromkeys(("x-amz-request-id", "ETag", "Content-Range", "x-amz-bucket-region"), asked.target)
        return answer_bytes(status, f"<Error><Message>{words} {asked.headers}</Message></Error>".encode(), headers)

    with HostileStore(answer) as store:
        settings = Settings.resolve(
            s3_endpoint_url=store.url,
            s3_region="us-east-1",
            s3_access_key_id="testaccesskey",
            s3_secret_access_key=WRONG_SECRET,
            s3_session_token=TOKEN,
        )
        for uri in ("s3://models/m", "s3://models/m/model.safetensors"):
            with pytest.raises(RayStreamerError) as caught:
                ray_streamer.load_rank(uri, rank=0, world_size=1, settings=settings)
            assert_clean(*everything_said(caught.value), everything_logged.getvalue() or "nothing")
