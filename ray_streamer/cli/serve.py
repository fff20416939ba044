"""`ray-streamer serve`: fetch config and tokenizer, then become `vllm serve` with the weights streamed from the uri."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ray_streamer.cli.command import Command, verbose_option
from ray_streamer.cli.settings import with_settings
from ray_streamer.cli.uris import URI
from ray_streamer.errors import SettingsError
from ray_streamer.settings import ENV_PREFIX, SECRET_SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike

_EXTRA_CONFIG = "--model-loader-extra-config"
_SERVED_NAME = "--served-model-name"
_SET_HERE = ("--load-format", "--model")
_KNOWN_HERE = (*_SET_HERE, _EXTRA_CONFIG, _SERVED_NAME)
_FEWEST_CHARS = len("--load-f")
"""Shorter beginnings mean several arguments of vLLM, which refuses them."""


@click.command("serve", cls=Command)
@click.argument("uri", type=URI)
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM SERVE ARGUMENTS]")
@verbose_option
@with_settings
def command(uri: UrisLike, vllm_arguments: tuple[str, ...], settings: Settings) -> NoReturn:
    """Serve the checkpoint at URI with vLLM. What stands after -- is passed to `vllm serve` as it is.

    Config and tokenizer files come to this node's cache; weights go from URI straight into vLLM's parameters.

        ray-streamer serve s3://bucket/model -- --tensor-parallel-size 8 --port 8000
    """
    from ray_streamer.api.files import cached
    from ray_streamer.named_checkpoint import NamedCheckpoint

    program = find_vllm()
    named = NamedCheckpoint.of(uri, settings)
    folder = cached(named.uri, settings=named.settings)
    arguments = serve_arguments(named.uri, folder, vllm_arguments, settings)
    if named.settings.http_signed is not None:
        # Command lines are public, and vLLM logs its own.
        os.environ[f"{ENV_PREFIX}HTTP_SIGNED"] = named.settings.http_signed.get_secret_value()
    os.execv(program, [program, *arguments])


def find_vllm() -> str:
    """The `vllm` command of this environment, else the one on the PATH.

    Raises:
        SettingsError: There is none.
    """
    found = shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")
    if found is None:
        raise SettingsError('there is no vllm command here; install it with: pip install "ray_streamer[vllm]"')
    return found


def serve_arguments(uri: str, folder: Path, given: Sequence[str], settings: Settings) -> list[str]:
    """What `vllm` is called with.

    Args:
        uri: Where the weights are.
        folder: Where config and tokenizer are.
        given: The caller's own arguments of `vllm serve`.
        settings: Those that were set go to the load format; secrets stay in the environment.

    Raises:
        SettingsError: `given` has an argument that this command sets itself, a model, or an extra config that is no JSON object.
    """
    rest, extra = _without_extra_config(given)
    if rest and not rest[0].startswith("-"):
        raise SettingsError(
            f"{rest[0]!r} stands where vllm serve takes a model, which is {uri} here; give arguments that begin with --"
        )
    names = {_name_of(argument) for argument in rest}
    for name in _SET_HERE:
        if name in names:
            raise SettingsError(f"{name} is set by ray-streamer serve; call vllm serve itself to choose another one")
    chosen = settings.model_dump(mode="json", include=settings.model_fields_set - SECRET_SETTINGS)
    served = [] if _SERVED_NAME in names else [_SERVED_NAME, uri]
    config = json.dumps({"uri": uri, **chosen, **extra})
    mistral = _mistral_arguments(folder, rest)
    return ["serve", str(folder), "--load-format", "ray_streamer", _EXTRA_CONFIG, config, *mistral, *served, *rest]


def _mistral_arguments(folder: Path, given: Sequence[str]) -> list[str]:
    """What vLLM is told of a folder in Mistral's own format, which it knows by the weights that are not there."""
    names = {path.name for path in folder.glob("*")}
    said = {argument.partition("=")[0].replace("_", "-") for argument in given}
    flags: list[str] = []
    if "params.json" in names and "config.json" not in names:
        flags.append("--config-format")
    is_mistrals = "tekken.json" in names or any(name.startswith("tokenizer.model.v") for name in names)
    if is_mistrals and not names & {"tokenizer.json", "tokenizer_config.json"}:
        flags.append("--tokenizer-mode")
    return [word for flag in flags if flag not in said for word in (flag, "mistral")]


def _without_extra_config(given: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments less the loader's extra config, and that config."""
    rest: list[str] = []
    extra: dict[str, Any] = {}
    waiting = iter(given)
    for argument in waiting:
        name, has_value, value = argument.partition("=")
        if _name_of(argument) != _EXTRA_CONFIG:
            rest.append(argument)
            continue
        if "." in name:
            raise SettingsError(f'give one JSON object, as in {_EXTRA_CONFIG} {{"concurrency": 32}}, instead of {name}')
        text = value if has_value else next(waiting, "")
        try:
            extra = json.loads(text)
        except ValueError:
            extra = {}
        if not isinstance(extra, dict) or not extra:
            raise SettingsError(f'{_EXTRA_CONFIG} must be a JSON object such as {{"concurrency": 32}}, got {text!r}')
    return rest, extra


def _name_of(argument: str) -> str:
    """What vLLM takes an argument for, of those that matter here: it takes "_" for "-", keys after a ".", and beginnings of long names."""
    name = argument.partition("=")[0].partition(".")[0].replace("_", "-")
    if not name.startswith("--"):
        return name
    return next((known for known in _KNOWN_HERE if known.startswith(name) and len(name) >= _FEWEST_CHARS), name)
