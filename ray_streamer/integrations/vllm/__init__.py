"""How does vLLM load through this package? As load format `ray_streamer`, which vLLM finds by its entry point for plugins.

vllm serve /models/llama --load-format ray_streamer --tensor-parallel-size 8
vllm serve /models/llama-config-only --load-format ray_streamer --model-loader-extra-config '{"uri": "s3://bucket/llama"}'

options      what `--model-loader-extra-config` may say
internals    all that is known of vLLM's inside, and the versions that it was seen in
loader       the load format: capture of vLLM's own loaders, one session of the ranks, slices straight into parameters
"""

from __future__ import annotations

LOAD_FORMAT = "ray_streamer"


def register() -> None:
    """Called by vLLM in each of its processes, maybe several times; makes the load format known and starts nothing.

    Raises:
        ImportError: This vLLM has no registry of load formats.
    """
    from ray_streamer.integrations.vllm.internals import register_format
    from ray_streamer.integrations.vllm.loader import RayStreamerLoader

    register_format(LOAD_FORMAT, RayStreamerLoader)
