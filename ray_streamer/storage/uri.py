"""Which backend does a uri mean, and may the uri be repeated in plans, reports, logs and errors?"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from ray_streamer.errors import SettingsError

ARROW_SCHEMES = frozenset({"gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
"""What pyarrow opens."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCHEMES = ARROW_SCHEMES | {"file", "memory", "s3"}
_SECRET_OPTIONS = frozenset(
    {"sig", "sas_token", "client_secret", "account_key", "access_key", "secret_key", "password"}
)


def scheme_of(uri: str) -> str:
    """The scheme in lower case; "file" for a path without one.

    >>> scheme_of("S3://bucket/model"), scheme_of("/models/llama")
    ('s3', 'file')

    Raises:
        SettingsError: No backend knows the scheme, or the uri has credentials in it, which are not repeated.
    """
    match = _SCHEME.match(uri)
    if match is None:
        return "file"
    scheme, rest = match[1].lower(), uri[match.end() :]
    authority, _, query = rest.partition("?")
    user = authority.partition("/")[0].rpartition("@")[0]
    options = {name for name, _ in parse_qsl(query)} if scheme in ARROW_SCHEMES else set[str]()
    if ":" in user or (scheme == "s3" and user) or _SECRET_OPTIONS & options:
        raise SettingsError(
            f"a {scheme}:// uri has credentials in it, and uris appear in plans, reports and errors; give them as the "
            "store's own tools take them (for S3: AWS_ACCESS_KEY_ID, or the setting s3_access_key_id), see docs/s3.md"
        )
    if scheme not in _SCHEMES:
        raise SettingsError(
            f"no storage for {uri}: scheme {scheme}:// is not known; give a path, file:///path, s3://bucket/prefix, "
            "gs://, abfss:// or hdfs://, or memory://name"
        )
    return scheme
