"""What does a store say whose library is not installed?"""

from __future__ import annotations

from ray_streamer.errors import SettingsError


def missing_extra(what: str, library: str, extra: str) -> SettingsError:
    """The error to raise.

    Args:
        what: Uris, or a way to find credentials.
        library: The package that is needed.
        extra: Of this package, that brings it.

    >>> str(missing_extra("hf://", "huggingface_hub", "hub"))
    "hf:// needs huggingface_hub: pip install 'ray_streamer[hub]'"
    """
    return SettingsError(f"{what} needs {library}: pip install 'ray_streamer[{extra}]'")
