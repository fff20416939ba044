"""By which authorities is an https server trusted? Those of a file or folder that somebody names, else the system's."""

from __future__ import annotations

import os
import ssl

from ray_streamer.errors import SettingsError


def context_trusting(ca_file: str, *, origin: str = "") -> ssl.SSLContext:
    """How servers prove who they are.

    Args:
        ca_file: A file in PEM format, or a folder as `openssl rehash` makes it; empty for the authorities that the system trusts.
        origin: Who named it, for the error.

    Raises:
        SettingsError: It cannot be used. Told at once: every connection would fail, and be tried again.
    """
    is_folder = os.path.isdir(ca_file)
    try:
        return ssl.create_default_context(
            cafile=None if is_folder else ca_file or None, capath=ca_file if is_folder else None
        )
    except OSError as error:
        reason = "it holds no certificate in PEM format" if isinstance(error, ssl.SSLError) else error.strerror
        of_whom = f" of {origin}" if origin else ""
        raise SettingsError(f"the CA file {ca_file!r}{of_whom} cannot be used: {reason}") from None


def ca_file_of_environment(*variables: str, endpoint: str) -> str:
    """What the first of these variables names that is set; empty when none is.

    Raises:
        SettingsError: The endpoint needs it, and it cannot be used.
    """
    for variable in variables:
        ca_file = os.environ.get(variable)
        if ca_file:
            if endpoint.startswith("https:"):
                context_trusting(ca_file, origin=variable)
            return ca_file
    return ""
