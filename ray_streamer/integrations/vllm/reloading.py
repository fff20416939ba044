"""How are new weights brought into a model that vLLM has already? vLLM's own reload asks for all tensors, and keeps the parameters.

vLLM runs the model's loader layer by layer, on memory that it makes for each layer, and copies what comes out into the
parameters. So it needs real tensors, whole. The ranks of a node read them together (`SharedTensors.stream`): each byte leaves
storage once per node, and memory is bounded but for what vLLM itself keeps of unfinished layers, which ranks share as well.

Everything that can be wrong with the checkpoint as such is found before vLLM touches the model.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from ray_streamer.api.tensors import open_tensors
from ray_streamer.errors import CheckpointError, LoadAbortedError
from ray_streamer.integrations.captured_slices import contents_of
from ray_streamer.integrations.vllm import internals
from ray_streamer.integrations.vllm.collective import is_first
from ray_streamer.integrations.vllm.summary import say_load

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    import torch
    import torch.distributed as dist
    from torch import nn

    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.settings import Settings

logger = internals.logger_of(__name__)


@dataclass(slots=True)
class Origin:
    """What a model was loaded from.

    Attributes:
        model: Its `model_config.model` at the last load or reload, the very object.
        uri: What the options said then, the very object; None = the model's own folder.
        place: What was read last.
        is_draft: Whether it is a draft model with files of its own.
        contents: Names, dtypes and shapes of the first checkpoint, as a hash; empty until it was loaded.
        taken: The tensors that this rank's loader took anything of: by name their dtype and shape in the first checkpoint.
        reload: The last reload, if it has failed halfway and its error is still there.
    """

    model: str
    uri: str | None
    place: str
    is_draft: bool
    contents: str = ""
    taken: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    reload: ref[Generator[Any, None, None]] | None = field(default=None, repr=False)


origins: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()
"""What each model was loaded from; kept here, since vLLM makes a new loader for each load and reload."""


def reload_tensors(
    uri: str, model: nn.Module, *, settings: Settings, load_config: Any, origin: Origin | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of all that this rank's loader takes, for a model that is loaded already; every rank calls it.

    Args:
        uri: Of the checkpoint.
        model: It holds other weights, or the rest of a reload that failed.
        settings: Every knob.
        load_config: vLLM's.
        origin: What the model was loaded from first; None when it was loaded by another loader.

    Raises:
        RayStreamerError: The checkpoint cannot be read; the model is as it was. Later errors, from the iterator, leave it with
            layers of both checkpoints, and some without memory; then it has to be reloaded before it is used.
    """
    unended = origin.reload and origin.reload() if origin is not None else None
    if unended is not None:
        # Of a reload that failed, its error may still hold the other ranks.
        unended.close()
    unfinished = internals.put_back_unfinished(model)
    if unfinished:
        logger.warning(
            "ray_streamer: the last reload failed with %d layers unfinished; all are loaded anew", unfinished
        )
    tensors = _read(uri, model, settings, load_config, origin)
    # Up to here nothing of the model has changed.
    next(tensors)
    if origin is not None:
        origin.place = uri
        # Weakly: when vLLM's loader fails, the iterator ends with vLLM's error, and the other ranks are told.
        origin.reload = ref(tensors)
    return tensors


def _read(
    uri: str, model: nn.Module, settings: Settings, load_config: Any, origin: Origin | None
) -> Generator[Any, None, None]:
    """Nothing, once the ranks have met and read the headers; then names and tensors."""
    with suppress(LoaderStoppedError):
        yield from _shared(uri, model, settings, load_config, origin)


def _shared(
    uri: str, model: nn.Module, settings: Settings, load_config: Any, origin: Origin | None
) -> Generator[Any, None, None]:
    group = internals.reloading_group()
    with open_tensors(uri, settings=settings, group=group) as opened, _stop_explained():
        index, shared = opened.index, opened.shared
        if origin is not None:
            _refuse_other_shapes(index, origin.taken, uri)
        names = _names(index, model, origin)
        yield None
        started, num_bytes = time.perf_counter(), sum(_num_bytes(index, name) for name in names)
        with internals.progress_bar(load_config, doing="Reloading weights", num_bytes=num_bytes) as bar:
            for name, tensor in shared.stream(names):
                yield name, tensor
                bar.update(tensor.nbytes)
        seconds, read_bytes = time.perf_counter() - started, shared.total_bytes_read()
    if is_first(group):
        logger.info(
            say_load(
                "reloaded",
                index.uri,
                _size(group),
                num_tensors=len(names),
                held_bytes=num_bytes,
                read_bytes=read_bytes,
                needed_bytes=num_bytes,
                seconds=seconds,
            )
        )
    yield from internals.secondary_tensors(model, load_config)


class LoaderStoppedError(LoadAbortedError):
    """What the other ranks are told where vLLM's loader takes no more tensors."""


@contextmanager
def _stop_explained() -> Iterator[None]:
    try:
        yield
    except GeneratorExit:
        raise LoaderStoppedError(
            "vLLM's loader took no more tensors on that rank, whose own error says why; reload before the next request"
        ) from None


def _names(index: CheckpointIndex, model: nn.Module, origin: Origin | None) -> list[str]:
    """What the rank's loader took of the first checkpoint, where this one is like it; else all that it may look at."""
    if origin is not None and origin.contents == contents_of(index):
        return [name for name in index.names if name in origin.taken]
    skips = internals.skips_tensor(model)
    return [name for name in index.names if not skips(name)]


def forms_of(index: CheckpointIndex, names: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of tensors, by name."""
    positions = {name: index.position(name) for name in names}
    return {name: (index.dtype_of(position).name, index.shape_of(position)) for name, position in positions.items()}


def _refuse_other_shapes(index: CheckpointIndex, taken: dict[str, tuple[str, tuple[int, ...]]], uri: str) -> None:
    """At such a tensor vLLM's loaders would fail without a word, when layers before it have changed already.

    Raises:
        CheckpointError: A tensor has other elements than the one that the model was loaded from.
    """
    for name, (dtype, shape) in forms_of(index, taken.keys() & set(index.names)).items():
        was_dtype, was_shape = taken[name]
        # One element may be a scalar or a vector, and packed elements are counted otherwise.
        if dtype == was_dtype and prod(shape) != prod(was_shape):
            raise CheckpointError(
                f"{uri}: {name} has shape {list(shape)}, and this model was loaded from one of shape {list(was_shape)}: give a "
                "checkpoint of the same model. Nothing was changed"
            )


def _num_bytes(index: CheckpointIndex, name: str) -> int:
    return index.extent_of(index.position(name)).num_bytes


def _size(group: dist.ProcessGroup | None) -> int:
    import torch.distributed as dist

    return 1 if group is None else dist.get_world_size(group)
