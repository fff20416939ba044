"""How long does a plan take from nothing? DeepSeek-V3's headers on a local disk to the plan of one node, against reading their JSON.

    python benchmarks/plan_from_headers.py --rounds 5

Every run is a process of its own; runs of both kinds take turns. What a script imports at its top is not counted:

    json    `json.loads` of the headers of all files and of the index json
    plan    `ray_streamer.plan`: the same headers read and checked, the family's rules, what each of 16 ranks holds, and the node's reads

Prints each round, then medians of seconds by the clock and of processor time, and the ratio of the latter within each round, which
other work on the machine stretches least.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from ray_streamer.testing.checkpoints import write_checkpoint
from ray_streamer.testing.layouts import deepseek_v3_layout

JSON = """
import glob, json, struct, sys, time
started, cpu = time.perf_counter(), time.process_time()
for name in glob.glob(sys.argv[1] + "/*.safetensors"):
    with open(name, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length))
with open(sys.argv[1] + "/model.safetensors.index.json", "rb") as file:
    json.loads(file.read())
print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}))
"""

PLAN = """
import json, sys, time
from ray_streamer.api.plan import plan
started, cpu = time.perf_counter(), time.process_time()
made = plan(sys.argv[1], tp=16)
assert len(made.node_plans[0].blocks)
print(json.dumps({"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}))
"""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the sparse files go; a temporary folder when unset")
    options = parser.parse_args()
    layout = deepseek_v3_layout()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_checkpoint(Path(folder), layout.tensors, num_files=163, config=layout.config, sparse=True)
        rounds = [(_run(JSON, folder), _run(PLAN, folder)) for _ in range(options.rounds)]
    print(f"{'':8} {'json s':>8} {'cpu':>6} {'plan s':>8} {'cpu':>6} {'ratio':>6}")
    for number, (plain, ours) in enumerate(rounds, 1):
        _print_row(str(number), plain, ours)
    middle = [{key: median(run[at][key] for run in rounds) for key in ("seconds", "cpu")} for at in range(2)]
    _print_row("median", *middle, ratio=median(ours["cpu"] / plain["cpu"] for plain, ours in rounds))


def _run(script: str, folder: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", script, folder], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _print_row(title: str, plain: dict[str, float], ours: dict[str, float], *, ratio: float | None = None) -> None:
    ratio = ours["cpu"] / plain["cpu"] if ratio is None else ratio
    print(
        f"{title:8} {plain['seconds']:8.2f} {plain['cpu']:6.2f} {ours['seconds']:8.2f} {ours['cpu']:6.2f} {ratio:6.2f}"
    )


if __name__ == "__main__":
    main()
