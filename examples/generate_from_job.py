"""Generate with a model of transformers from a Ray job, token by token, and go on when a rank dies.

    ray job submit --address http://HEAD:8265 --working-dir . -- python examples/generate_from_job.py s3://bucket/llama 8 cuda 1 15043 3186

What follows the uri is tp, the device (cuda or cpu; there is no default), and the prompt's token ids; a tokenizer of transformers makes them of
text. Every node has the extra transformers: `pip install ".[transformers]"` in a clone. `ray job submit` needs `pip install "ray[default]"`.

It waits for nodes that are still starting, as after `ray up`, for RAY_STREAMER_STARTUP_TIMEOUT_SECONDS, 300 by default.
"""

import sys
from collections.abc import Iterator
from typing import Any

import ray_streamer

MOST_RESTARTS = 2


def answer(model: Any, prompt: list[int], num_tokens: int) -> Iterator[int]:
    """New token ids of the greedy answer, each once. A rank that died costs a restart of all ranks, and no token."""
    told: list[int] = []
    for num_restarts in range(MOST_RESTARTS + 1):
        try:
            for token in model.stream([prompt + told], max_new_tokens=num_tokens - len(told), do_sample=False):
                told.append(token)
                yield token
        except ray_streamer.ClusterError as error:  # RankFailedError is one
            if len(told) == num_tokens:
                return
            if num_restarts == MOST_RESTARTS or not model.needs_restart:
                raise
            print(f"{error}; loading again", file=sys.stderr)
            model.restart(0)
        else:
            return


def main(uri: str, tp: int, device: str, prompt: list[int]) -> None:
    """Print the answer as it comes."""
    placement = ray_streamer.PlacementOptions(wait_for_nodes=True)
    with ray_streamer.load_sharded(uri, tp, bootstrap="transformers", device=device, placement=placement) as model:
        for token in answer(model, prompt, num_tokens=32):
            print(token, end=" ", flush=True)
        print(f"\n{model.stats().gigabytes_per_second:.2f} GB/s, {model.stats().amplification:.2f}x read")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], [int(token) for token in sys.argv[4:]])
