"""Which checkpoint is loaded? One in the layout of Llama, of any size, made once and used again."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from typing import TYPE_CHECKING

from ray_streamer.checkpoint import open_checkpoint
from ray_streamer.errors import RayStreamerError, SettingsError
from ray_streamer.settings import Settings
from ray_streamer.storage import open_storage
from ray_streamer.testing.checkpoints import llama_layout, write_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from ray_streamer.testing.checkpoints import ModelLayout

NUM_FILES = 4
_LARGE_BYTES = 400_000_000


def demo_layout(num_bytes: int) -> ModelLayout:
    """A Llama of about `num_bytes`, at least one layer: grouped-query attention, a vocabulary that does not divide by tp."""
    # 32,001 is what fine-tuning with one added token leaves.
    hidden, vocab = (2048, 32001) if num_bytes >= _LARGE_BYTES else (256, 4001)

    def layout(layers: int) -> ModelLayout:
        return llama_layout(hidden, layers, heads=32, kv_heads=8, intermediate=4 * hidden, vocab=vocab)

    smallest = layout(1).total_bytes
    layer_bytes = layout(2).total_bytes - smallest
    return layout(max(1, 1 + round((num_bytes - smallest) / layer_bytes)))


def make_checkpoint(folder: Path, layout: ModelLayout) -> bool:
    """Makes the checkpoint unless it is there; says whether it was made.

    Raises:
        SettingsError: Something else is in the way.
    """
    if _is_there(folder, layout):
        return False
    if folder.exists() and not (folder / "model.safetensors.index.json").exists():
        raise SettingsError(f"{folder} is there and holds no checkpoint; give another folder")
    # Renamed when complete, so that what an interrupted demo leaves is never taken for a checkpoint.
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_checkpoint(partial, layout.tensors, num_files=NUM_FILES, config=layout.config)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return True


def _is_there(folder: Path, layout: ModelLayout) -> bool:
    try:
        with closing(open_storage(str(folder), Settings())) as storage:
            index = open_checkpoint(str(folder), storage)
    except RayStreamerError:
        return False
    found = {name: (index.dtype_of(at).name, index.shape_of(at)) for at, name in enumerate(index.names)}
    return found == {spec.name: (spec.dtype, spec.shape) for spec in layout.tensors} and index.config == layout.config


def drop_page_cache(folder: Path) -> None:
    """Makes the kernel forget the files' pages, so that the next load comes from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # Pages that were not written out yet are not dropped.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
