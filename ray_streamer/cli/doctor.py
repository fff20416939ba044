"""`ray-streamer doctor`: what can this node, and its cluster, do, what stands in the way, and what should a load take?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_streamer.cli.command import Command, in_own_flags, json_option, print_json, verbose_option
from ray_streamer.cli.mesh import nodes_option
from ray_streamer.cli.outputs import OUTPUT_FILE
from ray_streamer.cli.parsed import Parsed
from ray_streamer.cli.settings import with_settings
from ray_streamer.cli.sharding import with_rules_and_results
from ray_streamer.cli.uris import URI
from ray_streamer.errors import SettingsError
from ray_streamer.wording import printable

if TYPE_CHECKING:
    from ray_streamer.api.arguments import Sharding
    from ray_streamer.doctor.examine import Examination
    from ray_streamer.doctor.prediction import Fleet, Prediction
    from ray_streamer.rank.request import LoadRequest
    from ray_streamer.settings import Settings
    from ray_streamer.storage import UrisLike

_DEVICES = Path("/dev")
_READ_ALIKE = re.compile(r"[\w@%+=:,./~\[\]-]+", re.ASCII)
"""Values that a shell and docker take for the same: a shell removes quotes, docker keeps them."""


def _parse_bandwidth(text: str) -> int:
    """Bytes per second of "46GB", "46GB/s" or "40GiB".

    Raises:
        ValueError: It is none, or not positive.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        bandwidth = int(TypeAdapter(ByteSize).validate_python(text.removesuffix("/s")))
    except ValidationError:
        bandwidth = 0
    if bandwidth <= 0:
        raise ValueError(f"{text!r} is no number of bytes per second such as 46GB or 40GiB")
    return bandwidth


@click.command("doctor", cls=Command)
@click.argument("uri", type=URI, required=False)
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Ranks of the load.")
@click.option("--device", default="cpu", show_default=True, help="Where the tensors would go: cpu or cuda.")
@nodes_option("Also predict a load of so many nodes like this one at the same time, each with a copy of its own.")
@click.option(
    "--storage-bandwidth",
    type=Parsed("bytes", _parse_bandwidth),
    help="With --nodes: bytes per second that the storage serves to all of them, such as 46GB.",
)
@click.option(
    "--write-settings",
    "settings_file",
    type=OUTPUT_FILE,
    help="Write the settings to use there, as environment variables: those in force, and better ones. Never secrets.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Load no part of the checkpoint. What to expect is then from storage and memory alone.",
)
@click.option(
    "--address",
    help="Also ask each node of the Ray cluster that runs there: host:port, or auto for the one of this machine.",
)
@with_rules_and_results
@json_option
@verbose_option
@with_settings
def command(
    uri: UrisLike | None,
    tp: int,
    device: str,
    num_nodes: int,
    storage_bandwidth: int | None,
    settings_file: Path | None,
    quick: bool,
    address: str | None,
    sharding: dict[str, Any],
    as_json: bool,
    settings: Settings,
) -> None:
    """Examine this node, and a load of the checkpoint at URI over --tp ranks on it.

    Reads some blocks of the checkpoint with 1 to 64 requests in flight, and loads a part of it into --tp processes. Each finding says what
    is so, why it matters and what to do. Fails when a load would fail. With --address each node of a running Ray cluster is asked, too.
    """
    from ray_streamer.api.arguments import Sharding
    from ray_streamer.doctor.examine import examine, examine_node

    fleet = _fleet(num_nodes, storage_bandwidth)
    if fleet is not None and uri is None:
        raise click.UsageError("--nodes needs the URI of a checkpoint: without one no load is predicted")
    if uri is None:
        examination = examine_node(settings, num_ranks=tp, devices=_DEVICES, device=device, address=address)
    else:
        request, refused_limit = _request(uri, Sharding(tp=tp, **sharding), settings, device)
        examination = examine(
            request, devices=_DEVICES, fleet=fleet, is_quick=quick, address=address, refused_limit=refused_limit
        )
    failure: SettingsError | None = None
    if settings_file is not None:
        try:
            _write_settings(settings_file, examination.prediction, settings)
        except SettingsError as error:
            failure = error
    if failure is None or not as_json:
        _show(examination, as_json=as_json)
    if failure is not None:
        raise failure
    if not examination.is_healthy:
        click.get_current_context().exit(1)


def _request(uri: UrisLike, sharding: Sharding, settings: Settings, device: str) -> tuple[LoadRequest, int | None]:
    """The load, and its memory limit where that is refused: then the request has none, so that the rest can be examined."""
    from ray_streamer.errors import BudgetError

    try:
        return sharding.request(uri, settings=settings, device=device), None
    except BudgetError:
        unlimited = settings.model_copy(update={"memory_limit": None})
        return sharding.request(uri, settings=unlimited, device=device), settings.memory_limit


def _fleet(num_nodes: int, storage_bandwidth: int | None) -> Fleet | None:
    from ray_streamer.doctor.prediction import Fleet

    if num_nodes == 1 and storage_bandwidth is None:
        return None
    if storage_bandwidth is None:
        raise click.UsageError(
            "--nodes needs --storage-bandwidth: what the storage serves to all nodes together cannot be measured by this one"
        )
    return Fleet(num_nodes, float(storage_bandwidth))


def _show(examination: Examination, *, as_json: bool) -> None:
    if as_json:
        print_json(examination.as_dict() | {"is_healthy": examination.is_healthy})
        return
    from ray_streamer.doctor.tables import print_examination

    print_examination(examination, in_words=in_own_flags)


def _write_settings(path: Path, prediction: Prediction | None, settings: Settings) -> None:
    from ray_streamer.report.output_file import open_output

    if prediction is None:
        click.echo(printable(f"{path} is not written: no load was predicted"), err=True)
        return
    with open_output(path) as stream:
        stream.write(settings_text(prediction, settings))


def settings_text(prediction: Prediction, settings: Settings) -> str:
    """The settings that are given or better here, one variable a line, for a shell or `docker run --env-file`.

    What cannot be written is a comment: a secret, and a value that a shell and docker read differently.
    """
    given = settings.model_dump(mode="json", include=settings.model_fields_set, exclude_none=True)
    lines = [_settings_line(name, str(value)) for name, value in (given | prediction.best_settings).items()]
    return "".join(f"{line}\n" for line in lines or ["# the defaults are as good as any that were tried"])


def _settings_line(name: str, value: str) -> str:
    from ray_streamer.settings import ENV_PREFIX, SECRET_SETTINGS

    variable = f"{ENV_PREFIX}{name.upper()}"
    if name in SECRET_SETTINGS:
        return f"# {variable} is a secret: set it where the load runs"
    if not _READ_ALIKE.fullmatch(value):
        return f"# {variable} is not written: a shell and docker read its value differently"
    return f"{variable}={value}"
