"""What vLLM needs of its environment on a machine without a GPU; its tests run by `make test-vllm` only."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HAS_VLLM = find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["*.py"]

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Two ranks need two NUMA nodes otherwise.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    # The first request for logprobs compiles for 20 seconds otherwise.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

if HAS_VLLM:
    os.environ.update(ENVIRONMENT)
    # Nothing that is tested here needs it, and without it vLLM's own ways end early.
    sys.modules["runai_model_streamer"] = None
    sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _shared_memory_that_workers_leave() -> Iterator[None]:
    """vLLM's workers for CPUs never remove theirs, 3.5 MiB for each pair: what nobody maps any more is removed."""
    yield
    mapped = "".join(_maps_of(process) for process in Path("/proc").glob("[0-9]*"))
    for left in Path("/dev/shm").glob("*-cpushm_*"):
        if str(left) not in mapped:
            left.unlink(missing_ok=True)


@pytest.fixture
def fp8_layers_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of vLLM's CPU build multiplies FP8, which a layer looks for when it is made; its parameters are the same without."""
    from vllm.model_executor.layers.quantization import fp8

    kernel = SimpleNamespace(process_weights_after_loading=lambda layer: None)
    monkeypatch.setattr(fp8, "init_fp8_linear_kernel", lambda **_: kernel)


@pytest.fixture
def online_fp8_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU build can neither multiply nor make FP8; torch makes it here."""
    import torch
    from vllm.model_executor.layers.quantization.online import fp8

    def quantize(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    kernel = SimpleNamespace(process_weights_after_loading=lambda layer: None)
    monkeypatch.setattr(fp8, "init_fp8_linear_kernel", lambda **_: kernel)
    monkeypatch.setattr(fp8, "ops", SimpleNamespace(scaled_fp8_quant=quantize))


def _maps_of(process: Path) -> str:
    try:
        return (process / "maps").read_text()
    except OSError:  # it has ended, or is another user's
        return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The warnings of vLLM and of all that it imports are not ours."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(900))
