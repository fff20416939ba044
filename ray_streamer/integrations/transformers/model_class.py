"""Which class is the model at a uri of, and what are its configs? Read from config.json, which says both, and generation_config.json."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint.json_files import read_config as read_stored_config
from ray_streamer.errors import CheckpointError, SettingsError
from ray_streamer.integrations.transformers.support import (
    refuse_endless,
    refuse_remote_code,
    told_by_transformers,
)
from ray_streamer.storage import open_storage
from ray_streamer.wording import brief

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from ray_streamer.settings import Settings

ModelClass = Any
"""A model class, an Auto class, or "auto": pyright knows no common type of Auto classes and models."""


def read_config(
    asked: ModelClass, folder: Path, said: Mapping[str, Any], settings: Settings
) -> tuple[PretrainedConfig, dict[str, Any], dict[str, Any] | None]:
    """The config of the model in `folder`, with what the caller says of it; what else the caller says; and config.json itself.

    Args:
        asked: The model class. A class of models says which config it takes, such as that of a tower; there as in transformers.
        folder: Has config.json.
        said: Arguments for transformers' `from_pretrained`. Those that the config has take its values' place, as there.
        settings: How files are read.

    Raises:
        CheckpointError: There is no config, as of an adapter, or transformers does not know its type, or refuses its values;
            or the checkpoint's own code is asked for.
    """
    with contextlib.closing(open_storage(folder, settings)) as storage:
        stored = read_stored_config(storage)
    refuse_remote_code(asked, stored or {}, said, str(folder))
    refuse_endless({**(stored or {}), **said}, str(folder))
    arguments = {**said, "trust_remote_code": False, "local_files_only": True}
    try:
        found: Any = _config_class(asked).from_pretrained(str(folder), return_unused_kwargs=True, **arguments)
    except Exception as error:  # also of the config's own class, which may raise any
        if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder} is an adapter; give the uri of the model that it belongs to, and load the adapter into it"
            ) from error
        of = f" and {', '.join(said)}" if said else ""
        raise CheckpointError(
            f"{folder}: transformers {_version()} makes no config of its config.json{of}: {told_by_transformers(error)}"
        ) from error
    config, rest = found
    _keep_quantization(config, (stored or {}).get("quantization_config"))
    return config, rest, stored


def _config_class(asked: ModelClass) -> Any:
    from transformers import AutoConfig, PreTrainedModel

    is_model = isinstance(asked, type) and issubclass(asked, PreTrainedModel)
    return (asked.config_class if is_model else None) or AutoConfig


def _keep_quantization(config: PretrainedConfig, said: Any) -> None:
    """Gives the config of a part of the model the quantization of the whole one, as transformers' Auto classes do."""
    if said is not None and getattr(config, "quantization_config", None) is None:
        config.quantization_config = said


def class_of(asked: ModelClass, config: PretrainedConfig, uri: str) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The concrete class that `asked` means for a model with `config`, and its config: of a class of the text alone, that of the text.

    Raises:
        SettingsError: `asked` is neither a class of models nor "auto", or an Auto class without a class for this config.
        CheckpointError: config.json names no class that transformers has.
    """
    from transformers import PreTrainedModel

    if asked == "auto":
        return _class_that_wrote(config, uri), config
    if isinstance(asked, type) and issubclass(asked, PreTrainedModel):
        return asked, config
    by_config: Any = getattr(asked, "_model_mapping", None)
    if by_config is None:
        raise SettingsError(
            f'the model class is "auto", a class such as LlamaForCausalLM, or an Auto class such as AutoModel; got {asked!r}'
        )
    if type(config) not in by_config:
        raise SettingsError(f"{uri}: {asked.__name__} has no class for {type(config).__name__}; give another one")
    found: Any = by_config[type(config)]
    found = found[0] if isinstance(found, list | tuple) else found
    text_class = config.sub_configs.get("text_config")
    if text_class is None or found.config_class != text_class:
        return found, config
    text: Any = config.get_text_config()
    _keep_quantization(text, getattr(config, "quantization_config", None))
    return found, text


def _class_that_wrote(config: PretrainedConfig, uri: str) -> type[PreTrainedModel]:
    """The first of config.json's architectures."""
    from transformers import PreTrainedModel

    names: Any = config.architectures or []
    name = names[0] if isinstance(names, list) and names else names
    found: Any = getattr(importlib.import_module("transformers"), name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        said = (
            f"names class {brief(name)}, no model of transformers {_version()}" if names else "names no architectures"
        )
        raise CheckpointError(f'{uri}: config.json {said}; give the class instead of "auto"')
    return found


def restore_generation_config(model: PreTrainedModel, folder: Path, said: Mapping[str, Any]) -> None:
    """What transformers does itself when it loads from a folder: the words of old checkpoints stand in config.json.

    Args:
        model: Gets it.
        folder: Has generation_config.json, or config.json.
        said: What the caller says. Arguments that a generation config has, such as eos_token_id, take the place of values of
            generation_config.json.

    Raises:
        CheckpointError: generation_config.json says what transformers refuses.
    """
    if not model.can_generate():
        return
    from transformers import GenerationConfig

    known = GenerationConfig()
    arguments: Any = {name: value for name, value in said.items() if hasattr(known, name)}
    try:
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True, **arguments)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            str(folder), config_file_name="config.json", local_files_only=True, _from_model_config=True
        )
    except Exception as error:  # also of its values, which may raise any
        raise CheckpointError(
            f"{folder}: transformers takes no generation config from its generation_config.json: {told_by_transformers(error)}"
        ) from error


def _version() -> str:
    return str(importlib.import_module("transformers").__version__)
