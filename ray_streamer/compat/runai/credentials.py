"""Who asks the object store? Credentials that a call was given, else what the settings and boto3 find."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ray_streamer.compat.runai.errors import RunaiStreamerMemoryLimitException
from ray_streamer.errors import SettingsError
from ray_streamer.settings import Settings

_MEMORY_LIMIT = "RUNAI_STREAMER_MEMORY_LIMIT"


@dataclass(frozen=True)
class S3Credentials:
    """Credentials of one call; what is None is looked for as in every other load.

    Attributes:
        access_key_id: Goes with `secret_access_key`.
        secret_access_key: Secret.
        session_token: Secret; of temporary keys only.
        region_name: Of the bucket.
        endpoint: Url of an S3-compatible store.
    """

    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    region_name: str | None = None
    endpoint: str | None = None


def settings_for(credentials: S3Credentials | None) -> Settings:
    """The settings of a call with these credentials.

    Raises:
        SettingsError: A value, given or from the environment, cannot be used.
        RunaiStreamerMemoryLimitException: The environment asks for less memory than none.
    """
    limit = os.environ.get(_MEMORY_LIMIT, "").strip()
    if limit.startswith("-") and limit != "-1":
        raise RunaiStreamerMemoryLimitException(
            f"environment variable {_MEMORY_LIMIT}={limit}: give bytes, 0 for one tensor at a time, or -1 for no limit"
        )
    if credentials is not None and not isinstance(credentials, S3Credentials):
        raise SettingsError(f"credentials are S3Credentials, got {type(credentials).__name__}")
    said = credentials or S3Credentials()
    return Settings.resolve(
        s3_access_key_id=said.access_key_id,
        s3_secret_access_key=said.secret_access_key,
        s3_session_token=said.session_token,
        s3_region=said.region_name,
        s3_endpoint_url=said.endpoint,
    )
