"""A Ray of its own with examples/serve_replica.py, which loses a rank; says on standard output what it answered over HTTP.

python serve_replica_process.py FOLDER PORT
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable


def main(folder: str, port: int) -> None:
    # Found where the test runs, and not wherever pytest collects this file.
    import ray
    from ray import serve
    from serve_process import PROJECT, TIMEOUT_SECONDS, ask, kill, rank_processes

    sys.path.insert(0, str(PROJECT))
    from examples import serve_replica

    ray.init(num_cpus=1 + serve_replica.TP, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    # Serve's own period is ten seconds.
    serve.run(serve_replica.Model.options(health_check_period_s=0.5).bind(folder), name="model")

    said: dict[str, Any] = {"first": json.loads(ask(port, {}).read())}
    first_ranks = rank_processes()
    kill(first_ranks[0])
    said["after_a_rank_was_killed"] = json.loads(answer_of_another(lambda: ask(port, {}).read(), TIMEOUT_SECONDS))
    _, alive = psutil.wait_procs(first_ranks, TIMEOUT_SECONDS)
    said |= {"num_ranks": [len(first_ranks), len(rank_processes())], "first_ranks_alive": len(alive)}
    serve.shutdown()
    ray.shutdown()
    print("ANSWER " + json.dumps(said), flush=True)


def answer_of_another(ask: Callable[[], bytes], timeout_seconds: float) -> bytes:
    """What the replica in place of one that has lost a rank answers."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return ask()
        except urllib.error.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
