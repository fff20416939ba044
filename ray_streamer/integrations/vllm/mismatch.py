"""Do the engine's config.json and the weights belong together? They are compared, and a model that fails on a tensor says so.

vLLM's loaders end with a KeyError or an assertion without a word then. Here it becomes an error that names checkpoint, model and tensor.
Where only values differ, such as `rope_theta`, nothing fails: the model answers wrongly.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_streamer.api.files import is_in_cache
from ray_streamer.checkpoint.json_files import CONFIG_NAME, read_config
from ray_streamer.errors import CheckpointError, ObjectChangedError, RayStreamerError
from ray_streamer.storage import open_storage
from ray_streamer.wording import listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from ray_streamer.settings import Settings

_ABSENT = object()
_FAILURES = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def load_weights(model: Any, tensors: Iterable[tuple[str, torch.Tensor]], uri: str) -> Any:
    """What `model.load_weights` returns for these tensors of the checkpoint at `uri`.

    Raises:
        CheckpointError: The model cannot take them.
        RayStreamerError: A tensor could not be read.
    """
    offered: list[tuple[str, torch.Tensor]] = []

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for named in tensors:
            offered[:] = [named]
            yield named

    try:
        return model.load_weights(noted())
    except RayStreamerError:
        raise
    except _FAILURES as error:
        name, tensor = offered[0] if offered else ("the first tensor", None)
        shape = "" if tensor is None else f" of shape {list(tensor.shape)}"
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise CheckpointError(
            f"{uri}: vLLM's {type(model).__name__} failed at {name}{shape}: {said}. Look whether the model's config.json belongs "
            "to these weights"
        ) from error


def compare_configs(stored: Mapping[str, Any] | None, uri: str, model: str, settings: Settings) -> str | None:
    """What to warn of where the config.json of the weights and that of the engine's model differ, which may be intended.

    Where this package copied the latter from the store, it is not: the store's was replaced meanwhile.

    Args:
        stored: What the config.json beside the weights says; None where there is none.
        uri: Of the weights.
        model: What the engine calls its model; names that are no folder are not looked at.
        settings: How files are read, and `cache_dir`.

    Raises:
        ObjectChangedError: The folder is such a copy, and differs.
    """
    folder = Path(model)
    if stored is None or not folder.is_dir():
        return None
    with closing(open_storage(folder, settings)) as storage:
        used = read_config(storage)
    if used is None or used == stored:
        return None
    differing = sorted(key for key in used.keys() | stored.keys() if used.get(key, _ABSENT) != stored.get(key, _ABSENT))
    if is_in_cache(folder, settings):
        raise ObjectChangedError(
            f"{uri}: {CONFIG_NAME} was replaced after it was copied to {folder}; it says otherwise of {listed(differing)}. Start the "
            "engine again"
        )
    return (
        f"the engine takes {listed(differing)} from {folder / CONFIG_NAME}, which differs from {CONFIG_NAME} at {uri}. If that is not "
        "intended, copy the file from there"
    )
