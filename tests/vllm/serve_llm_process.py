"""A Ray of its own, where `serve run` starts examples/serve_llm.py; asks it over HTTP, and says what it answered on standard output."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
ENGINE = {"enforce_eager": True, "dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 4}


def main(wish: dict[str, Any]) -> None:
    import ray
    from ray import serve
    from ray.serve.scripts import cli

    # Its processes get the environment of this one.
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=True)
    serve.start(http_options={"host": "127.0.0.1", "port": wish["port"]})
    arguments = {
        "uri": wish["uri"],
        "tp": "2",
        "model_id": "tiny",
        "engine_kwargs": json.dumps(ENGINE),
        "accelerator": "cpu",
    }
    words = [f"{name}={value}" for name, value in arguments.items()]
    command = ["run", "--non-blocking", "--app-dir", str(PROJECT), "examples.serve_llm:app", *words]
    cli.main(command, prog_name="serve", standalone_mode=False)
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
