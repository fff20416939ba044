"""A Ray Serve replica that holds a model over several ranks. Needs `pip install "ray[serve]"`.

    serve run --working-dir . examples.serve_replica:app uri=s3://bucket/model

Start it in the clone's folder: `--working-dir .` brings this file to every node.

Serve reserves one placement group per replica: the replica itself takes the first bundle, and `load_sharded`, called in the
replica, puts one rank into each of the others. Ranks, tensors and group end with the replica. A replica that has lost a rank is replaced.

TP is 4 here, so a replica needs 5 CPUs on one node. Tensors stay in host memory.
"""

from __future__ import annotations

from typing import Any

from ray import serve

import ray_streamer

TP = 4


def count_parameters(context: ray_streamer.RankContext) -> int:
    """Runs on every rank; the forward pass of an engine would stand here."""
    return sum(tensor.numel() for tensor in context.tensors.values())


@serve.deployment(
    ray_actor_options={"num_cpus": 1},
    placement_group_bundles=[{"CPU": 1.0}] * (1 + TP),
    placement_group_strategy="STRICT_PACK",
)
class Model:
    """One replica."""

    def __init__(self, uri: str) -> None:
        self._lost: ray_streamer.RankFailedError | None = None
        self._model = ray_streamer.load_sharded(uri, TP, node_memory_limit="4GiB")

    def __call__(self, _request: Any) -> dict[str, Any]:
        """How many parameters each rank holds."""
        try:
            return {"parameters": self._model.run(count_parameters)}
        except ray_streamer.RankFailedError as error:
            if isinstance(error.cause, str):  # the process died or does not answer; an exception is the function's own
                self._lost = error
            raise

    def check_health(self) -> None:
        """Serve asks every ten seconds, and replaces a replica of which this fails three times."""
        if self._lost is not None:
            raise self._lost

    def __del__(self) -> None:
        if hasattr(self, "_model"):  # a load that failed leaves none
            self._model.shutdown()


def app(args: dict[str, str]) -> serve.Application:
    """What `serve run` starts."""
    return Model.bind(args["uri"])
