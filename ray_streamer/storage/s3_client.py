"""How is boto3 told where the bucket is and who asks, and how does it sign?

Credentials, profiles, roles, endpoints and regions are found by boto3's own rules, of which the settings replace single
answers. boto3 signs, and asks for credentials and sessions; everything else goes over our own connections. Only its public
calls and events are used. Signed urls are as good as credentials while they last: they are never logged and never part of
a message.
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ProfileNotFound
from botocore.handlers import validate_bucket_name
from botocore.httpsession import get_cert_path
from botocore.loaders import create_loader

from ray_streamer.errors import AccessError, SettingsError, StorageError
from ray_streamer.storage.object_store import Request
from ray_streamer.storage.s3_faults import said_by, with_credentials_within
from ray_streamer.storage.s3_location import S3Location
from ray_streamer.storage.trust import context_trusting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from botocore.awsrequest import AWSPreparedRequest
    from pydantic import SecretStr

    from ray_streamer.storage.base import StorageSettings

_Result = TypeVar("_Result")
_SIGNED_FOR_SECONDS = 3600
_SESSION_SECONDS = 300
_SESSION_RENEWED_AFTER_SECONDS = 30
# What boto3 knows about S3 is parsed once per process: for every client anew it took four fifths of the time to make one.
_SERVICE_DATA = create_loader()
_USER_OF_A_URL = re.compile(r"//[^/@\s]*@")


@dataclass(frozen=True, slots=True)
class S3Access:
    """A boto3 client for one bucket, and what its signed urls need besides.

    Attributes:
        client: The boto3 client.
        location: Bucket and prefix.
        ca_file: By which https endpoints are trusted.
        arguments: Of every call about the bucket or its objects.
        headers: To be sent with signed urls, whose signature covers them.
        credentials_timeout_seconds: How long signing may take, which looks for credentials when there are none, or no more.
    """

    client: Any
    location: S3Location
    ca_file: str
    arguments: dict[str, str]
    headers: dict[str, str]
    credentials_timeout_seconds: float

    @property
    def endpoint(self) -> str:
        """Where requests go, before a bucket is put in front."""
        return str(self.client.meta.endpoint_url)

    def sign(self, key: str, seconds: int) -> str:
        """A url of the object `key` that is good for so long, if the credentials are."""
        what = {**self.arguments, "Key": key}
        return str(
            self._in_time(lambda: self.client.generate_presigned_url("get_object", Params=what, ExpiresIn=seconds))
        )

    def sign_listing(self, prefix: str, token: str, *, recursive: bool) -> Request:
        """A request for the page of keys below a prefix that `token` names, the first one when it is empty.

        Its headers are signed, not its url: some stores take signed urls for objects only.
        """
        more = ({"ContinuationToken": token} if token else {}) | ({} if recursive else {"Delimiter": "/"})

        def sign() -> Request:
            self.client.list_objects_v2(**self.arguments, Prefix=prefix, **more)
            return _signed.request

        return self._in_time(sign)

    def _in_time(self, sign: Callable[[], _Result]) -> _Result:
        try:
            return with_credentials_within(self.credentials_timeout_seconds, sign)
        except ValueError as error:
            raise StorageError(f"boto3 cannot sign: {said_by(error)}") from None


def _request_of(request: AWSPreparedRequest) -> Request:
    """What boto3 would send; who sends it names itself and the server."""
    lines = {name: value if isinstance(value, str) else value.decode() for name, value in request.headers.items()}
    unsigned = {"user-agent", "host", "content-length"}
    return Request(request.url, {name: value for name, value in lines.items() if name.lower() not in unsigned})


class _Signed(threading.local):
    """What boto3 signed last in this thread, instead of sending it."""

    request: Request


_signed = _Signed()


class _NoBody:
    def stream(self) -> Iterator[bytes]:
        return iter(())


def _keep_unsent(request: AWSPreparedRequest, **_: Any) -> AWSResponse:
    """Take the place of botocore's own HTTP client, see its event "before-send"."""
    _signed.request = _request_of(request)
    return AWSResponse(request.url, 200, {}, _NoBody())


def open_access(uri: str, settings: StorageSettings) -> S3Access:
    """A client for `uri`; nothing is sent yet, and credentials are looked for at the first request.

    Raises:
        AccessError: There is no such profile.
        SettingsError: The uri names no bucket, or boto3 cannot use the endpoint, region or CA file, or there is none.
    """
    location = S3Location.parse(uri)
    try:
        session = botocore.session.Session(profile=settings.s3_profile)
        session.register_component("data_loader", _SERVICE_DATA)
        # Of the clients that boto3 makes by itself, for credentials.
        session.set_default_client_config(_timeouts(settings))
        origin, ca_file = _ca_file(session, settings)
        of_boto3 = boto3.Session(
            botocore_session=session,
            region_name=settings.s3_region or _region_for_an_empty_one(session),
            aws_access_key_id=_revealed(settings.s3_access_key_id),
            aws_secret_access_key=_revealed(settings.s3_secret_access_key),
            aws_session_token=_revealed(settings.s3_session_token),
        )
        config = _client_config(location, settings, session.get_scoped_config())
        client = with_credentials_within(
            settings.credentials_timeout_seconds,
            lambda: of_boto3.client("s3", endpoint_url=settings.s3_endpoint_url, verify=ca_file, config=config),
        )
        # Raises for ports that are none.
        _ = urlsplit(client.meta.endpoint_url).port
        if settings.s3_ca_bundle or (origin and client.meta.endpoint_url.startswith("https:")):
            _refuse_unusable(ca_file, origin)
    except ProfileNotFound as error:
        raise AccessError(f"cannot open {uri}: {error}; see s3_profile and AWS_PROFILE") from error
    except (BotoCoreError, ValueError) as error:
        message = _USER_OF_A_URL.sub("//", str(error))
        # Of `s3_endpoint_url` it is known to have one.
        lacks_scheme = message.startswith("Invalid endpoint: ") and "://" not in message
        scheme = ", write http:// or https:// before the host in AWS_ENDPOINT_URL" if lacks_scheme else ""
        raise SettingsError(f"cannot open {uri}: {message}{scheme}; see s3_endpoint_url, s3_region and AWS_*") from None
    if "@" in client.meta.endpoint_url:
        raise SettingsError(f"cannot open {uri}: AWS_ENDPOINT_URL has credentials in it; use AWS_ACCESS_KEY_ID instead")
    if location.has_tenant:
        if client.meta.endpoint_url.endswith((".amazonaws.com", ".amazonaws.com.cn")):
            raise SettingsError(f"{uri} names a bucket of a tenant, which Amazon has not; set s3_endpoint_url")
        client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)
    client.meta.events.register_first("before-endpoint-resolution.s3", _keep_to_the_region)
    client.meta.events.register("before-send.s3.ListObjectsV2", _keep_unsent)
    pays = settings.s3_requester_pays
    return S3Access(
        client,
        location,
        ca_file,
        arguments={"Bucket": location.bucket} | ({"RequestPayer": "requester"} if pays else {}),
        headers={"x-amz-request-payer": "requester"} if pays else {},
        credentials_timeout_seconds=settings.credentials_timeout_seconds,
    )


def _region_for_an_empty_one(session: botocore.session.Session) -> str | None:
    """What boto3 takes where none is named. For an empty one, as a template may leave it, it could not sign."""
    return "us-east-1" if session.get_config_variable("region") == "" else None


def _ca_file(session: botocore.session.Session, settings: StorageSettings) -> tuple[str, str]:
    """Who named the file by which https servers are trusted, and the file, in boto3's order; its own when nobody did."""
    named = (
        ("s3_ca_bundle", settings.s3_ca_bundle),
        ("AWS_CA_BUNDLE or the profile's ca_bundle", session.get_config_variable("ca_bundle")),
        ("REQUESTS_CA_BUNDLE", os.environ.get("REQUESTS_CA_BUNDLE")),
        ("", get_cert_path(True)),
    )
    return next((origin, str(ca_file)) for origin, ca_file in named if ca_file is not None)


def _refuse_unusable(ca_file: str, origin: str) -> None:
    if os.path.isdir(ca_file):
        raise SettingsError(
            f"the CA file {ca_file!r} of {origin} cannot be used: Is a directory, and boto3 takes a file"
        )
    context_trusting(ca_file, origin=origin)


def _timeouts(settings: StorageSettings) -> Config:
    return Config(connect_timeout=settings.connect_timeout_seconds, read_timeout=settings.first_byte_timeout_seconds)


def _client_config(location: S3Location, settings: StorageSettings, profile: dict[str, Any]) -> Config:
    """What is said to boto3 besides: only where it would not find the answer in the profile and environment."""
    signature_version: Any = None
    of_s3 = profile.get("s3")
    if settings.s3_unsigned:
        signature_version = UNSIGNED
    elif not location.chooses_signature and not (isinstance(of_s3, dict) and of_s3.get("signature_version")):
        # boto3 would sign urls in the old way, which only some regions take.
        signature_version = "s3v4"
    addressing = settings.s3_addressing
    return _timeouts(settings).merge(
        Config(
            signature_version=signature_version,
            # Attempts are counted in one place, see `retry`.
            retries={"total_max_attempts": 1, "mode": "standard"},
            s3=None if addressing == "auto" else {"addressing_style": addressing},
            # Stores other than Amazon's do not all know the headers of the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
    )


def _keep_to_the_region(context: dict[str, Any], **_: Any) -> None:
    """Sign urls for the bucket's region: those of the global endpoint are redirected while a bucket is young.

    boto3 asks for the global one when `addressing_style` is "auto". Source: botocore 1.44, `_should_use_global_endpoint`.
    """
    context["use_global_endpoint"] = False


def _revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


class SignedUrls:
    """One url per object, signed once and renewed at half of its life; safe to call from many threads.

    Where the bucket opens a session for its signatures, which lasts five minutes, urls are renewed much earlier.
    """

    def __init__(self, sign: Callable[[str, int], str], *, in_a_session: bool = False) -> None:
        self._sign = sign
        self._signed_for_seconds = _SESSION_SECONDS if in_a_session else _SIGNED_FOR_SECONDS
        self._renewed_after_seconds = _SESSION_RENEWED_AFTER_SECONDS if in_a_session else _SIGNED_FOR_SECONDS / 2
        self._lock = threading.Lock()
        self._urls: dict[str, tuple[str, float]] = {}

    def url_of(self, key: str) -> str:
        """A url that is good for long enough to finish a request with it, unless the credentials end before."""
        now = time.monotonic()
        with self._lock:
            url, signed_at = self._urls.get(key, ("", now))
        if url and now - signed_at < self._renewed_after_seconds:
            return url
        url = self._sign(key, self._signed_for_seconds)
        with self._lock:
            self._urls[key] = url, now
        return url

    def discard(self, key: str, url: str) -> None:
        """Sign anew next time, if `url` is still the one in use."""
        with self._lock:
            if self._urls.get(key, ("", 0.0))[0] == url:
                del self._urls[key]
