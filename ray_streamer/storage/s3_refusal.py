"""What does an answer of S3 mean that brings no bytes?

Codes: Amazon S3 API Reference, "Error responses"; those of other stores where their manuals have some.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ray_streamer.errors import StorageError
from ray_streamer.storage.redaction import NO_SECRETS
from ray_streamer.storage.refusal import Refusal, skew_of, xml_element

if TYPE_CHECKING:
    from collections.abc import Mapping

    from botocore.exceptions import ClientError

    from ray_streamer.storage.http_connection import HttpAnswer

_THROTTLE_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "ServiceUnavailable"}
)
_CREDENTIALS_CODES = frozenset(
    {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
)
# Amazon says so for absent keys too, and servers that answer without a body may mean it.
_HIDING_CODES = frozenset({"AccessDenied", "Forbidden", ""})
_NOT_LISTED = "without s3:ListBucket an object that does not exist looks like this, too"
_IN_THE_HOST_NAME = "this store takes buckets in the host name only; set s3_addressing to virtual"
_ADVICE = {
    "InvalidObjectState": "the object is archived; restore it, or copy it to a storage class that can be read at once",
    "SignatureDoesNotMatch": "check the secret key, and that no proxy changes the request",
    "InvalidAccessKeyId": "check the access key, and that it belongs to this endpoint",
    # Alibaba OSS, Tencent COS and Volcengine TOS
    "SecondLevelDomainForbidden": _IN_THE_HOST_NAME,
    "PathStyleDomainForbidden": _IN_THE_HOST_NAME,
    "InvalidPathAccess": _IN_THE_HOST_NAME,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Refusal(Refusal):
    """See `Refusal`.

    Attributes:
        region: Where the bucket is, when the server said so.
        endpoint: Where the server wants to be asked, when it said so.
    """

    THROTTLE_CODES: ClassVar[frozenset[str]] = _THROTTLE_CODES
    CREDENTIALS_CODES: ClassVar[frozenset[str]] = _CREDENTIALS_CODES
    FAILURE_CODES: ClassVar[frozenset[str]] = frozenset({"RequestTimeout", "InternalError"})
    SKEW_CODES: ClassVar[frozenset[str]] = frozenset({"RequestTimeTooSkewed"})

    region: str = ""
    endpoint: str = ""

    @classmethod
    def from_answer(cls, answer: HttpAnswer, body: bytes) -> S3Refusal:
        """What a raw answer says, with the beginning of its body."""
        text, secrets = body.decode("utf-8", "replace"), answer.secrets
        return cls(
            status=answer.status,
            code=xml_element(text, "Code", secrets, r"[\w.-]{1,100}"),
            message=xml_element(text, "Message", secrets, r".+").rstrip("."),
            request_id=secrets.clean(answer.header("x-amz-request-id"), max_chars=128),
            region=secrets.clean(answer.header("x-amz-bucket-region"), max_chars=64)
            or xml_element(text, "Region", secrets, r"[\w-]+"),
            endpoint=xml_element(text, "Endpoint", secrets, r"[\w.:/-]+"),
            retry_after=answer.header("retry-after"),
            skew_seconds=skew_of(answer.header("date")),
        )

    @classmethod
    def from_client_error(cls, error: ClientError) -> S3Refusal:
        """What an answer says that botocore read; its message is left out, since nobody knows what it was signed with."""
        response: Mapping[str, Any] = error.response
        metadata = response.get("ResponseMetadata", {})
        headers = metadata.get("HTTPHeaders", {})
        code = str(response.get("Error", {}).get("Code", ""))
        return cls(
            status=int(metadata.get("HTTPStatusCode", 0)),
            # Of an answer without a body botocore makes the status the code.
            code="" if code.isdigit() else NO_SECRETS.clean(code),
            request_id=NO_SECRETS.clean(str(metadata.get("RequestId", headers.get("x-amz-request-id", "")))),
            region=NO_SECRETS.clean(str(headers.get("x-amz-bucket-region", ""))),
            retry_after=str(headers.get("retry-after", "")),
        )

    def lasting_error(self, message: str) -> StorageError:
        """See `Refusal`."""
        error = super(S3Refusal, self).lasting_error(message)
        if type(error) is StorageError and self.region:
            return StorageError(f"the bucket is in region {self.region}; set s3_region, {message}")
        return error

    @property
    def what_is_missing(self) -> str:
        """See `Refusal`."""
        return "bucket" if self.code == "NoSuchBucket" else "object"

    def advice(self, *, is_object: bool) -> list[str]:
        """See `Refusal`."""
        advice: list[str] = []
        if self.code in _ADVICE:
            advice.append(_ADVICE[self.code])
        elif re.search(r"virtual.?host", self.message, re.IGNORECASE):
            advice.append(_IN_THE_HOST_NAME)
        if self.code.upper().startswith("KMS") or "kms:" in self.message.lower():
            advice.append("reading needs kms:Decrypt on the key that encrypts the object")
        if self.endpoint:
            advice.append(f"the store wants to be asked at {self.endpoint}; set s3_endpoint_url or s3_region")
        if self.status == 403 and self.code in _HIDING_CODES and not self.message.lower().count("kms:"):
            advice.append(_NOT_LISTED if is_object else "listing needs s3:ListBucket")
        return advice
