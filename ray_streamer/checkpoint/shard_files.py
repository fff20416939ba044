"""Which files of a folder hold the model when no index json says so, and are all of them there?

Names tell: `model-00002-of-00003.safetensors` is one of three files, whatever else is in the folder. A folder that lacks one of them is
refused, since the tensors that are there cannot tell of those that are not: an interrupted download or copy looks so, and so does every
upload under way, whose index json comes last. Files of other parts of a repository are left alone: adapters, unless there is nothing
else, and the copy in Mistral's own layout. What there is instead of a checkpoint is for `folder_hints`.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ray_streamer.errors import CheckpointError, ObjectMissingError
from ray_streamer.storage.base import is_there
from ray_streamer.units import counted, verb
from ray_streamer.wording import NUM_LISTED, listed, printable, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ray_streamer.storage.base import Storage

_logger = logging.getLogger(__name__)

SINGLE_NAME = "model.safetensors"
DIFFUSERS_NAME = "diffusion_pytorch_model.safetensors"
"""As `SINGLE_NAME`, of a component of a pipeline."""
SUFFIX = ".safetensors"

OTHER_LAYOUT = "consolidated"
CONSOLIDATED_NAME = f"{OTHER_LAYOUT}{SUFFIX}"
"""As `SINGLE_NAME`, of the copy in Mistral's own layout."""
ADAPTER = "adapter_model"
ADAPTER_NAME = f"{ADAPTER}{SUFFIX}"
"""As `SINGLE_NAME`, of an adapter."""
ADAPTER_CONFIG_NAME = "adapter_config.json"

# number-of-total, as in model-00002-of-00003, model_2_of_3, model.fp16-00002-of-00003 or model-00002-of-00003.fp16.
_COUNTED = re.compile(r"(.*?)([0-9]{1,9})([-_. ]?of[-_. ]?)([0-9]{1,9})(?![0-9])(.*)", re.IGNORECASE | re.DOTALL)
# One file, or one of several that are counted, as diffusers or as transformers calls it; not a variant.
_USUAL = re.compile(r"(?:diffusion_pytorch_model|model)(?:-[0-9]+-of-[0-9]+)?\.safetensors")
# A number without a total, as in rank3, part-0 or shard_01: only those between the lowest and the highest must be there.
_NUMBERED = re.compile(r"(.*(?:rank|part|shard)[-_.]?)([0-9]{1,9})(?![0-9])(.*)", re.IGNORECASE | re.DOTALL)
# torch.distributed.checkpoint: shard-00001-model-00002-of-00003, where each writer has files of its own.
_WRITER = re.compile(r"shard-[0-9]+-")
# vLLM's sharded_state: what one rank holds after vLLM processed it, under the names of whole tensors.
_STATE_OF_RANK = re.compile(r"model-rank-[0-9]+-part-[0-9]+\.safetensors")
_UNFINISHED = (
    re.compile(r"(.+\.safetensors)\.(?:incomplete|part|partial|filepart|tmp|temp|crdownload|download)"),
    re.compile(r"\.(.+\.safetensors)\.[A-Za-z0-9]{6}"),
)
# aria2 gives a file its full size at once, and keeps this beside it until it is whole.
_JOURNAL = ".aria2"


def shard_files_of(names: Sequence[str], *, uri: str) -> list[str]:
    """The shard files among the files of a folder without an index json, sorted; empty when none is one of a model.

    Args:
        names: Files of the folder, links that lead nowhere among them.
        uri: The folder, for messages.

    Raises:
        ObjectMissingError: Names say that there are more files than the folder has; lists them.
        CheckpointError: The files are what vLLM's ranks held.

    >>> shard_files_of(["model-1-of-2.safetensors", "model-2-of-2.safetensors", "notes.txt"], uri="s3://b/m")
    ['model-1-of-2.safetensors', 'model-2-of-2.safetensors']
    """
    if SINGLE_NAME not in names:
        refuse_states_of_ranks(names, uri=uri)
    found = _complete_files_of(names, (SINGLE_NAME, DIFFUSERS_NAME), is_meant=_is_of_model, uri=uri)
    beside = sorted(set(filter(_is_of_model, names)) - set(found))
    if beside:
        _logger.warning(
            "%s: only %s is read; no index json names %s beside it", printable(uri), found[0], listed(beside)
        )
    return found


def refuse_states_of_ranks(names: Sequence[str], *, uri: str) -> None:
    """Refuses a folder of vLLM's sharded_state, whose files are no checkpoint.

    Args:
        names: Files of the folder.
        uri: The folder, for messages.

    Raises:
        CheckpointError: It is one.
    """
    state = next(filter(_STATE_OF_RANK.fullmatch, names), None)
    if state is not None:
        raise CheckpointError(
            f"{uri}: {state} holds the part of one rank, as vLLM's sharded_state writes it. Give the checkpoint that it was made "
            "from, or load it with vLLM's --load-format sharded_state and as many ranks"
        )


def tell_unnamed(storage: Storage, paths: Sequence[str], *, index_name: str) -> None:
    """One warning about a model.safetensors that the index json does not name; other libraries may read that instead.

    Only of folders of this machine, where to look costs no request.

    Args:
        storage: The folder.
        paths: Files that the index json names.
        index_name: Its name.
    """
    if SINGLE_NAME not in paths and not storage.is_remote and is_there(storage, SINGLE_NAME):
        _logger.warning(
            "%s: %s is read, and not %s beside it, which it does not name; give the uri of the file to load that",
            printable(storage.uri),
            index_name,
            SINGLE_NAME,
        )


def adapter_files_of(names: Sequence[str], *, uri: str) -> list[str]:
    """The files of an adapter (LoRA) that is all there is in a folder, sorted; empty where there is none.

    Args:
        names: As in `shard_files_of`.
        uri: The folder, for messages.

    Raises:
        ObjectMissingError: As `shard_files_of`.

    >>> adapter_files_of(["README.md", "adapter_config.json", "adapter_model.safetensors"], uri="s3://b/m")
    ['adapter_model.safetensors']
    """
    if ADAPTER_CONFIG_NAME not in names:
        return []
    return _complete_files_of(names, (ADAPTER_NAME,), is_meant=is_of_adapter, uri=uri)


def component_files_of(names: Sequence[str], *, uri: str) -> list[str]:
    """The files of a pipeline's component without an index json, sorted; empty where none has the usual name.

    Variants, such as `model.fp16.safetensors`, are left alone.

    Args:
        names: As in `shard_files_of`.
        uri: The component's folder, for messages.

    Raises:
        ObjectMissingError: As `shard_files_of`.

    >>> component_files_of(["model.fp16.safetensors", "model.safetensors"], uri="s3://b/m/vae")
    ['model.safetensors']
    """
    return _complete_files_of(names, (DIFFUSERS_NAME, SINGLE_NAME), is_meant=_is_of_component, uri=uri)


def _complete_files_of(
    names: Sequence[str], alone: Sequence[str], *, is_meant: Callable[[str], bool], uri: str
) -> list[str]:
    """The first of `alone` that is there, else all files that are meant; refused where names tell of more."""
    single = next((name for name in alone if name in names), None)
    found = [single] if single else sorted(filter(is_meant, names))
    gaps = [*_gaps_of_counted(found), *_gaps_of_numbered(found)]
    unfinished = sorted(_unfinished(names, found, alone=alone, is_meant=is_meant))
    if gaps or unfinished:
        raise ObjectMissingError(f"{uri} is incomplete: {_told(found, gaps, unfinished)}")
    return found


def is_of_adapter(name: str) -> bool:
    """Whether a file has this name because it holds an adapter."""
    return name.startswith(ADAPTER) and name.endswith(SUFFIX)


def _is_of_model(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith((OTHER_LAYOUT, ADAPTER, "."))


def _is_of_component(name: str) -> bool:
    """Whether a file has one of the usual names, or a number in it."""
    return _is_of_model(name) and _USUAL.match(name) is not None


def _unfinished(
    names: Sequence[str], found: Sequence[str], *, alone: Sequence[str], is_meant: Callable[[str], bool]
) -> set[str]:
    """What a tool is writing, or was when it was stopped; what is left beside the whole file does no harm."""
    written = {matched[1] for name in names for pattern in _UNFINISHED if (matched := pattern.fullmatch(name))}
    awaited = set(filter(is_meant, written)) - set(found)
    return (awaited if not set(alone) & set(found) else set()) | {name for name in found if name + _JOURNAL in names}


@dataclass(frozen=True, slots=True)
class _Gap:
    """Files that should be there: how many, and the names of the first."""

    num_files: int
    names: tuple[str, ...]


def _gaps_of_counted(found: Sequence[str]) -> Iterator[_Gap]:
    """Gaps in each set of files whose names say how many there are."""
    sets: defaultdict[tuple[str, ...], dict[int, int]] = defaultdict(dict)
    for name in found:
        if matched := _COUNTED.fullmatch(_WRITER.sub("", name)):
            head, number, of, total, tail = matched.groups()
            sets[head, of, total, tail][int(number)] = len(number)
    for (head, of, total, tail), numbers in sets.items():
        first = 0 if 0 in numbers else 1
        if max(numbers) < first + int(total):
            yield from _gap(head, numbers, range(first, first + int(total)), f"{of}{total}{tail}")


def _gaps_of_numbered(found: Sequence[str]) -> Iterator[_Gap]:
    """Gaps in each set of files whose names have a number alone."""
    sets: defaultdict[tuple[str, ...], dict[int, int]] = defaultdict(dict)
    for name in found:
        if not _COUNTED.fullmatch(name) and (matched := _NUMBERED.fullmatch(name)):
            sets[matched[1], matched[3]][int(matched[2])] = len(matched[2])
    for (head, tail), numbers in sets.items():
        yield from _gap(head, numbers, range(min(numbers), max(numbers)), tail)


def _gap(head: str, numbers: Mapping[int, int], wanted: range, tail: str) -> Iterator[_Gap]:
    """Those of `wanted` that are no key of `numbers`; its values are how many digits a number is written with."""
    width = min(numbers.values())
    if num_files := len(wanted) - sum(number in wanted for number in numbers):
        absent = islice((number for number in wanted if number not in numbers), NUM_LISTED)
        yield _Gap(num_files, tuple(f"{head}{number:0{width}d}{tail}" for number in absent))


def _told(found: Sequence[str], gaps: Sequence[_Gap], unfinished: Sequence[str]) -> str:
    clauses: list[str] = []
    if num_missing := sum(gap.num_files for gap in gaps):
        names = [shown(name) for gap in gaps for name in gap.names][:NUM_LISTED]
        more = f" and {num_missing - len(names)} more" if num_missing > len(names) else ""
        clauses.append(
            f"{counted(num_missing, 'file')} {verb(num_missing, 'is', 'are')} missing, by the "
            f"{'name' if len(found) == 1 else 'names'} of the {len(found)} that {verb(len(found), 'is', 'are')} there: {', '.join(names)}{more}"
        )
    if unfinished:
        names, are = listed([shown(name) for name in unfinished]), verb(len(unfinished), "is", "are")
        clauses.append(f"{names} {are} not completely written")
    return (
        f"{'; '.join(clauses)}. Wait until the upload or download is done, or start it again. To load only what is there, "
        "give the uri of one file, or of an index json that names the tensors"
    )
