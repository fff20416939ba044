"""What has to be there before ranks and engines are forked from this process, so that none of them does it again?"""

from __future__ import annotations

import functools
import gc
from importlib import import_module

_IMPORTED = (
    "ray",
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.engine.coordinator",
    "vllm.v1.engine.core",
    "vllm.v1.engine.utils",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "ray_streamer.integrations.vllm.loader",
)


@functools.cache
def import_once() -> None:
    """Imports vLLM, and takes what is there now out of the collector's sight.

    vLLM collects garbage twice for each model. Looking at every object of its modules took half of a rank's time, and copied the
    memory that forked processes share.
    """
    for name in _IMPORTED:
        import_module(name)
    gc.collect()
    gc.freeze()
