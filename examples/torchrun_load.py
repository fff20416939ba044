"""Load in processes that torchrun starts; no Ray is involved. Ranks of a node read for each other.

    torchrun --nproc-per-node 4 examples/torchrun_load.py s3://bucket/model

Tensors are in host memory. Rank, world size and ranks per node come from torchrun's environment. Where torch.distributed is initialised before the
call, they come from there, and the headers are read by the first rank alone.
"""

import os
import sys

import ray_streamer


def main(uri: str) -> None:
    """Load this process's slices, and do something with each one as soon as it is there."""
    settings = ray_streamer.Settings.resolve(memory_limit="512MiB")
    num_bytes = 0
    for _name, tensor in ray_streamer.stream_rank(uri, settings=settings):
        num_bytes += tensor.nbytes
    print(f"rank {os.environ['RANK']}: {num_bytes / 1e9:.3f} GB")


if __name__ == "__main__":
    main(sys.argv[1])
