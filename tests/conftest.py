"""Fixtures that every test may use: a clean environment, and a real local S3 server."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from ray_streamer.testing.s3_server import S3Server, S3ServerUnavailableError, start_s3_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# No test asserts on time, and a first example may wait for a machine that is busy. The same sources get the same examples;
# `--hypothesis-profile random` looks for others.
for profile, derandomize in (("repeatable", True), ("random", False)):
    hypothesis.settings.register_profile(
        profile,
        deadline=None,
        derandomize=derandomize,
        max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "40")),
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("repeatable")

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


# What starts Ray stays together, in as many processes as there are.
RAY_TESTS = {
    "ray, groups": ("cluster/", "api/test_kills.py"),
    "ray, commands and failures": ("cli/", "api/test_failures.py", "api/test_ready_models.py"),
    "ray, loads": tuple(
        f"api/test_{name}.py" for name in ("bad_input", "load_sharded", "memory", "meshes", "secrets", "two_nodes")
    ),
}


WAITING_TESTS = ("tests/storage/test_waits.py", "tests/exchange/test_failures.py", "tests/test_process_limits.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, then what waits most."""
    groups = [*RAY_TESTS, *WAITING_TESTS]
    items.sort(key=lambda item: groups.index(group) if (group := group_of(item.nodeid)) in groups else len(groups))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file, and those of one group of `RAY_TESTS`, run in one process when several share the work."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def group_of(nodeid: str) -> str:
    """The group of a test, or its file."""
    file_name = nodeid.partition("::")[0]
    name = file_name.removeprefix("tests/")
    return next((group for group, names in RAY_TESTS.items() if name.startswith(names)), file_name)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting or credential of the machine reaches a test."""
    for name in os.environ:
        if name.startswith(
            ("RAY_STREAMER_", "RUNAI_STREAMER_", "AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_")
        ) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # On a busy machine any answer may be late; tests that count requests would count the second ones too.
    monkeypatch.setenv("RAY_STREAMER_HEDGE_PERCENT", "0")
    # A home directory may hold credentials too.
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """A run that was started in the background of a shell ignores SIGINT; what is tested here does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def own_ray_folder() -> Iterator[None]:
    """Ray remembers in its folder which cluster was started last; it must not be another process's one."""
    folder = tempfile.mkdtemp(prefix="rs-", dir="/tmp")  # sockets lie in it, whose paths must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def save_tiny_llama() -> Callable[..., Path]:
    """Saves a tiny Llama to a folder, as transformers does, and gives the folder; its vocabulary does not divide."""

    def save(folder: Path, *, eos_token_id: int | None) -> Path:
        import torch
        import transformers

        torch.manual_seed(1)
        config = transformers.LlamaConfig(
            vocab_size=131,
            hidden_size=64,
            intermediate_size=97,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=eos_token_id,
        )
        model = transformers.LlamaForCausalLM(config)
        # Far from ties: rounding on two ranks changes no token.
        model.lm_head.weight.data.mul_(50)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for the whole session; tests share it, so each uses a bucket or prefix of its own."""
    try:
        server = start_s3_server(tls=True)
    except S3ServerUnavailableError as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def s3_credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The same server, with its endpoint and credentials in the environment of this process and its children."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server
