"""Which file of a checkpoint holds each tensor, by its `model.safetensors.index.json`?

File names in it come from outside: one that could lead out of the checkpoint's folder is refused before anything is read.
Whether headers agree is for `disagreements`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.checkpoint.foreign import foreign_format
from ray_streamer.checkpoint.strict_json import MalformedJsonError, parse_strict
from ray_streamer.collector import collector_paused
from ray_streamer.errors import CheckpointError
from ray_streamer.wording import has_controls, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True, slots=True)
class WeightMap:
    """What an index json says.

    Attributes:
        files: Tensor name -> file name, without "." components.
        dotted: File names as written that have "." components, sorted.
    """

    files: Mapping[str, str]
    dotted: tuple[str, ...] = ()

    @property
    def paths(self) -> list[str]:
        """The files, sorted, each once."""
        return sorted(set(self.files.values()))


@collector_paused()
def parse_weight_map(data: bytes, *, file: str) -> WeightMap:
    """The file of each tensor, with every file name checked.

    Args:
        data: The whole index json.
        file: What messages call it.

    Raises:
        CheckpointError: Malformed, or a file name leaves the checkpoint's folder or is no safetensors file.
    """
    try:
        weight_map = parse_strict(data).get("weight_map")
    except MalformedJsonError as error:
        raise CheckpointError(f"{file} {foreign_format(data) or f'{error}; fetch it again'}") from None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{file} must have an object 'weight_map' of tensor name to file name, got {type(weight_map).__name__}"
        )
    if not weight_map:
        raise CheckpointError(f"{file}: 'weight_map' names no tensor")
    if set(map(type, weight_map.values())) != {str}:
        tensor, name = next((tensor, name) for tensor, name in weight_map.items() if not isinstance(name, str))
        raise CheckpointError(
            f"{file}: 'weight_map' must give a file name for {shown(tensor)}, got {type(name).__name__}"
        )
    names = sorted(set(weight_map.values()))
    plain = {name: _without_dots(name) for name in names}
    for name in names:
        check_file_name(name, plain[name], file=file)
    dotted = tuple(name for name in names if plain[name] != name)
    return WeightMap({tensor: plain[name] for tensor, name in weight_map.items()} if dotted else weight_map, dotted)


def check_file_name(name: str, plain: str, *, file: str) -> None:
    """Refuse a file name that is not a relative path of a `.safetensors` file inside the checkpoint's folder.

    Args:
        name: As it is written.
        plain: Without "." components.
        file: Where it is written.

    Raises:
        CheckpointError: Names the rule that was broken.
    """
    if any(component in {"", ".", ".."} for component in plain.split("/")):
        rule = "must be a relative path without empty or '..' components"
    elif "\\" in name:
        rule = "must separate components by '/', not by a backslash"
    elif has_controls(name):
        rule = "must not hold control characters"
    elif _SCHEME.match(plain) or plain.startswith("~"):
        rule = "must be a relative path, not a URL, drive or home folder"
    elif not name.endswith(".safetensors"):
        rule = "must end in .safetensors; convert the checkpoint to safetensors first"
    else:
        return
    raise CheckpointError(f"{file}: file name {shown(name)} {rule}")


def _without_dots(name: str) -> str:
    """The same file: `./a` and `b/./a` are written so by tools that join paths.

    >>> _without_dots("./b/./a.safetensors")
    'b/a.safetensors'
    """
    return "/".join(component for component in name.split("/") if component != ".")
