"""A model behind Ray Serve LLM's OpenAI interface, with weights that stay in S3. Needs `pip install "ray[llm]" "ray_streamer[vllm]"`.

    serve run examples.serve_llm:app uri=s3://bucket/llama tp=8
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "llama", "prompt": "Once", "max_tokens": 8}'

On a cluster the package must be on every node, and every node must be able to read the uri.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.serve.llm import build_openai_app

from ray_streamer.integrations.ray_llm import llm_config

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: dict[str, str]) -> Application:
    """What `serve run` starts."""
    return build_openai_app({"llm_configs": [llm_config(args["uri"], tp=int(args.get("tp", 1)))]})
