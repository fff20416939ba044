"""Where are config and tokenizer of a model that vLLM was given as a uri? In this node's cache, for whoever asks first.

Used where this package answers for Run:ai's streamer, since vLLM takes uris as models with that format only, and by workers on other
nodes than that of `ray-streamer serve`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.api.files import cached, is_in_cache
from ray_streamer.integrations.vllm import internals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.settings import Settings

logger = internals.logger_of(__name__)


class CachedModelFiles:
    """What vLLM takes for its `ObjectStorageModel`: a folder with everything that an engine reads but the weights.

    Args:
        url: Of the model or tokenizer.

    Attributes:
        dir: The folder; complete once this object is there.

    Raises:
        SettingsError: The url cannot mean anything.
        StorageError: A file could not be read or written.
    """

    def __init__(self, url: str) -> None:
        self.dir = str(cached(url))

    def pull_files(
        self,
        model_path: str = "",
        allow_pattern: Sequence[str] | None = None,
        ignore_pattern: Sequence[str] | None = None,
    ) -> None:
        """Called by vLLM for each kind of file; all of them are in `dir` already."""


def restore_model_files(model_config: Any, uri: str | None, settings: Settings) -> None:
    """Makes the folder that the engine calls its model, where it is not on this node.

    The process that made the configuration fetched the files to its own node's cache. Workers on other nodes are told the path only.

    Args:
        model_config: vLLM's.
        uri: Where the options say that the weights are, as `ray-streamer serve` sets them.
        settings: How files are read, and `cache_dir`.

    Raises:
        StorageError: A file could not be read or written.
    """
    place = model_config.model_weights or (uri if is_in_cache(Path(model_config.model), settings) else None) or ""
    if "://" not in place or os.path.isdir(model_config.model):
        return
    folder = str(cached(place, settings=settings))
    if folder != model_config.model:
        logger.warning(
            "config and tokenizer of %s are in %s here, and in %s where the engine was configured. Set RAY_STREAMER_CACHE_DIR to the "
            "same path on all nodes; if it is, the files in the store have changed since.",
            place,
            folder,
            model_config.model,
        )
