"""What do botocore's errors mean?"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from botocore import exceptions as aws

from ray_streamer.errors import CredentialsError, StorageError
from ray_streamer.storage.answer import reason_of
from ray_streamer.storage.redaction import NO_SECRETS
from ray_streamer.storage.retry import PassingFault
from ray_streamer.storage.s3_refusal import S3Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

_NO_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile by s3_profile or AWS_PROFILE, or run where a role "
    "is attached; for a public bucket set s3_unsigned=True"
)
_CREDENTIALS_ERRORS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.NoAuthTokenError,
    aws.TokenRetrievalError,
    aws.SSOError,
)


@contextmanager
def sdk_faults_translated(what: str, *, endpoint: str, has_answered: bool) -> Iterator[None]:
    """Turn what botocore says about `what` into `PassingFault` or this package's errors; it asks for credentials and sessions.

    Args:
        what: Object and extent, for messages.
        endpoint: Where requests go, for messages.
        has_answered: Whether the endpoint ever answered; if not, a refused connection is taken for a wrong address.
    """
    try:
        yield
    except aws.ClientError as error:
        # Not from the error, which repeats whatever the server said.
        raise S3Refusal.from_client_error(error).error(what) from None
    except aws.SSLError as error:
        raise StorageError(f"{endpoint} is not trusted, {what}: {reason_of(error)}; set s3_ca_bundle") from error
    except (aws.HTTPClientError, aws.ConnectionError) as error:
        # boto3 asks other servers too, for credentials and sessions.
        asked = error.kwargs.get("endpoint_url")
        message = f"no answer from {str(asked or endpoint).partition('?')[0]}, {what}: {reason_of(error)}"
        if isinstance(error, aws.EndpointConnectionError) and not has_answered:
            raise StorageError(f"{message}; is s3_endpoint_url right, and the proxy if there is one?") from error
        raise PassingFault(message) from error
    except _CREDENTIALS_ERRORS as error:
        raise CredentialsError(f"no AWS credentials for {what} ({reason_of(error)}): {_NO_CREDENTIALS}") from error
    except aws.BotoCoreError as error:
        raise StorageError(f"boto3 cannot ask for {what}: {NO_SECRETS.clean(str(error))}") from None
