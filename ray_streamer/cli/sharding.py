"""Which part does each rank hold? All options that say it, as the one set of arguments that Python's functions take."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ray_streamer.cli.mesh import MESH_OPTIONS
from ray_streamer.cli.results import RESULT_OPTIONS
from ray_streamer.cli.rules import RULE_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Function = Callable[..., Any]
    Decorator = Callable[[Function], Function]

_MESH = ("tp", "pp", "ep", "experts", "replicas")
_RULES = ("rules", "unmatched", "layout", "model_type", "mtp")
_RESULTS = ("fuse", "dtype", "rename")


def with_sharding(function: Function) -> Function:
    """Adds every option; the function gets them as `sharding`, arguments of `load_sharded` and `plan`."""
    return _with_options(function, (*_MESH, *_RULES, *_RESULTS), (*MESH_OPTIONS, *RULE_OPTIONS, *RESULT_OPTIONS))


def with_rules_and_results(function: Function) -> Function:
    """Adds those that need no ranks; the function gets them as `sharding`, arguments of `RuleSlices`."""
    return _with_options(function, (*_RULES, *_RESULTS), (*RULE_OPTIONS, *RESULT_OPTIONS))


def _with_options(function: Function, names: Sequence[str], options: Sequence[Decorator]) -> Function:
    @functools.wraps(function)
    def call(*args: Any, **given: Any) -> Any:
        return function(*args, sharding={name: given.pop(name) for name in names}, **given)

    decorated: Function = call
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
