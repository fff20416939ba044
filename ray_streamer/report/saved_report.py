"""How does a report come back from its JSON file? Every value is checked, since anybody may have written the file."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from ray_streamer.errors import SettingsError
from ray_streamer.rank.statistics import RankStatistics
from ray_streamer.report.findings import Findings
from ray_streamer.report.load_report import LoadReport
from ray_streamer.report.tensor_kinds import KindReads
from ray_streamer.report.timeline import Timeline
from ray_streamer.report.verdict.advice import Advice
from ray_streamer.report.verdict.cost import Cost
from ray_streamer.report.verdict.judge import Verdict
from ray_streamer.storage.base import StorageStatistics
from ray_streamer.wording import brief, shown

if TYPE_CHECKING:
    from pathlib import Path

_Value = TypeVar("_Value")

_NAMES = {
    each.__name__: each
    for each in (RankStatistics, StorageStatistics, KindReads, Timeline, Advice, Cost, Verdict, Findings, LoadReport)
} | {"Evidence": Findings}
"""What annotations of these classes name, some of it for type checkers only; a file has findings, and no evidence."""


class _Parser(Generic[_Value]):
    """Makes one dataclass of what a file says."""

    def __init__(self, made: type[_Value]) -> None:
        self._adapter: TypeAdapter[_Value] = TypeAdapter(made)
        self._adapter.rebuild(_types_namespace=_NAMES)

    def parse(self, said: Any) -> _Value:
        return self._adapter.validate_python(said)


def read_report(path: Path) -> LoadReport:
    """The report that `ray-streamer load --report FILE` wrote.

    Raises:
        SettingsError: It cannot be read, is no such report, or one of another version; says what is wrong with it.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole_number)
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {os.strerror(error.errno or 0)}; ray-streamer load --report FILE writes one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is no JSON file: {error}; ray-streamer load --report FILE writes one") from None
    return report_of(said, origin=str(path))


def _whole_number(digits: str) -> int | float:
    """A float in place of a number of more than 64 bits, which is no count of anything."""
    number = float(digits)
    return int(digits) if abs(number) < 1 << 63 else number


def report_of(said: Any, *, origin: str) -> LoadReport:
    """The report that `LoadReport.as_dict` gave.

    Args:
        said: Plain values.
        origin: Where they come from, for errors.

    Raises:
        SettingsError: They are no report; says what is wrong with them.
    """
    if not isinstance(said, dict) or not isinstance(said.get("ranks"), list):
        raise SettingsError(f"{origin} is no report of a load: it has no list of ranks, but {brief(said)}")
    own = {field.name for field in fields(LoadReport)} - {"ranks", "nodes", "evidence"}
    try:
        findings = _Parser(Findings).parse({name: said[name] for name in Findings.__annotations__ if name in said})
        parser = _Parser(RankStatistics)
        ranks = [parser.parse(_without_node(rank)) for rank in said["ranks"]]
        rest = {name: said[name] for name in own if name in said}
        nodes = [rank["node"] for rank in said["ranks"]]
        return _Parser(LoadReport).parse(rest | {"ranks": ranks, "nodes": nodes, "evidence": findings})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "a rank"
        raise SettingsError(
            f"{origin} is no report of this version of ray_streamer: {shown(where)}: {fault['msg']}, got {brief(fault['input'])}"
        ) from None


def _without_node(rank: Any) -> Any:
    """What one rank counted; its node stands beside."""
    if isinstance(rank, dict) and "node" in rank:
        return {name: value for name, value in rank.items() if name != "node"}
    return None
