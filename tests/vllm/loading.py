"""How is a load compared with the stock loader's? On every rank, each parameter and buffer, before and after vLLM processes them."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from ranks import Layout, on_all_ranks, stock

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.integrations.vllm.summary import Summary


def loader(**extra: Any) -> Any:
    """Load format ray_streamer; what the page cache holds would not be counted as read."""
    from vllm.config import LoadConfig

    from ray_streamer.integrations.vllm.loader import RayStreamerLoader

    extra = {"page_cache": "off", **extra}
    return RayStreamerLoader(LoadConfig(load_format="ray_streamer", model_loader_extra_config=extra))


def ours(model: Any, model_config: Any, **extra: Any) -> Summary:
    """Fills the model as `--load-format ray_streamer` does, and says what it took on this rank."""
    made = loader(**extra)
    made.load_weights(model, model_config)
    return made.summary


def total_bytes(folder: Path) -> int:
    """Of all tensors."""
    with closing(open_storage(str(folder), Settings())) as storage:
        return open_checkpoint(str(folder), storage).total_bytes


def check(
    folder: Path, layout: Layout, scratch: Path, stock_format: str = "safetensors", **extra: Any
) -> list[Summary]:
    """Compares all ranks with that format of vLLM's own, and gives what each took."""
    said = []
    fills = [partial(stock, load_format=stock_format), partial(ours, **extra)]
    for theirs, mine in on_all_ranks(folder, layout, fills, scratch):
        assert mine.before == theirs.before
        assert mine.after == theirs.after
        said.append(mine.said)
    return said
