"""How is boto3 told where the bucket is and who asks, and how does it sign urls that last?

Credentials, profiles, roles, endpoints and regions are found by boto3's own rules, of which the settings replace single
answers. Only its public calls are used. Signed urls are as good as credentials while they last: they are never logged
and never part of a message.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ProfileNotFound
from botocore.httpsession import get_cert_path

from ray_streamer.errors import AccessError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray_streamer.storage.base import StorageSettings

_SIGNED_FOR_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class S3Location:
    """A folder-like prefix in a bucket.

    >>> S3Location.parse("s3://models/llama/").key_of("config.json")
    'llama/config.json'
    """

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> S3Location:
        """The location that `s3://bucket/prefix` names; nothing is percent-decoded.

        Raises:
            SettingsError: There is no bucket in it.
        """
        bucket, _, prefix = uri.partition("://")[2].partition("/")
        if not bucket:
            raise SettingsError(f"{uri} names no bucket; give s3://bucket/prefix")
        return cls(bucket, prefix.rstrip("/"))

    def key_of(self, path: str) -> str:
        """The key of a path relative to the prefix."""
        return f"{self.prefix}/{path}" if self.prefix else path


@dataclass(frozen=True, slots=True)
class S3Access:
    """A boto3 client, and the CA file by which it trusts https endpoints."""

    client: Any
    ca_file: str

    @property
    def endpoint(self) -> str:
        """Where requests go, before a bucket is put in front."""
        return str(self.client.meta.endpoint_url)


def open_access(uri: str, settings: StorageSettings) -> S3Access:
    """A client for `uri`; nothing is sent yet, and credentials are looked for at the first request.

    Raises:
        AccessError: There is no such profile.
        SettingsError: boto3 cannot use the endpoint, region or CA file.
    """
    config = Config(
        signature_version=UNSIGNED if settings.s3_unsigned else "s3v4",
        connect_timeout=settings.connect_timeout_seconds,
        read_timeout=settings.read_timeout_seconds,
        # Attempts are counted in one place, see `retry`.
        retries={"total_max_attempts": 1, "mode": "standard"},
        s3={"addressing_style": settings.s3_addressing},
    )
    try:
        session = botocore.session.Session(profile=settings.s3_profile)
        ca_file = settings.s3_ca_bundle or session.get_config_variable("ca_bundle") or get_cert_path(True)
        client = boto3.Session(botocore_session=session, region_name=settings.s3_region).client(
            "s3", endpoint_url=settings.s3_endpoint_url, verify=settings.s3_ca_bundle, config=config
        )
    except ProfileNotFound as error:
        raise AccessError(f"cannot open {uri}: {error}; see s3_profile and AWS_PROFILE") from error
    except (BotoCoreError, ValueError) as error:
        raise SettingsError(f"cannot open {uri}: {error}; see s3_endpoint_url, s3_region and AWS_*") from error
    return S3Access(client, ca_file)


class SignedUrls:
    """One url per object, signed once and renewed at half of its life; safe to call from many threads."""

    def __init__(self, sign: Callable[[str, int], str]) -> None:
        self._sign = sign
        self._lock = threading.Lock()
        self._urls: dict[str, tuple[str, float]] = {}

    def url_of(self, key: str) -> str:
        """A url that is good for at least half an hour, unless the credentials end before."""
        now = time.monotonic()
        with self._lock:
            url, signed_at = self._urls.get(key, ("", now))
        if url and now - signed_at < _SIGNED_FOR_SECONDS / 2:
            return url
        url = self._sign(key, _SIGNED_FOR_SECONDS)
        with self._lock:
            self._urls[key] = url, now
        return url

    def discard(self, key: str, url: str) -> None:
        """Sign anew next time, if `url` is still the one in use."""
        with self._lock:
            if self._urls.get(key, ("", 0.0))[0] == url:
                del self._urls[key]
