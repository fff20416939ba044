"""Which knobs have single stores? Where they are, who asks there, and who pays."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic import model_validator as validates_model

from ray_streamer.settings.load import LoadSettings, Seconds


def _make_absolute(path: Any) -> Any:
    """Ranks may work in another folder, or as another user, than who names the file."""
    return os.path.abspath(os.path.expanduser(path)) if path and isinstance(path, str | os.PathLike) else path


def _checked_address(url: str) -> str:
    """A user name in an address would show up in errors and logs."""
    if "@" in url:
        raise ValueError("credentials do not belong into an address; see s3_access_key_id and s3_secret_access_key")
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError("write http:// or https:// before the host")
    return url


class StoreSettings(LoadSettings):
    """Beside them, the knobs of S3, the Hub, Azure, Google and web servers."""

    s3_endpoint_url: Annotated[str, AfterValidator(_checked_address)] | None = Field(
        default=None, description="S3 endpoint; unset = AWS_ENDPOINT_URL[_S3] or AWS."
    )
    s3_region: str | None = Field(default=None, description="S3 region; unset = as boto3 finds it.")
    s3_profile: str | None = Field(default=None, description="Profile of the AWS configuration files.")
    s3_addressing: Literal["auto", "path", "virtual"] = Field(
        default="auto",
        description="Bucket name in the path or in the host name; auto = as the AWS profile says, else as boto3 chooses.",
    )
    s3_unsigned: bool = Field(default=False, description="Send no credentials: public buckets.")
    s3_ca_bundle: Annotated[str, BeforeValidator(_make_absolute)] | None = Field(
        default=None,
        description="CA file for https endpoints; unset = AWS_CA_BUNDLE, the profile's ca_bundle or REQUESTS_CA_BUNDLE.",
    )
    s3_requester_pays: bool = Field(default=False, description="Pay for requests to requester-pays buckets.")
    credentials_timeout_seconds: Seconds = Field(
        default=60.0,
        description="Limit for boto3, and for the libraries of other stores, to find or renew credentials.",
    )
    s3_access_key_id: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Secret, for all ranks; unset = each node's own credentials, as boto3 finds them.",
    )
    s3_secret_access_key: SecretStr | None = Field(
        default=None, min_length=1, description="Secret; goes with s3_access_key_id."
    )
    s3_session_token: SecretStr | None = Field(
        default=None, min_length=1, description="Secret; of temporary keys only."
    )
    hf_token: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Secret, for all ranks; token of the Hugging Face Hub, unset = each node's own, as huggingface_hub finds it.",
    )
    azure_unsigned: bool = Field(default=False, description="Send no credentials to Azure: public containers.")
    gs_unsigned: bool = Field(default=False, description="Send no credentials to Google: public buckets.")
    gs_user_project: str | None = Field(
        default=None, min_length=1, description="Project of Google that pays for requests to requester-pays buckets."
    )
    http_query: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Secret; what follows the ? of signed https addresses, put behind the address of every file.",
    )
    http_signed: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Secret; made from a signed https uri, or from a list of files: what is sent behind their addresses.",
    )
    http_authorization: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Secret; the header Authorization for an https server, such as Bearer TOKEN.",
    )

    @validates_model(mode="after")
    def _check_credentials(self) -> Self:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("s3_access_key_id and s3_secret_access_key go together; give both or none")
        if self.s3_session_token is not None and self.s3_access_key_id is None:
            raise ValueError("s3_session_token needs the s3_access_key_id and s3_secret_access_key that it came with")
        if self.s3_unsigned and (self.s3_access_key_id is not None or self.s3_requester_pays):
            raise ValueError("s3_unsigned sends no credentials; give it, or keys and s3_requester_pays, not both")
        return self
