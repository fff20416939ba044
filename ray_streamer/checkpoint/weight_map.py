"""What does `model.safetensors.index.json` say, and do the headers agree?

The headers are the truth; the index json names the files to read, and any disagreement is an error, since it means that
files of two versions were mixed or that one was not fetched. File names in it come from outside: one that could lead out
of the checkpoint's folder is refused before anything is read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ray_streamer.checkpoint.strict_json import MalformedJsonError, parse_strict, shown
from ray_streamer.errors import CheckpointError, IndexMismatchError

if TYPE_CHECKING:
    from collections.abc import Collection

    from ray_streamer.checkpoint.index import CheckpointIndex

_NUM_LISTED = 5
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def parse_weight_map(data: bytes, *, file: str) -> dict[str, str]:
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
        raise CheckpointError(f"{file} {error}; fetch it again") from None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{file} must have an object 'weight_map' of tensor name to file name, got {type(weight_map).__name__}"
        )
    if not weight_map:
        raise CheckpointError(f"{file}: 'weight_map' names no tensor")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{file}: 'weight_map' must give a file name for {shown(tensor)}, got {type(name).__name__}"
            )
    for name in sorted(set(weight_map.values())):
        check_file_name(name, file=file)
    return weight_map


def check_file_name(name: str, *, file: str) -> None:
    """Refuse a file name that is not a plain relative path of a `.safetensors` file inside the checkpoint's folder.

    Raises:
        CheckpointError: Names the rule that was broken.
    """
    if any(component in {"", ".", ".."} for component in name.split("/")):
        rule = "must be a relative path without empty, '.' or '..' components"
    elif "\\" in name:
        rule = "must separate components by '/', not by a backslash"
    elif _CONTROL.search(name):
        rule = "must not hold control characters"
    elif _SCHEME.match(name) or name.startswith("~"):
        rule = "must be a relative path, not a URL, drive or home folder"
    elif not name.endswith(".safetensors"):
        rule = "must end in .safetensors; convert the checkpoint to safetensors first"
    else:
        return
    raise CheckpointError(f"{file}: file name {shown(name)} {rule}")


def cross_check(weight_map: dict[str, str], index: CheckpointIndex, *, file: str) -> None:
    """Compare what the index json says with what the headers say.

    Raises:
        IndexMismatchError: Counts and lists tensors that are missing, extra, or in another file.
    """
    paths = [shard.path for shard in index.files]
    found = {name: paths[file_id] for name, file_id in zip(index.names, index.file_ids.tolist(), strict=True)}
    if found == weight_map:
        return
    missing = [f"{shown(name)} (in {weight_map[name]})" for name in weight_map if name not in found]
    extra = [f"{shown(name)} (in {found[name]})" for name in found if name not in weight_map]
    moved = [
        f"{shown(name)} (in {found[name]}, not in {path})"
        for name, path in weight_map.items()
        if name in found and found[name] != path
    ]
    differences = [
        f"{len(tensors)} of its tensors {what}: {listed(tensors)}"
        for what, tensors in (("are in no header", missing), ("are in another file", moved))
        if tensors
    ]
    if extra:
        differences.append(f"{len(extra)} tensors in its files are not in it: {listed(extra)}")
    raise IndexMismatchError(
        f"{file} and the headers of its files disagree: {'; '.join(differences)}; "
        "fetch the index and all files again from one revision"
    )


def listed(items: Collection[str]) -> str:
    """The first few of `items`, and how many more there are."""
    more = f" and {len(items) - _NUM_LISTED} more" if len(items) > _NUM_LISTED else ""
    return ", ".join(item for item, _ in zip(items, range(_NUM_LISTED), strict=False)) + more
