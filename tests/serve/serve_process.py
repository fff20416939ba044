"""A Ray of its own with examples/serve_transformers.py, started as a user starts it; says on standard output what it answered over HTTP.

python serve_process.py FOLDER PORT WISH    WISH is JSON: prompt, num_tokens, refused (bodies of requests that cannot be answered)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 120
ENDLESS = 100_000


def main(folder: str, port: int, wish: dict[str, Any]) -> None:
    # Installed where the test runs, and not wherever pytest collects this file.
    import ray
    from ray import serve
    from ray.serve.scripts import cli

    ray.init(num_cpus=4, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    command = ["run", "--non-blocking", "--name", "model", "--app-dir", str(PROJECT), "examples.serve_transformers:app"]
    cli.main([*command, f"uri={folder}", "tp=2", "device=cpu"], prog_name="serve", standalone_mode=False)

    asked = {"prompt": wish["prompt"], "max_new_tokens": wish["num_tokens"]}
    said: dict[str, Any] = {"whole": json.loads(ask(port, asked).read())["tokens"]}
    said["streamed"] = [int(line) for line in ask(port, {**asked, "stream": True})]
    with ask(port, {**asked, "max_new_tokens": ENDLESS, "stream": True}) as answer:
        said["first_of_an_endless_one"] = int(answer.readline())
    said["after_that_was_dropped"] = json.loads(ask(port, asked).read())["tokens"]
    said["refused"] = [refusal(port, body) for body in wish["refused"]]
    first_ranks = rank_processes()
    with ask(port, {**asked, "stream": True}) as answer:
        tokens = [int(answer.readline())]
        kill(first_ranks[0])
        said["killed_in_a_stream"] = tokens + [int(line) for line in answer]
    second_ranks = rank_processes()
    kill(second_ranks[-1])
    said["killed_between_requests"] = json.loads(ask(port, asked).read())["tokens"]
    last_ranks = rank_processes()
    said["num_ranks"] = [len(first_ranks), len(second_ranks), len(last_ranks)]
    serve.delete("model")
    _, alive = psutil.wait_procs(last_ranks, TIMEOUT_SECONDS)
    said["alive_at_the_end"] = len(alive)
    serve.shutdown()
    ray.shutdown()
    print("ANSWER " + json.dumps(said), flush=True)


def refusal(port: int, body: Any) -> tuple[int, str]:
    """Status and sentence of the answer to a request that cannot be answered."""
    try:
        ask(port, body).read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]
    return 200, ""


def ask(port: int, body: Any) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", data=json.dumps(body).encode())
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


def rank_processes() -> list[psutil.Process]:
    """Those of this Ray that hold a rank."""
    found = [process for process in psutil.Process().children(recursive=True) if "RankActor" in title_of(process)]
    return sorted(found, key=lambda process: process.pid)


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
