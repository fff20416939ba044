"""A Ray of its own with one application of Ray Serve LLM; asks it over HTTP, and says what it answered on standard output."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def main(wish: dict[str, Any]) -> None:
    import ray
    from ray import serve
    from ray.serve.llm import build_openai_app

    from ray_streamer.integrations.ray_llm import llm_config

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=True)
    serve.start(http_options={"host": "127.0.0.1", "port": wish["port"]})
    config = llm_config(
        wish["uri"],
        tp=2,
        model_id="tiny",
        extra_config={"concurrency": 4},
        engine_kwargs={"enforce_eager": True, "dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 4},
        accelerator_config={"kind": "cpu"},
        runtime_env={"env_vars": wish["environment"]},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="tiny")
    answers = [_ask(wish["port"], prompt) for prompt in wish["prompts"]]
    print("ANSWER " + json.dumps(answers), flush=True)
    serve.shutdown()
    ray.shutdown()


def _ask(port: int, prompt: list[int]) -> list[int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]
