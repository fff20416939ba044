"""Which models does a pipeline of diffusers consist of, and which files hold them?

model_index.json names the components; each has a subfolder, and there its weights, under one of four names: an index json or one file,
as diffusers or as transformers calls it. Components without weights, such as tokenizers, have none of them. A tensor of a pipeline is
called COMPONENT.NAME, since two text encoders may have the same names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint.json_files import full_name, read_json_file
from ray_streamer.checkpoint.shard_files import DIFFUSERS_NAME, SINGLE_NAME
from ray_streamer.checkpoint.strict_json import MalformedJsonError, parse_lenient
from ray_streamer.checkpoint.weight_map import parse_weight_map
from ray_streamer.errors import CheckpointError, ObjectMissingError
from ray_streamer.storage import is_there

if TYPE_CHECKING:
    from ray_streamer.storage import Storage

PIPELINE_NAME = "model_index.json"

_NAMES = (DIFFUSERS_NAME, SINGLE_NAME)
_COMPONENT = re.compile(r"[A-Za-z0-9][\w-]*")


def component_files(storage: Storage) -> dict[str, str]:
    """The component of each shard file, by the file's path; empty where no component has any.

    Args:
        storage: Open on the pipeline's folder.

    Raises:
        CheckpointError: model_index.json, or the index json of a component, is malformed.
        StorageError: Storage failed.
    """
    try:
        said = parse_lenient(read_json_file(storage, PIPELINE_NAME))
    except MalformedJsonError as error:
        raise CheckpointError(f"{full_name(storage, PIPELINE_NAME)} {error}; fetch it again") from None
    return {path: name for name in components_of(said) for path in _files_of(storage, name)}


def components_of(model_index: dict[str, Any]) -> list[str]:
    """The names of the components that a parsed model_index.json has; those that are optional and left out are null there.

    >>> components_of({"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]})
    ['vae']
    """
    return [
        name
        for name, value in model_index.items()
        if _COMPONENT.fullmatch(name) and isinstance(value, list) and len(value) == 2 and value[1] is not None
    ]


def _files_of(storage: Storage, component: str) -> list[str]:
    for single in _NAMES:
        name = f"{component}/{single}.index.json"
        try:
            data = read_json_file(storage, name)
        except ObjectMissingError:
            continue
        weight_map = parse_weight_map(data, file=full_name(storage, name))
        return [f"{component}/{path}" for path in weight_map.paths]
    return [path for single in _NAMES if is_there(storage, path := f"{component}/{single}")][:1]
