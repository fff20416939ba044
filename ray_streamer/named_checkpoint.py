"""Where is the checkpoint that a caller named, and with which settings is it read? Asked once, where the caller speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_streamer.storage.signed import split_signature

if TYPE_CHECKING:
    from typing import Self

    from ray_streamer.settings import Settings
    from ray_streamer.storage.signed import UrisLike


@dataclass(frozen=True, slots=True)
class NamedCheckpoint:
    """A checkpoint, as every process understands it.

    Attributes:
        uri: Absolute; holds no secret, so plans, reports and errors may repeat it.
        settings: Every knob, with what signs the uri.
    """

    uri: str
    settings: Settings

    @classmethod
    def of(cls, uri: UrisLike, settings: Settings) -> Self:
        """The checkpoint that a caller named.

        Args:
            uri: A path or uri, or a list of https addresses, which may be signed.
            settings: The caller's.

        Raises:
            SettingsError: It names none; repeats no signature.
        """
        signature = split_signature(uri)
        signed = signature.as_setting
        return cls(signature.uri, settings if signed is None else settings.override(http_signed=signed))
