"""What is known of vLLM's inside? Everything that this package uses of it, in one place, and the versions that it was seen in.

Public: `register_model_loader`, `BaseModelLoader`. The rest are names inside of vLLM that may move; where one is missing, the
error says which one, and which versions have it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, cast

from ray_streamer.checkpoint.folder_hints import INDEX_NAME
from ray_streamer.checkpoint.shard_files import CONSOLIDATED_NAME
from ray_streamer.errors import SettingsError
from ray_streamer.settings import ENV_PREFIX

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator

    import torch
    import torch.distributed as dist

TESTED_VERSIONS = ("0.32.0",)

_LOADERS = "vllm.model_executor.model_loader"
_WEIGHTS = "vllm.model_executor.model_loader.weight_utils"
_LAYERWISE = "vllm.model_executor.model_loader.reload.layerwise"
_GROUPS = "vllm.distributed.parallel_state"
_RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
_RUNAI_FORMAT = "runai_streamer"
_MODEL_FILES = "ObjectStorageModel"
_USERS_OF_MODEL_FILES = ("vllm.transformers_utils.runai_utils", "vllm.config.model")

_SECONDS_OF_A_BAR = 2.0

_said_versions: set[str] = set()


def internal(module: str, name: str) -> Any:
    """`name` of vLLM's `module`.

    Raises:
        SettingsError: This vLLM has no such thing; says which versions have it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"load format ray_streamer needs {module}.{name}, which this vLLM {_version()} does not have: {error}. It was tested "
            f"with vLLM {', '.join(TESTED_VERSIONS)}"
        ) from error


def register_format(name: str, loader: type) -> None:
    """Makes `loader` vLLM's load format `name`; does nothing when it is that already."""
    if internal(_LOADERS, "_LOAD_FORMAT_TO_MODEL_LOADER").get(name) is not loader:
        internal(_LOADERS, "register_model_loader")(name)(loader)


def carry_settings_to_ray_workers() -> None:
    """Makes vLLM's Ray executor give its workers our variables, too; it carries those with a few prefixes only."""
    given = [prefix.strip() for prefix in os.environ.get(_RAY_PREFIXES, "").split(",") if prefix.strip()]
    if ENV_PREFIX not in given:
        os.environ[_RAY_PREFIXES] = ",".join([*given, ENV_PREFIX])


def replace_runai(loader: type, model_files: type) -> bool:
    """Makes `loader` vLLM's load format `runai_streamer`, and `model_files` what fetches config and tokenizer from object stores.

    Returns:
        Whether it was another one before.

    Raises:
        SettingsError: This vLLM has no such things; nothing was replaced then.
    """
    registry = internal(_LOADERS, "_LOAD_FORMAT_TO_MODEL_LOADER")
    for module in _USERS_OF_MODEL_FILES:
        internal(module, _MODEL_FILES)
    for module in _USERS_OF_MODEL_FILES:
        setattr(importlib.import_module(module), _MODEL_FILES, model_files)
    is_new = registry.get(_RUNAI_FORMAT) is not loader
    # Written here, as vLLM's own way to register would warn that a format is overwritten. That is what was asked for.
    registry[_RUNAI_FORMAT] = loader
    return is_new


def logger_of(name: str) -> logging.Logger:
    """A logger whose lines come out as vLLM's own do."""
    return internal("vllm.logger", "init_logger")(f"vllm.{name}")


def say_untested_version(logger: logging.Logger) -> None:
    """One warning per process when this vLLM is none that this package was tested with."""
    version = _version()
    if version.split("+")[0] not in TESTED_VERSIONS and version not in _said_versions:
        _said_versions.add(version)
        logger.warning(
            "ray_streamer was tested with vLLM %s; this is %s. Loads check themselves, but compare a few answers.",
            ", ".join(TESTED_VERSIONS),
            version,
        )


def is_draft(model_config: Any) -> bool:
    """Whether this is the configuration of a draft model, which gets the options of its target."""
    config = internal("vllm.config", "get_current_vllm_config")()
    return config.model_config is not None and model_config is not config.model_config


def has_targets_folder(model_config: Any) -> bool:
    """Whether a draft model is called as its target is, as MTP layers are, which lie in the target's files."""
    target = internal("vllm.config", "get_current_vllm_config")().model_config
    return target is not None and model_config.model == target.model


def loading_group(model_config: Any) -> dist.ProcessGroup | None:
    """Host-side group of the ranks that all load this model at the same time; None for a single rank.

    All ranks of the engine load its model. A draft model exists in some stages of a pipeline only, so its ranks are those of one
    tensor-parallel group.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return None
    name = "get_tp_group" if is_draft(model_config) else "get_world_group"
    group = internal(_GROUPS, name)()
    return group.cpu_group if group.world_size > 1 else None


def place_of_weights(model_config: Any, load_config: Any) -> str:
    """Where vLLM itself would look for the weights of that model. Those of a model of the Hugging Face Hub are downloaded first.

    Downloads once per node: vLLM's own function takes a lock.
    """
    place = model_config.model_weights or model_config.model
    # What can be no name on the Hub is a path, if only one that does not exist.
    if "://" in place or os.path.isdir(place) or os.path.isabs(place):
        return place
    cache, revision = load_config.download_dir, model_config.revision
    folder = internal(_WEIGHTS, "download_weights_from_hf")(
        place, cache, ["*.safetensors"], revision, ignore_patterns=load_config.ignore_patterns
    )
    for name in (INDEX_NAME, f"{CONSOLIDATED_NAME}.index.json"):
        internal(_WEIGHTS, "download_safetensors_index_file_from_hf")(place, name, cache, revision=revision)
    return folder


def place_of_config(model_config: Any) -> str | None:
    """What the engine calls the place of its config.json; None where the caller named another one than the model's own."""
    return model_config.model if getattr(model_config, "hf_config_path", None) is None else None


def reloading_group() -> dist.ProcessGroup | None:
    """Host-side group of the ranks that surely reload together; None for a single rank.

    Stages of a pipeline reload other tensors, and engines that share experts may be told to reload one by one.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return None
    group = internal(_GROUPS, "get_tp_group")()
    return group.cpu_group if group.world_size > 1 else None


def put_back_unfinished(model: Any) -> int:
    """Gives the layers that a failed reload left without memory their own again, with whatever it holds.

    vLLM would take what the failed reload had collected for them as part of the next one.

    Returns:
        How many layers that were.
    """
    info_of, place = internal(_LAYERWISE, "get_layerwise_info"), internal(_LAYERWISE, "_place_kernel_tensors")
    count = 0
    for layer in model.modules():
        info = info_of(layer)
        if info.can_load() and info.kernel_tensors is not None:
            place(layer, info)
            info.reset()
            count += 1
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload
    return count


def progress_bar(load_config: Any, *, doing: str, num_bytes: int) -> Any:
    """A bar as vLLM's own loaders show it, on its first rank only; `update` takes bytes."""
    bar, is_shown = internal(_WEIGHTS, "tqdm"), internal(_WEIGHTS, "enable_tqdm")(load_config.use_tqdm_on_load)
    return bar(
        total=num_bytes,
        desc=doing,
        unit="B",
        unit_scale=True,
        disable=not is_shown,
        bar_format=internal(_WEIGHTS, "_BAR_FORMAT"),
        # Each state of the bar is a line of its own in that format.
        mininterval=_SECONDS_OF_A_BAR,
    )


def skips_tensor(model: Any) -> Callable[[str], bool]:
    """The model's own word on which tensors of its checkpoint it never looks at."""
    return getattr(model, "is_unused_checkpoint_weight", None) or (lambda name: False)


def refuse_own_files(model: Any) -> None:
    """Models that choose their files by pattern are not loaded by this format.

    Raises:
        SettingsError: This is one.
    """
    patterns = getattr(model, "allow_patterns_overrides", None)
    if patterns is not None:
        raise SettingsError(
            f"{type(model).__name__} loads the files {patterns} only, which load format ray_streamer cannot; use --load-format auto"
        )


def secondary_tensors(model: Any, load_config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that the model takes from other places than its checkpoint, read as vLLM's own loader reads them."""
    sources = getattr(model, "secondary_weights", ())
    if not sources:
        return
    stock = _stock_loader(load_config)
    for source in sources:
        yield from stock._get_weights_iterator(source)


def uses_head(model: Any, model_config: Any) -> bool:
    """Whether anything of the model is computed by its `lm_head`.

    vLLM's adapters make embedding models and classifiers of language models, without their head. Rerankers are classifiers
    whose weights are rows of the head.
    """
    if model_config.runner_type != "pooling":
        return True
    configs = (model_config.hf_config, model_config.hf_text_config)
    if any(getattr(config, key, None) for config in configs for key in ("classifier_from_token", "method")):
        return True
    has_head = any(path.rpartition(".")[2] == "lm_head" for path, _ in model.named_modules(remove_duplicate=False))
    return model_config.convert_type == "none" and has_head


def refuse_missing(model: Any, loaded: set[str] | None, model_config: Any) -> None:
    """Refuses a model with parameters that nothing was loaded into, where vLLM's own loader does.

    Raises:
        ValueError: vLLM's own, which names the parameters.
    """
    if model_config.quantization is None and loaded is not None:
        check = internal(_LOADERS, "DefaultModelLoader").track_weights_loading
        check(cast("Any", None), model, loaded)


def _stock_loader(load_config: Any) -> Any:
    replace = internal("vllm.config", "replace")
    # As vLLM's default takes them: files of such a source may be .pt or .bin.
    plain = replace(load_config, load_format="auto", model_loader_extra_config={})
    return internal(_LOADERS, "DefaultModelLoader")(plain)


def _version() -> str:
    import vllm

    return str(getattr(vllm, "__version__", "of unknown version"))
