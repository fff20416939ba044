"""A model behind Ray Serve LLM's OpenAI interface, with weights that stay in S3. Needs `pip install "ray[llm]" ".[vllm]"`.

    serve run examples.serve_llm:app uri=s3://bucket/llama tp=8
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "llama", "prompt": "Once", "max_tokens": 8}'

model_id       what requests call the model; the last part of the uri when unset
engine_kwargs  further arguments of vLLM's engine, as JSON: engine_kwargs='{"max_model_len": 4096}'
accelerator    "cpu" on a machine without GPUs; by default Ray Serve LLM takes GPUs

On a cluster the package must be on every node, and every node must be able to read the uri.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ray.serve.llm import build_openai_app

from ray_streamer.integrations.ray_llm import llm_config

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: dict[str, str]) -> Application:
    """What `serve run` starts."""
    config = llm_config(
        args["uri"],
        tp=int(args.get("tp", 1)),
        model_id=args.get("model_id"),
        engine_kwargs=json.loads(args.get("engine_kwargs", "{}")),
        **_devices(args),
    )
    return build_openai_app({"llm_configs": [config]})


def _devices(args: dict[str, str]) -> dict[str, Any]:
    return {"accelerator_config": {"kind": args["accelerator"]}} if "accelerator" in args else {}
