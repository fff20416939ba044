"""Two nodes, each a pipeline stage whose ranks share every layer: loads, joins the ranks as an engine needs them, and computes.

    ray job submit --address http://HEAD:8265 --working-dir . -- python examples/two_nodes.py s3://bucket/llama 8 cuda

`ray job submit` needs `pip install "ray[default]"`. The number is tp: ranks per node. The device is cpu by default. It waits
for nodes that are still starting, as after `ray up`, for RAY_STREAMER_STARTUP_TIMEOUT_SECONDS, 300 by default.

`serve` runs on every rank beside its tensors. Here it sends a hidden state through all MLP blocks of a Llama, summed over the ranks of a
stage and handed on from node to node; an engine's own forward would stand there.
"""

import socket
import sys

import ray
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import linear, silu

import ray_streamer


def meeting_place(context: ray_streamer.RankContext) -> str:
    """Where the ranks meet: at the first one."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def serve(context: ray_streamer.RankContext, meeting: str, hidden: list[float]) -> list[float] | None:
    """The hidden state after the last layer, on the ranks of the last stage."""
    mesh, kind = context.mesh, context.device.partition(":")[0]
    dist.init_process_group(init_method=meeting, rank=context.rank, world_size=mesh.num_ranks)
    try:
        # Ranks of a stage are neighbours, so torch's grid is the load's.
        groups = init_device_mesh(kind, (mesh.pp, mesh.tp), mesh_dim_names=("pp", "tp"))
        stage, tp = groups.get_local_rank("pp"), groups.get_group("tp")
        state = torch.tensor(hidden, device=context.device)
        if stage > 0:
            dist.recv(state, context.rank - mesh.tp)
        layers = sorted({int(name.split(".")[2]) for name in context.tensors if name.startswith("model.layers.")})
        for layer in layers:
            gate, up, down = (
                context.tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"].to(state.dtype)
                for name in ("gate", "up", "down")
            )
            part = linear(silu(linear(state, gate)) * linear(state, up), down)
            dist.all_reduce(part, group=tp)
            state = state + part
        if stage < mesh.pp - 1:
            dist.send(state, context.rank + mesh.tp)
            return None
        return state.tolist()
    finally:
        dist.destroy_process_group()


def answer(model: ray_streamer.ShardedModel, hidden: list[float]) -> list[float]:
    """What the last stage computes."""
    meeting = model.run(meeting_place)[0]
    return model.run(serve, meeting, hidden)[-1]


def main(uri: str, tp: int, device: str = "cpu") -> None:
    """Load over two nodes of `tp` ranks, and compute."""
    placement = ray_streamer.PlacementOptions(wait_for_nodes=True)
    with ray_streamer.load_sharded(uri, tp, pp=2, device=device, placement=placement) as model:
        print(model.stats().nodes, f"{model.stats().amplification:.2f}x read", file=sys.stderr)
        print(answer(model, [1.0] * model.plan.index.config["hidden_size"]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
