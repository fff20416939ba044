"""Which weights of a folder does vLLM's configuration mean? Those in Mistral's own format, where that is the configuration's format.

Such a folder has params.json in place of config.json, and `consolidated*.safetensors`, whose tensors have names of their own.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint import locate
from ray_streamer.checkpoint.shard_files import CONSOLIDATED_NAME
from ray_streamer.storage import open_storage
from ray_streamer.storage.base import is_seen

if TYPE_CHECKING:
    from ray_streamer.settings import Settings

_CONFIG = "params.json"


def in_format_of_config(place: str, model_config: Any, settings: Settings) -> str:
    """The place itself, or the index json, or else the one file, of the weights there that are in Mistral's own format.

    Args:
        place: Of the weights, as a uri or path.
        model_config: vLLM's.
        settings: For looking there.

    Raises:
        StorageError: Storage failed.
    """
    if locate(place).selection is not None or not _may_be_mistrals(place, model_config):
        return place
    with contextlib.closing(open_storage(place, settings)) as storage:
        for name in (f"{CONSOLIDATED_NAME}.index.json", CONSOLIDATED_NAME):
            if is_seen(storage, name):
                return f"{place.rstrip('/')}/{name}"
    return place


def _may_be_mistrals(place: str, model_config: Any) -> bool:
    """Whether vLLM takes params.json, as far as can be told without looking at the weights."""
    config_format = getattr(model_config, "config_format", "hf")
    if config_format != "auto":
        return config_format == "mistral"
    folder = Path(model_config.model)
    # Where both are beside weights in both formats, vLLM takes params.json.
    has_config = (folder / "config.json").is_file() and "://" in place
    return (folder / _CONFIG).is_file() and not has_config
