"""How much longer than the start of its actors does a load take? Whole calls against actors that import torch, on a running Ray.

    python benchmarks/start_of_ranks.py --state warm
    python benchmarks/start_of_ranks.py --state cold

Every run is a process of its own, timed from its first import to the last rank's answer. Runs of both kinds take turns:

    actors    import ray, connect, reserve room, start an actor for each rank; every actor imports torch
    load      import ray_streamer, `load_sharded`, which does all of that and loads the checkpoint
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from side_by_side.checkpoint import make_checkpoint
from side_by_side.page_cache import warm_page_cache

from ray_streamer.demo.checkpoint import drop_page_cache

ACTORS = """
import sys, time
started = time.perf_counter()
import json, ray
address, _, num_ranks = sys.argv[1:]
ray.init(address=address, logging_level="WARNING")
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

@ray.remote(num_cpus=1)
class Actor:
    def imported(self):
        import torch
        return torch.__version__

group = placement_group([{"CPU": 1}] * int(num_ranks), strategy="STRICT_PACK")
ray.get(group.ready())
where = PlacementGroupSchedulingStrategy(group)
actors = [Actor.options(scheduling_strategy=where).remote() for _ in range(int(num_ranks))]
ray.get([actor.imported.remote() for actor in actors])
print(json.dumps({"whole": time.perf_counter() - started}))
"""

LOAD = """
import sys, time
started = time.perf_counter()
import json, ray_streamer
address, uri, num_ranks = sys.argv[1:]
model = ray_streamer.load_sharded(uri, int(num_ranks), address=address)
seconds = {"whole": time.perf_counter() - started}
print(json.dumps(seconds | model.stats().seconds))
"""

PROGRAMS = {"actors": ACTORS, "load": LOAD}


def measure(kind: str, address: str, folder: Path, num_ranks: int) -> dict[str, float]:
    """Seconds of one run, by phase."""
    command = [sys.executable, "-c", PROGRAMS[kind], address, str(folder.absolute()), str(num_ranks)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def run(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """All runs, in turn."""
    num_bytes = make_checkpoint(options.folder, layers=options.layers)
    prepare = {"warm": warm_page_cache, "cold": drop_page_cache}[options.state]
    context: Any = ray.init("local", num_cpus=options.tp, include_dashboard=False, logging_level=logging.WARNING)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in PROGRAMS}
    print(f"{num_bytes:,} bytes, {options.state}, tp={options.tp}, Ray {ray.__version__}")
    for _ in range(options.rounds):
        for kind, measured in runs.items():
            prepare(options.folder)
            measured.append(measure(kind, context.address_info["gcs_address"], options.folder, options.tp))
            print(kind, json.dumps({phase: round(seconds, 2) for phase, seconds in measured[-1].items()}), flush=True)
    ray.shutdown()
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", choices=("warm", "cold"), default="warm")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=10, help="about 98 MB each, and 262 MB of embeddings")
    parser.add_argument("--folder", type=Path, default=Path(".demo/benchmark"))
    runs = run(parser.parse_args())
    actors, load = (statistics.median(seconds["whole"] for seconds in runs[kind]) for kind in PROGRAMS)
    print(f"medians: actors {actors:.2f} s, load {load:.2f} s; aim: {1.1 * actors + 0.5:.2f} s")


if __name__ == "__main__":
    main()
