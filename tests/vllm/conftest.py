"""What vLLM needs of its environment on a machine without a GPU; its tests run by `make test-vllm` only."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The warnings of vLLM and of all that it imports are not ours."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.timeout(900))
