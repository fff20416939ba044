"""What is loaded? A checkpoint in the layout of Llama, made once and used again, and each rank's part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.demo import checkpoint as demo
from ray_streamer.testing.checkpoints import llama_layout
from ray_streamer.testing.parts import window_of
from side_by_side.parts import Tensors, Windows, cut, digest

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.planning.read_plan import ReadPlan


def make_checkpoint(folder: Path, *, layers: int, hidden: int = 2048) -> int:
    """A Llama layout with grouped queries in four files; its tensor bytes."""
    layout = llama_layout(
        hidden=hidden, layers=layers, heads=16, kv_heads=4, intermediate=hidden * 11 // 4, vocab=32000
    )
    demo.make_checkpoint(folder, layout)
    return layout.total_bytes


def windows_of(folder: Path, tp: int) -> list[Windows]:
    """What each rank holds, by the rules of the model's family."""
    from ray_streamer.api.plan import plan

    planned = plan(str(folder), tp)
    return [_windows_of_rank(planned, rank) for rank in range(tp)]


def _windows_of_rank(planned: ReadPlan, rank: int) -> Windows:
    index = planned.index
    windows: Windows = {}
    for position, name in enumerate(index.names):
        window = window_of(index, planned.slices[rank], position)
        cuts = [
            [dim, cut.start, cut.stop]
            for dim, (cut, size) in enumerate(zip(window, index.shape_of(position), strict=True))
            if cut.stop - cut.start < size
        ]
        if len(cuts) > 1:
            raise ValueError(f"{name} is cut in {len(cuts)} dimensions; other loaders are told of one")
        windows[name] = cuts[0] if cuts else None
    return windows


def expected_digest(folder: Path, windows: Windows) -> str:
    """The digest of a rank's tensors, read by safetensors."""
    from safetensors import safe_open

    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensors[name] = cut(opened.get_tensor(name), windows[name])
    return digest(tensors)
