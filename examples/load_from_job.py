"""Load a checkpoint from a Ray job, and run code beside every rank's tensors.

    ray job submit --address http://HEAD:8265 --working-dir . -- python examples/load_from_job.py s3://bucket/model 8 cuda

`ray job submit` needs `pip install "ray[default]"`. The number is tp. The device is cpu by default.

The job's entrypoint runs on a node of the cluster, so `load_sharded` finds that cluster by itself. It waits for nodes that are still
starting, as after `ray up`, for RAY_STREAMER_STARTUP_TIMEOUT_SECONDS, 300 by default.
"""

import sys

import ray_streamer


def describe(context: ray_streamer.RankContext) -> str:
    """Runs on every rank; `context.tensors` are that rank's slices. A server's own start would stand here."""
    num_bytes = sum(tensor.nbytes for tensor in context.tensors.values())
    return f"rank {context.rank} on {context.node}: {len(context.tensors)} tensors, {num_bytes / 1e9:.2f} GB"


def main(uri: str, tp: int, device: str = "cpu") -> None:
    """Load `uri` over `tp` ranks and say what each of them holds."""
    placement = ray_streamer.PlacementOptions(wait_for_nodes=True)
    with ray_streamer.load_sharded(uri, tp, device=device, memory_limit="1GiB", placement=placement) as model:
        print(*model.run(describe), sep="\n")
        report = model.stats()
        print(f"{report.gigabytes_per_second:.2f} GB/s, {report.amplification:.2f}x read")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
