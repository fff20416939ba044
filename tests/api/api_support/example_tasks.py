"""What rank processes do that run an example's function beside tensors that they loaded themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import ray_streamer

EXAMPLES = Path(__file__).parents[3] / "examples"


def loaded_example(name: str) -> Any:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def serve_two_stages(rank: int, uri: str, meeting: str, hidden: list[float], session: str) -> list[float] | None:
    """What examples/two_nodes.py computes on one of four ranks, which are on one node here."""
    mesh = ray_streamer.Mesh(tp=2, pp=2)
    tensors = ray_streamer.load_rank(uri, tp=2, pp=2, rank=rank, world_size=4, session=session)
    context = ray_streamer.RankContext(rank=rank, mesh=mesh, device="cpu", node="here", tensors=tensors)
    return loaded_example("two_nodes").serve(context, meeting, hidden)
