"""Which knobs are there, what are their defaults, and where does a value come from?

One value for each knob, in this order: an explicit argument, the environment variable `RAY_STREAMER_<NAME>`, the default
below. Leaf functions never read the environment; they take what they need as arguments.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ray_streamer.errors import SettingsError

MIB = 1 << 20
ENV_PREFIX = "RAY_STREAMER_"

_BYTE_SIZE: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


def _parse_memory_limit(value: Any) -> int:
    """Bytes, with text such as "512MiB" allowed, or -1."""
    return -1 if str(value).strip() == "-1" else int(_BYTE_SIZE.validate_python(value))


class Settings(BaseSettings):
    """Every knob of a load. Byte sizes also accept text such as "512MiB".

    Attributes are documented by their `description`; `ray-streamer load --help` and `docs/settings.md` repeat them.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    concurrency: int = Field(default=16, ge=1, le=1024, description="Reads in flight per rank.")
    memory_limit: Annotated[int, BeforeValidator(_parse_memory_limit)] | None = Field(
        default=None,
        description="Staging bytes per rank: N = at most N; 0 = the least that works; -1 = as much as the plan can use; "
        "unset = the smaller of 1 GiB and a quarter of the node's available memory over its local ranks.",
    )
    node_memory_limit: ByteSize | None = Field(default=None, description="Staging bytes over all ranks of one node.")
    block_bytes: ByteSize = Field(
        default=ByteSize(8 * MIB), ge=4096, multiple_of=4096, description="Largest storage request; a multiple of 4096."
    )
    min_run_bytes: ByteSize | None = Field(
        default=None,
        description="Runs at least this long are read exactly, shorter ones with what lies between; unset = 256 KiB on "
        "object stores, 64 KiB on filesystems.",
    )
    max_gap_bytes: ByteSize = Field(
        default=ByteSize(64 << 10), description="Unwanted bytes that are read rather than split a request."
    )
    direct_io: Literal["auto", "on", "off"] = Field(
        default="auto", description="O_DIRECT on local filesystems: auto = when a file is not in the page cache."
    )
    page_cache: Literal["auto", "on", "off"] = Field(
        default="auto", description="Copy from a mapping of a local file: auto = when it is in the page cache."
    )
    startup_timeout_seconds: float = Field(
        default=300.0, gt=0, description="How long ranks may take to be placed, started and connected."
    )
    connect_timeout_seconds: float = Field(default=10.0, gt=0, description="How long a connection may take.")
    read_timeout_seconds: float = Field(default=30.0, gt=0, description="How long a connection may be silent.")
    retry_deadline_seconds: float = Field(
        default=120.0, ge=0, description="How long one read may be tried again after a passing fault."
    )
    s3_endpoint_url: str | None = Field(default=None, description="S3 endpoint; unset = AWS_ENDPOINT_URL[_S3] or AWS.")
    s3_region: str | None = Field(default=None, description="S3 region; unset = botocore's own search.")
    s3_profile: str | None = Field(default=None, description="Profile of the AWS configuration files.")
    s3_addressing: Literal["auto", "path", "virtual"] = Field(
        default="auto", description="Bucket in the path or in the host name; auto = botocore's choice."
    )
    s3_unsigned: bool = Field(default=False, description="Send no credentials: public buckets.")
    s3_ca_bundle: str | None = Field(default=None, description="CA file for https endpoints; unset = AWS_CA_BUNDLE.")

    @classmethod
    def resolve(cls, **explicit: Any) -> Self:
        """The settings in force; arguments that are None count as not given.

        Raises:
            SettingsError: A value, given or from the environment, cannot be used; names each one.
        """
        given = {name: value for name, value in explicit.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsError(_explain(error, set(given))) from None

    def override(self, **explicit: Any) -> Self:
        """These settings with some replaced; arguments that are None count as not given.

        Raises:
            SettingsError: A value cannot be used.
        """
        return type(self).resolve(
            **self.model_dump() | {name: value for name, value in explicit.items() if value is not None}
        )


def _explain(error: ValidationError, explicit: set[str]) -> str:
    lines: list[str] = []
    for fault in error.errors(include_url=False):
        name = str(fault["loc"][0]) if fault["loc"] else "settings"
        given = explicit and name in explicit
        origin = name if given else f"environment variable {ENV_PREFIX}{name.upper()}"
        line = f"{origin}={fault.get('input')!r}: {fault['msg']}"
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)
