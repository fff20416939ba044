"""Which tensors has the checkpoint that a caller named? Its storage is opened and its headers are read, as its settings say."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from ray_streamer.checkpoint.base_model import with_base_config
from ray_streamer.checkpoint.location import locate
from ray_streamer.checkpoint.open import open_checkpoint
from ray_streamer.storage import open_storage

if TYPE_CHECKING:
    from ray_streamer.checkpoint.index import CheckpointIndex
    from ray_streamer.named_checkpoint import NamedCheckpoint
    from ray_streamer.storage import Storage


def open_index(named: NamedCheckpoint, *, wants_base_config: bool) -> CheckpointIndex:
    """Opens the storage, reads every header and closes it; no tensor byte is read.

    Args:
        named: The checkpoint.
        wants_base_config: Whether an adapter's index has the config.json of its base model, which may cost a request to the Hub.

    Raises:
        CheckpointError: The checkpoint is malformed.
        StorageError: Headers could not be read.
    """
    with closing(open_storage(locate(named.uri).folder_uri, named.settings)) as storage:
        return read_index(named, storage, wants_base_config=wants_base_config)


def read_index(named: NamedCheckpoint, storage: Storage, *, wants_base_config: bool) -> CheckpointIndex:
    """As `open_index`, through a storage that is open already and stays so."""
    settings = named.settings
    index = open_checkpoint(named.uri, storage, concurrency=settings.concurrency, strict_index=settings.strict_index)
    return with_base_config(index, lambda uri: open_storage(uri, settings)) if wants_base_config else index
