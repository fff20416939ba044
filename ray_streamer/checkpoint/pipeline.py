"""Which models does a pipeline of diffusers consist of, and which files hold them?

model_index.json names the components; each has a subfolder, and there its weights, under the names that diffusers or transformers give
them: an index json, one file, or several that are counted. Components without weights, such as tokenizers, have none of them: they have
no config.json either, which tells them from a model whose weights are still to come. A tensor of a pipeline is called COMPONENT.NAME,
since two text encoders may have the same names.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ray_streamer.checkpoint.folder_hints import OTHER_FORMATS
from ray_streamer.checkpoint.json_files import CONFIG_NAME, full_name, read_json_file
from ray_streamer.checkpoint.shard_files import DIFFUSERS_NAME, SINGLE_NAME, SUFFIX, component_files_of
from ray_streamer.checkpoint.strict_json import MalformedJsonError, parse_lenient
from ray_streamer.checkpoint.weight_map import parse_weight_map
from ray_streamer.errors import AccessError, CheckpointError, CredentialsError, ObjectMissingError
from ray_streamer.storage import is_there
from ray_streamer.wording import listed, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.storage import Storage

PIPELINE_NAME = "model_index.json"

_NAMES = (DIFFUSERS_NAME, SINGLE_NAME)
_COMPONENT = re.compile(r"[A-Za-z0-9][\w-]*")
_WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")
"""How classes of components end that have no weights, and so may have no folder."""


def component_files(storage: Storage) -> dict[str, str]:
    """The component of each shard file, by the file's path; empty where no component has any.

    Args:
        storage: Open on the pipeline's folder.

    Raises:
        CheckpointError: model_index.json, or the index json of a component, is malformed.
        ObjectMissingError: A component's weights, or some of them, are missing.
        StorageError: Storage failed.
    """
    try:
        said = parse_lenient(read_json_file(storage, PIPELINE_NAME))
    except MalformedJsonError as error:
        raise CheckpointError(f"{full_name(storage, PIPELINE_NAME)} {error}; fetch it again") from None
    files = {name: _files_of(storage, name, said[name][1]) for name in components_of(said)}
    return {path: name for name, paths in files.items() for path in paths}


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


def _files_of(storage: Storage, component: str, class_name: object) -> list[str]:
    for single in _NAMES:
        name = f"{component}/{single}.index.json"
        try:
            data = read_json_file(storage, name)
        except ObjectMissingError:
            continue
        weight_map = parse_weight_map(data, file=full_name(storage, name))
        return [f"{component}/{path}" for path in weight_map.paths]
    try:
        names = [path.rpartition("/")[2] for path in storage.list(f"{component}/")]
    except ObjectMissingError:
        names = []
    except CredentialsError:
        raise
    except AccessError:
        return [path for single in _NAMES if is_there(storage, path := f"{component}/{single}")][:1]
    found = component_files_of(names, uri=full_name(storage, component))
    others = [name for name in names if name.endswith((SUFFIX, *OTHER_FORMATS))]
    is_expected = others or CONFIG_NAME in names or not (names or str(class_name).endswith(_WITHOUT_WEIGHTS))
    if is_expected and not found:
        raise ObjectMissingError(
            f"{storage.uri} is incomplete: {PIPELINE_NAME} names {component}, which {_told(names, others)}. Wait until the upload or download is "
            "done, or start it again. To load only what is there, give the uri of one component"
        )
    return [f"{component}/{name}" for name in found]


def _told(names: Sequence[str], others: Sequence[str]) -> str:
    """What a component without weights has, as the end of a sentence about it."""
    if not names:
        return "has no files"
    beside = f", only {listed([shown(name) for name in others])}" if others else ""
    return f"has no {' or '.join(_NAMES)}{beside}"
