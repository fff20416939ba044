"""A Ray of its own with two applications of Ray Serve LLM, one after the other; says on standard output what each of them answered over
HTTP, and what the store sent for it.

1. examples/serve_llm.py, as `serve run` starts it.
2. A configuration written for Run:ai's streamer, with RAY_STREAMER_REPLACE_RUNAI=1 in its environment.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_streamer.testing.s3_server import S3Server

PROJECT = Path(__file__).parents[2]
ENGINE = {"enforce_eager": True, "dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 4}


def main(uri: str, store: S3Server, port: int, prompts: list[list[int]]) -> None:
    import ray
    from ray import serve

    # Its processes get the environment of this one.
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=True)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    said = {}
    for name, start in (("example", start_example), ("runai", start_runai)):
        sent, requests = store.bytes_sent(), store.requests()
        start(name, uri)
        answers = [_ask(port, name, prompt) for prompt in prompts]
        said[name] = {
            "answers": answers,
            "sent": store.bytes_sent() - sent,
            "requests": store.requests() - requests,
        }
        serve.delete(name)
    print("ANSWER " + json.dumps(said), flush=True)
    serve.shutdown()
    ray.shutdown()


def start_example(name: str, uri: str) -> None:
    """What a user types, less what keeps the command running."""
    from ray.serve.scripts import cli

    arguments = {
        "uri": uri,
        "tp": "2",
        "model_id": name,
        "engine_kwargs": json.dumps(ENGINE),
        "accelerator": "cpu",
    }
    words = [f"{argument}={value}" for argument, value in arguments.items()]
    command = ["run", "--non-blocking", "--name", name, "--app-dir", str(PROJECT), "examples.serve_llm:app", *words]
    cli.main(command, prog_name="serve", standalone_mode=False)


def start_runai(name: str, uri: str) -> None:
    """A configuration that does not know this package."""
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": uri},
        engine_kwargs={**ENGINE, "tensor_parallel_size": 2, "load_format": "runai_streamer"},
        accelerator_config={"kind": "cpu"},
        runtime_env={"env_vars": {"RAY_STREAMER_REPLACE_RUNAI": "1"}},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name=name)


def _ask(port: int, model: str, prompt: list[int]) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["token_ids"]
