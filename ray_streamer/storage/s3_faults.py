"""What do the errors mean that boto3 raises while it looks for credentials and signs?"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from botocore import exceptions as aws

from ray_streamer.errors import CredentialsError, RayStreamerError, StorageError
from ray_streamer.storage.answer import reason_of
from ray_streamer.storage.bounded_call import call_within
from ray_streamer.storage.redaction import NO_SECRETS
from ray_streamer.storage.retry import PassingFault
from ray_streamer.storage.s3_refusal import S3Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Result = TypeVar("_Result")
_LOOK_AT = "look at credential_process in the profile, AWS_WEB_IDENTITY_TOKEN_FILE and the metadata service"
_NO_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile by s3_profile or AWS_PROFILE, or run where a role "
    "is attached; for a public bucket set s3_unsigned=True"
)
_CREDENTIALS_ERRORS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
)
_NO_LOGIN = (aws.SSOError, aws.NoAuthTokenError, aws.TokenRetrievalError)
# What boto3 asks of the store itself, for a directory bucket; everything else that it asks is asked for credentials.
_OF_A_BUCKET = "CreateSession"


def with_credentials_within(seconds: float, call: Callable[[], _Result]) -> _Result:
    """What boto3 does that may need credentials, which it may look for without end: in a program that hangs, say.

    Raises:
        CredentialsError: It found none, or none in time; or programs, files or servers that it asked failed in a way of their own.
    """
    try:
        return call_within(seconds, call, what="credentials")
    except aws.CredentialRetrievalError as error:
        # Its words are what a program said, of which nobody knows what it is.
        raise CredentialsError(
            f"boto3 found no credentials: {error.kwargs.get('provider')} failed; {_LOOK_AT}"
        ) from None
    except json.JSONDecodeError:
        raise CredentialsError(
            f"boto3 found no credentials: it was given an answer that is no JSON; {_LOOK_AT}"
        ) from None
    except (aws.BotoCoreError, aws.ClientError, RayStreamerError, ValueError):
        raise
    except TimeoutError:
        raise CredentialsError(
            f"boto3 found no credentials in {seconds:g} s (credentials_timeout_seconds); {_LOOK_AT}; "
            "AWS_EC2_METADATA_DISABLED=true turns that off"
        ) from None
    except EOFError:
        raise CredentialsError(
            "boto3 found no credentials: the profile's mfa_serial asks for a code, which nobody types here; get keys with "
            "`aws sts get-session-token`, and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        ) from None
    except Exception as error:
        # A token file that is not there, a program whose answer has another form, credentials that have ended when they come.
        raise CredentialsError(
            f"boto3 found no credentials: {said_by(error)}; {_LOOK_AT}, and at this machine's clock"
        ) from None


def said_by(error: Exception) -> str:
    """The kind of an error and its words, without secrets."""
    return f"{type(error).__name__}: {NO_SECRETS.clean(str(error)).rstrip('.')}"


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
        raise _refusal(error, what) from None
    except aws.SSLError as error:
        raise StorageError(f"{endpoint} is not trusted, {what}: {reason_of(error)}; set s3_ca_bundle") from error
    except (aws.HTTPClientError, aws.ConnectionError) as error:
        # boto3 asks other servers too, for credentials and sessions.
        asked = error.kwargs.get("endpoint_url")
        message = f"no answer from {str(asked or endpoint).partition('?')[0]}, {what}: {reason_of(error)}"
        if isinstance(error, aws.EndpointConnectionError) and not has_answered:
            raise StorageError(f"{message}; {_reachable(str(asked or endpoint), endpoint)}") from error
        raise PassingFault(message) from error
    except _NO_LOGIN as error:
        raise CredentialsError(
            f"no AWS credentials for {what} ({reason_of(error)}): the profile's login by SSO is missing or has ended; run "
            "`aws sso login` with that profile on every node"
        ) from error
    except _CREDENTIALS_ERRORS as error:
        raise CredentialsError(f"no AWS credentials for {what} ({reason_of(error)}): {_NO_CREDENTIALS}") from error
    except aws.BotoCoreError as error:
        raise StorageError(f"boto3 cannot ask for {what}: {NO_SECRETS.clean(str(error))}") from None


def _refusal(error: aws.ClientError, what: str) -> StorageError | PassingFault:
    """What to raise; nothing is taken from the error's words, which repeat whatever the server said."""
    refusal = S3Refusal.from_client_error(error)
    found = refusal.error(what)
    will_pass = isinstance(found, PassingFault) and not found.is_worth_one_retry
    if will_pass or error.operation_name == _OF_A_BUCKET:
        return found
    return CredentialsError(
        f"no AWS credentials for {what}: {error.operation_name} was refused: {refusal}; is the role right (AWS_ROLE_ARN, or "
        "the profile's role_arn), and does its trust policy let this user or token take it?"
    )


def _reachable(asked: str, endpoint: str) -> str:
    if urlsplit(asked).netloc == urlsplit(endpoint).netloc:
        return "is s3_endpoint_url right, and the proxy if there is one?"
    return "boto3 asks there for credentials or a session; can it be reached from here, and is the proxy right if there is one?"
