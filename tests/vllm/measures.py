"""How many bytes does a load take from a store, and how many does it need?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.checkpoint.header_reads import HEAD_BYTES
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage

if TYPE_CHECKING:
    from pathlib import Path


def tensor_bytes(model: Path) -> int:
    """Of all tensors of a checkpoint."""
    storage = open_storage(str(model), Settings())
    try:
        return open_checkpoint(str(model), storage).total_bytes
    finally:
        storage.close()


def assert_read_once(model: Path, sent: int, requests: int) -> None:
    """Each tensor came once for both workers, and so did headers, index and config.json."""
    needed = tensor_bytes(model)
    heads = sum(min(HEAD_BYTES, path.stat().st_size) for path in model.glob("*.safetensors"))
    extra = sent - needed - heads
    print(
        f"{sent} bytes in {requests} requests: {needed} of tensors, {heads} of first bytes with headers, {extra} beside"
    )
    assert 0 <= extra < 100_000
