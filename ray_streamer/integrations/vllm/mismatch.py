"""What does it mean when a model of vLLM fails on a checkpoint's tensors? Mostly that config.json and weights are of different models.

vLLM's loaders end with a KeyError or an assertion without a word then. Here it becomes an error that names checkpoint, model and tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_streamer.errors import CheckpointError, RayStreamerError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

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
