"""Would transformers read the same files of a folder? Refused here if not, by name: it is the caller who says which are meant.

transformers 5.23 reads the file that `transformers_weights` of config.json names, else model.safetensors, else the index json.
This package reads the index json first. A uri of one file, or of an index json, leaves nothing open.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint import locate
from ray_streamer.checkpoint.folder_hints import INDEX_NAME
from ray_streamer.checkpoint.shard_files import SINGLE_NAME
from ray_streamer.errors import CheckpointError
from ray_streamer.storage import open_storage
from ray_streamer.storage.base import is_seen
from ray_streamer.wording import brief

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ray_streamer.settings import Settings


def refuse_other_files(uri: str, folder: Path, config: Mapping[str, Any], settings: Settings) -> None:
    """Refuses a folder of which transformers would read other weights.

    Args:
        uri: The checkpoint.
        folder: Has its config and index json.
        config: A parsed config.json.
        settings: How files are read.

    Raises:
        CheckpointError: Names the files, and the uris that say which is meant.
        StorageError: Storage failed.
    """
    location = locate(uri)
    if location.selection is not None:
        return
    has_index = (folder / INDEX_NAME).is_file()
    read = INDEX_NAME if has_index else SINGLE_NAME
    named = config.get("transformers_weights")
    if named is not None and named != read:
        raise CheckpointError(
            f"{uri}: transformers_weights of config.json names {brief(named)}, which transformers reads, and ray_streamer reads {read} of "
            "this folder; give the uri of the file that is meant, such as FOLDER/model.safetensors"
        )
    if named is not None or not has_index:
        return
    with contextlib.closing(open_storage(location.folder_uri, settings)) as storage:
        has_both = is_seen(storage, SINGLE_NAME)
    if has_both:
        raise CheckpointError(
            f"{uri} has {SINGLE_NAME}, which transformers reads, and {INDEX_NAME}, which ray_streamer reads; give the uri of the one that "
            f"is meant: {uri.rstrip('/')}/{SINGLE_NAME} or {uri.rstrip('/')}/{INDEX_NAME}"
        )
