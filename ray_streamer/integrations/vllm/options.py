"""What may `--model-loader-extra-config` say? Where the weights are, and every setting of a load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_streamer.errors import SettingsError
from ray_streamer.settings import ENV_PREFIX, SECRET_SETTINGS, Settings
from ray_streamer.storage import scheme_of

OWN_KEYS = ("uri", "draft_uri", "distributed")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderOptions:
    """One engine's options for loading.

    Attributes:
        uri: Where the model's weights are; None = in the model's own folder.
        draft_uri: Where the weights of a draft model are; None = in its own folder.
        settings: Every knob of a load.
    """

    uri: str | None = None
    draft_uri: str | None = None
    settings: Settings = field(default_factory=Settings.resolve)

    def uri_of(self, *, is_draft: bool) -> str | None:
        """What is said about the weights of the model, or of its draft model."""
        return self.draft_uri if is_draft else self.uri

    @classmethod
    def of(cls, extra_config: Mapping[str, Any] | None) -> LoaderOptions:
        """The options that `extra_config` says; what it leaves out comes from the environment or is the default.

        Keys of Run:ai's loader mean what they mean there. Ranks of a node always share their reads; what `distributed` changes is
        whose limit `memory_limit` is: with it that of all ranks of a node, without it that of each.

        Raises:
            SettingsError: A key is unknown, or a value cannot be used; names both, and the keys that exist.
        """
        if not isinstance(extra_config, Mapping | None):
            raise SettingsError(
                f'model_loader_extra_config is a JSON object such as {{"concurrency": 32}}, got {type(extra_config).__name__}'
            )
        said = dict(extra_config or {})
        secrets = sorted(said.keys() & SECRET_SETTINGS)
        if secrets:
            raise SettingsError(
                f"model_loader_extra_config has {secrets[0]}, and vLLM logs its arguments; set {ENV_PREFIX}{secrets[0].upper()} in the "
                "environment instead"
            )
        known = {*OWN_KEYS, *Settings.model_fields} - SECRET_SETTINGS
        unknown = sorted(said.keys() - known)
        if unknown:
            raise SettingsError(
                f"model_loader_extra_config has {', '.join(map(repr, unknown))}, which load format ray_streamer does not "
                f"know; it takes {', '.join(sorted(known))}"
            )
        distributed = said.pop("distributed", False)
        if not isinstance(distributed, bool):
            raise SettingsError(f"model_loader_extra_config: distributed must be true or false, got {distributed!r}")
        if distributed and _is_size(said.get("memory_limit")) and "node_memory_limit" not in said:
            said["node_memory_limit"] = said.pop("memory_limit")
        places = {name: _checked_uri(name, said.pop(name, None)) for name in ("uri", "draft_uri")}
        return cls(**places, settings=Settings.resolve(**said))


def _is_size(memory_limit: Any) -> bool:
    """Whether it is a number of bytes, and neither unset, "as much as it takes" nor "as little as works"."""
    return memory_limit is not None and str(memory_limit).strip() not in ("-1", "0")


def _checked_uri(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and value:
        # A signed one is refused: vLLM logs its arguments.
        scheme_of(value)
        return value
    raise SettingsError(
        f"model_loader_extra_config: {name} must be a path or a URI such as s3://bucket/model, got {value!r}"
    )
