"""How does a model of transformers get its weights through this package? transformers loads it, from tensors without values.

1. config.json and its like come to this node; what transformers could not run is refused.
2. `from_pretrained` of the model's own class runs with lazy tensors for a state dict: it makes the model on meta, applies its
   tensor-parallel plan, renames, stacks and slices. What it asked for is written down.
3. Ranks of a node read that once, and it lands in the parameters.

Weights of which transformers needs the values, such as rotary heads that it permutes, are read at once, by the node's ranks
together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_streamer.api.files import cached
from ray_streamer.api.rank import load_rank
from ray_streamer.errors import CheckpointError, ObjectChangedError, RayStreamerError, SettingsError
from ray_streamer.integrations.transformers.chosen_files import refuse_other_files
from ray_streamer.integrations.transformers.job import device_of, placement, ranks_of
from ray_streamer.integrations.transformers.model_class import class_of, read_config, restore_generation_config
from ray_streamer.integrations.transformers.support import (
    refuse_arguments,
    refuse_packed,
    refuse_quantized,
    refuse_uncuttable,
    require_transformers,
    told_by_transformers,
)
from ray_streamer.integrations.transformers.turns import others_turn, own_turn
from ray_streamer.named_checkpoint import NamedCheckpoint
from ray_streamer.settings import Settings
from ray_streamer.wording import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from ray_streamer.api.arguments import DeviceLike
    from ray_streamer.checkpoint import CheckpointIndex
    from ray_streamer.integrations.transformers.model_class import ModelClass
    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.storage import UrisLike


def from_pretrained(
    model_class: ModelClass,
    uri: UrisLike,
    *,
    tp: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: DeviceLike | None = None,
    settings: Settings | None = None,
    on_statistics: Callable[[RankStatistics], None] | None = None,
    **model_arguments: Any,
) -> PreTrainedModel:
    """The model at `uri`, ready to run; with tp > 1 this rank's part of it, whose forward every rank calls.

    Every rank of the job calls it: under torchrun, in an actor that set RANK, WORLD_SIZE and LOCAL_RANK, or after
    `torch.distributed.init_process_group`. A process on its own needs none of these. Parameters are those of transformers'
    own loading: DTensors where its tensor-parallel plan cuts them, plain tensors elsewhere.

    Args:
        model_class: A class such as LlamaForCausalLM, an Auto class, or "auto" for the class that config.json names.
        uri: As in `load_sharded`; config and tokenizer lie beside the weights.
        tp: Ranks that share the model: all of the job when unset, or 1 for a whole model on each rank.
        dtype: Of the parameters, as transformers takes it; that of config.json, else of the weights when unset.
        device: Of this rank; its GPU, or "cpu" where torch has none, when unset.
        settings: Every knob of the load; from the environment when unset.
        on_statistics: Called with this rank's statistics when the load is complete.
        model_arguments: Further arguments of transformers' `from_pretrained`, such as attn_implementation.

    Raises:
        SettingsError: The arguments do not fit together, or with the job.
        ShardingError: transformers cannot run the model with this tp, or its weights are quantized by a method that is not
            loaded; nothing was read then.
        CheckpointError: Weights are missing, of other shapes, or not what the class expects.
        ObjectChangedError: config.json is not the one that lay beside the weights.
        RayStreamerError: As `load_rank`.
    """
    settings = Settings.of_call(settings)
    build = ModelBuild(
        model_class, uri, tp=tp, dtype=dtype, device=device, settings=settings, model_arguments=model_arguments
    )
    captured = build.captured
    load_rank(
        build.uri,
        slices=captured,
        out=captured.out,
        settings=build.settings,
        device=build.device,
        on_statistics=on_statistics,
    )
    return build.finished()


class ModelBuild:
    """A model on its way: `captured` says what is read for it, and when that is in its memory, `finished` gives it.

    Args:
        model_class: As in `from_pretrained`, like all the others.
        uri: The checkpoint.
        tp: Ranks that share the model.
        dtype: Of the parameters.
        device: Of this rank.
        settings: Every knob.
        model_arguments: Further ones, for transformers.

    Attributes:
        uri: Absolute.
        settings: With what signs the uri.
        device: Where the parameters are made.
        captured: A slice source; it makes the model when it is called, and then `captured.out` has its memory.

    Raises:
        RayStreamerError: As `from_pretrained`, for what is refused.
    """

    def __init__(
        self,
        model_class: ModelClass,
        uri: UrisLike,
        *,
        tp: int | None,
        dtype: torch.dtype | str | None,
        device: DeviceLike | None,
        settings: Settings,
        model_arguments: Mapping[str, Any],
    ) -> None:
        require_transformers()
        refuse_arguments(model_arguments)
        dtype, model_arguments = _dtype_of(dtype, model_arguments)
        named = NamedCheckpoint.of(uri, settings)
        self.uri, self.settings = named.uri, named.settings
        _check_dtype(dtype)
        tp = ranks_of(tp)
        self.device = device_of(device, tp)
        self._folder = cached(self.uri, settings=self.settings)
        config, rest, self._stored_config = read_config(model_class, self._folder, model_arguments, self.settings)
        self._model_class, self._config = class_of(model_class, config, self.uri)
        refuse_other_files(self.uri, self._folder, self._stored_config or {}, self.settings)
        refuse_quantized(getattr(self._config, "quantization_config", None), self.uri)
        refuse_packed(self._config, self.device, self.uri)
        refuse_uncuttable(self._config, tp, self.uri)
        self._said = model_arguments
        of_dtype = {} if dtype is None else {"dtype": dtype}
        self._arguments = {**rest, **of_dtype, **placement(tp, self.device)}
        self._memories: dict[str, torch.Tensor] = {}
        # It imports torch, which whoever is refused above need not wait for.
        from ray_streamer.integrations.captured_slices import CapturedSlices

        self.captured = CapturedSlices(
            self.uri,
            self.settings,
            load=self._make,
            targets=lambda: self._memories,
            skips=lambda name: False,
            around_reads=others_turn,
        )

    def _make(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> PreTrainedModel:
        import torch

        from ray_streamer.integrations.transformers.filling import give_memory

        index = self.captured.index
        assert index is not None
        if index.config is not None and index.config != self._stored_config:
            raise ObjectChangedError(
                f"{self.uri}: config.json was replaced between the start of this load and the reading of the weights; load again"
            )
        # What is made in inference mode counts no versions, which capture needs, and cannot be trained.
        with torch.inference_mode(mode=False):
            named = _by_file(index, dict(tensors))
            model = _built(self._model_class, self._config, self.uri, named, self._arguments)
            # A generation config of the caller's is the model's already.
            if self._arguments.get("generation_config") is None:
                restore_generation_config(model, self._folder, self._said)
            self._memories.update(give_memory(model))
        return model

    def finished(self) -> PreTrainedModel:
        """The model, whose memory has been filled."""
        model = self.captured.loaded
        model.config.name_or_path = self.uri
        for module in model.modules():
            # The model's own and those of its parts with the same config, from which they were made before it had the name.
            if vars(module).get("config") is model.config and "name_or_path" in vars(module):
                module.name_or_path = self.uri
        return model


def _by_file(index: CheckpointIndex, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as transformers comes across them: where config.json says no dtype, that of the first one decides."""

    def place(name: str) -> tuple[str, str]:
        return index.files[index.file_ids[index.position(name)]].path, name

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _built(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    uri: str,
    tensors: dict[str, torch.Tensor],
    model_arguments: Mapping[str, Any],
) -> PreTrainedModel:
    """The model as transformers makes it of `tensors`.

    Raises:
        CheckpointError: It cannot, or weights would be left without values.
        SettingsError: One of the arguments is unknown to it.
    """
    model_class_any: Any = model_class
    try:
        with own_turn():
            model, info = model_class_any.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True, **model_arguments
            )
    except RayStreamerError:
        raise
    except Exception as error:  # also of the model's own class, which may raise any
        unknown = [name for name in model_arguments if isinstance(error, TypeError) and f"'{name}'" in str(error)]
        if unknown:
            raise SettingsError(
                f"transformers' {model_class.__name__} takes no argument {unknown[0]}: {error}"
            ) from error
        raise CheckpointError(
            f"{uri}: transformers' {model_class.__name__} could not be made of its weights: {told_by_transformers(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{uri}: lacks weights of {model_class.__name__}: {listed(missing)}; give the class that the "
            'checkpoint was saved from, or "auto"'
        )
    return model


def _dtype_of(dtype: Any, said: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The dtype that is asked for, and the other arguments: `torch_dtype` is its name in older code, as transformers takes it, too."""
    others = dict(said)
    for name in ("dtype", "torch_dtype"):
        older = others.pop(name, None)
        dtype = older if dtype is None else dtype
    return dtype, others


def _check_dtype(dtype: Any) -> None:
    """Refuses what is no dtype of torch, and names none.

    Raises:
        SettingsError: It is not.
    """
    import torch

    named = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if dtype not in (None, "auto") and not isinstance(named, torch.dtype | dict):
        raise SettingsError(f'dtype is "auto", a dtype of torch or its name, such as "bfloat16"; got {dtype!r}')
