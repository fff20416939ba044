"""What does each rank make of its tensors? Nothing, or what an integration makes of them, such as a ready model."""

from __future__ import annotations

import importlib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ray_streamer.api.arguments import SHARDING
from ray_streamer.errors import SettingsError
from ray_streamer.wording import listed

if TYPE_CHECKING:
    from ray_streamer.api.arguments import Sharding
    from ray_streamer.cluster.model import ShardedModel
    from ray_streamer.slices import SliceSource


class Bootstrap(Protocol):
    """What an integration gives for its models to be started."""

    def slices(self, dtype: Any) -> SliceSource:
        """What the ranks are asked for; picklable."""
        ...

    def handle(self) -> type[ShardedModel]:
        """The class of what the caller holds; imports Ray."""
        ...


BootstrapLike = Literal["transformers"] | Bootstrap
"""The name of an integration, or what it gives."""

# Integrations come after this package, which finds them by name, as one finds a plugin.
_HOMES = {"transformers": "ray_streamer.integrations.transformers.bootstrap"}
_SAID_BESIDE = ("tp", "dtype")


def find_bootstrap(bootstrap: BootstrapLike | None) -> Bootstrap | None:
    """What `bootstrap` means.

    Raises:
        SettingsError: There is no integration of that name.
    """
    if not isinstance(bootstrap, str):
        return bootstrap
    if bootstrap not in _HOMES:
        raise SettingsError(f"bootstrap is {listed(list(_HOMES))}, got {bootstrap!r}")
    return importlib.import_module(_HOMES[bootstrap]).BOOTSTRAP


def bootstrapped(sharding: Sharding, bootstrap: Bootstrap | None) -> Sharding:
    """The same arguments, where the bootstrap says which part of each tensor a rank holds.

    Raises:
        SettingsError: They say it, too.
    """
    if bootstrap is None:
        return sharding
    names = [field.name for field in fields(sharding) if field.name not in _SAID_BESIDE]
    said = [name for name in names if getattr(sharding, name) != getattr(SHARDING, name)]
    if said:
        raise SettingsError(
            f"with bootstrap the model says which part each rank holds; leave out {', '.join(said)}. tp, dtype and device may be given"
        )
    return replace(sharding, slices=bootstrap.slices(sharding.dtype), dtype=None)
