"""Which bucket and prefix does an `s3://` uri mean?

Besides a bucket's name, the place of the bucket may hold what boto3 takes in its stead: the ARN of an access point, or a
directory bucket (S3 Express One Zone). Ceph and OpenStack Swift write `tenant:bucket` for a bucket of another tenant.
Sources: Amazon S3 User Guide, "Using access points", "Directory bucket naming rules"; Ceph Object Gateway, "Multitenancy".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ray_streamer.errors import SettingsError

_ARN = re.compile(r"arn:[\w-]+:s3[\w-]*:[\w-]*:\d+:(outpost[:/][\w-]+[:/])?accesspoint[:/][\w.-]+(?=/|$)")
# boto3 takes more than Amazon's naming rules allow, for the sake of old buckets and of other stores.
_BUCKET = re.compile(r"[a-zA-Z0-9._-]{1,255}")
_TENANT_AND_BUCKET = re.compile(r"[a-zA-Z0-9_$.-]*:[a-zA-Z0-9._-]{1,255}")
_FORM = "give s3://bucket/prefix"
_ARN_FORM = "give s3://arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME/prefix"


@dataclass(frozen=True, slots=True)
class S3Location:
    """A folder-like prefix in a bucket.

    >>> S3Location.parse("s3://models/llama/").key_of("config.json")
    'llama/config.json'
    >>> S3Location.parse("s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/models/llama").prefix
    'llama'

    Attributes:
        bucket: Name of a bucket, with a tenant's before it and a colon between them, or ARN of an access point.
        prefix: Without a "/" at its end.
    """

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, uri: str) -> S3Location:
        """The location that a uri names; nothing is percent-decoded.

        Raises:
            SettingsError: There is no bucket in it, or none that could have that name.
        """
        rest = uri.partition("://")[2]
        arn = _ARN.match(rest)
        bucket = arn[0] if arn else rest.partition("/")[0]
        if not bucket:
            raise SettingsError(f"{uri} names no bucket; {_FORM}")
        if bucket.startswith("arn:") and not arn:
            raise SettingsError(
                f"{uri} begins with an ARN that is not an access point's; {_ARN_FORM}, or the bucket's name"
            )
        if not (arn or _BUCKET.fullmatch(bucket) or _TENANT_AND_BUCKET.fullmatch(bucket)):
            raise SettingsError(
                f"{uri}: {bucket!r} is no name of a bucket, which has letters, digits, '.', '-' and '_' only; {_FORM}"
            )
        return cls(bucket, rest[len(bucket) + 1 :].rstrip("/"))

    @property
    def has_tenant(self) -> bool:
        """Whether a tenant is named before the bucket."""
        return ":" in self.bucket and not self.bucket.startswith("arn:")

    @property
    def is_directory_bucket(self) -> bool:
        """Whether the bucket is one of S3 Express One Zone, by the end of its name."""
        return self.bucket.endswith("--x-s3")

    @property
    def chooses_signature(self) -> bool:
        """Whether requests are not signed as for ordinary buckets: in a session, or for every region at once."""
        return self.is_directory_bucket or self.bucket.endswith(".mrap")

    def key_of(self, path: str) -> str:
        """The key of a path relative to the prefix."""
        return f"{self.prefix}/{path}" if self.prefix else path

    def listable(self, prefix: str) -> str:
        """What to list for the keys that begin with `prefix`; directory buckets list whole folders only."""
        key = self.key_of(prefix)
        return key[: key.rfind("/") + 1] if self.is_directory_bucket else key
