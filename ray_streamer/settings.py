"""Which knobs are there, what are their defaults, and where does a value come from?

One value for each knob, in this order: an explicit argument, the environment variable `RAY_STREAMER_<NAME>`, a variable
of another loader that means the same (`ALIASES`), the default below. Leaf functions never read the environment; they
take what they need as arguments.
"""

from __future__ import annotations

import difflib
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr, TypeAdapter, ValidationError
from pydantic import model_validator as validates_model
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ray_streamer.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 1 << 20
ENV_PREFIX = "RAY_STREAMER_"

REPLACE_RUNAI = f"{ENV_PREFIX}REPLACE_RUNAI"
"""Variable that makes the vLLM plugin answer for load format `runai_streamer`; no setting of a load."""

# A week: longer waits are endless to people, and some are too long for the operating system's clocks.
_LONGEST_SECONDS = 7 * 24 * 3600

logger = logging.getLogger(__name__)

_BYTE_SIZE: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


@dataclass(frozen=True, slots=True)
class Alias:
    """A variable of Run:ai's streamer that is read where ours is not set.

    Attributes:
        variable: Its name.
        setting: Field of `Settings` that it sets.
        note: How its meaning differs there.
        meanings: Values that are written otherwise here, None = as if it were not set; other values are taken as they are.
    """

    variable: str
    setting: str
    note: str
    meanings: Mapping[str, str | None] = field(default_factory=dict)

    def value(self) -> str | None:
        """What the variable says, in this package's words; None when it is unset or empty."""
        text = os.environ.get(self.variable) or None
        return self.meanings.get(text.lower(), text) if text else None


ALIASES = (
    Alias(
        "RUNAI_STREAMER_CONCURRENCY",
        "concurrency",
        "There: threads of a process, or clients with many requests each. Here: requests in flight per rank.",
    ),
    Alias(
        "RUNAI_STREAMER_MEMORY_LIMIT",
        "memory_limit",
        "There: host buffers of a process, or of a whole node in distributed mode; at least the largest tensor, which is "
        "also what 0 means; 40 GB unless set. Here: staging per rank, one block being enough.",
    ),
    Alias(
        "RUNAI_STREAMER_CHUNK_BYTESIZE",
        "block_bytes",
        "There: raised to 2 MiB for files and 5 MiB for objects. Here: any multiple of 4096.",
    ),
    Alias(
        "RUNAI_STREAMER_S3_TIMEOUT",
        "retry_deadline_seconds",
        "There: 0 leaves the time to the library below. Here: 0 in this variable counts as unset.",
        {"0": None},
    ),
    Alias("RUNAI_STREAMER_S3_ENDPOINT", "s3_endpoint_url", "The same; it comes before AWS_ENDPOINT_URL."),
    Alias(
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING",
        "s3_addressing",
        "There: virtual unless set. Here: 1 is `virtual`, 0 is `path`, unset is `auto`.",
        {"1": "virtual", "true": "virtual", "0": "path", "false": "path"},
    ),
    Alias("RUNAI_STREAMER_S3_UNSIGNED", "s3_unsigned", "The same."),
)
"""The one table of foreign names; `docs/settings.md` repeats it."""


class _AliasSource(PydanticBaseSettingsSource):
    """Values of `ALIASES`, for pydantic-settings."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        found = [alias.value() for alias in ALIASES if alias.setting == field_name]
        return next((value for value in found if value is not None), None), field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {alias.setting: self.get_field_value(None, alias.setting)[0] for alias in ALIASES}
        return {name: value for name, value in values.items() if value is not None}


def _parse_memory_limit(value: Any) -> int:
    """Bytes, with text such as "512MiB" allowed, or -1."""
    return -1 if str(value).strip() == "-1" else int(_BYTE_SIZE.validate_python(value))


def _make_absolute(path: Any) -> Any:
    """Ranks may work in another folder, or as another user, than who names the file."""
    return os.path.abspath(os.path.expanduser(path)) if path and isinstance(path, str | os.PathLike) else path


def _refuse_user(url: str) -> str:
    """A user name in an address would show up in errors and logs."""
    if "@" in url:
        raise ValueError("credentials do not belong into an address; see s3_access_key_id and s3_secret_access_key")
    return url


class Settings(BaseSettings):
    """Every knob of a load. Byte sizes also accept text such as "512MiB".

    Attributes are documented by their `description`; `ray-streamer load --help` and `docs/settings.md` repeat them.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

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
        description="Contiguous runs of at least this size are read exactly; shorter ones together with the bytes between them. "
        "Unset = 256 KiB on object stores, 64 KiB on filesystems.",
    )
    max_gap_bytes: ByteSize = Field(
        default=ByteSize(64 << 10), description="Largest gap of unneeded bytes that one request reads over."
    )
    direct_io: Literal["auto", "on", "off"] = Field(
        default="auto", description="O_DIRECT on local filesystems: auto = when a file is not in the page cache."
    )
    page_cache: Literal["auto", "on", "off"] = Field(
        default="auto", description="Copy from an mmap of a local file: auto = when it is in the page cache."
    )
    device_scratch_bytes: ByteSize = Field(
        default=ByteSize(0),
        description="GPU memory per rank, besides the tensors, for cutting rows shorter than 1 KiB; 0 = such rows are packed on "
        "the host.",
    )
    gpu_direct_storage: Literal["on", "off"] = Field(
        default="off",
        description="GPUDirect Storage (kvikio) for blocks of local files that only one rank needs and that are contiguous in its "
        "tensor.",
    )
    startup_timeout_seconds: float = Field(
        default=300.0, gt=0, description="Limit for placing, starting and connecting the ranks."
    )
    neighbour_timeout_seconds: float = Field(
        default=8.0,
        gt=0,
        description="Limit for a rank of the same node that is stopped or hangs (no message, no CPU time) while others wait for it.",
    )
    progress_timeout_seconds: float = Field(
        default=300.0,
        gt=0,
        description="Limit for one step of a rank of the same node that others wait for: headers, a plan, a block.",
    )
    connect_timeout_seconds: float = Field(
        default=10.0, gt=0, le=_LONGEST_SECONDS, allow_inf_nan=False, description="Limit for opening a connection."
    )
    first_byte_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        le=_LONGEST_SECONDS,
        allow_inf_nan=False,
        description="Limit for the response headers of an object store.",
    )
    stall_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        le=_LONGEST_SECONDS,
        allow_inf_nan=False,
        description="Limit for each MiB of a response body of an object store.",
    )
    list_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        le=_LONGEST_SECONDS,
        allow_inf_nan=False,
        description="Limit for listing one folder of an object store, all pages together.",
    )
    retry_deadline_seconds: float = Field(
        default=120.0,
        ge=0,
        le=_LONGEST_SECONDS,
        allow_inf_nan=False,
        description="How long one read is retried after transient errors.",
    )
    hedge_percent: float = Field(
        default=5.0,
        ge=0,
        le=100,
        description="Hedged requests per 100 requests: sent when the response headers of an object store are late.",
    )
    max_bandwidth: ByteSize | None = Field(
        default=None, gt=0, description="Bytes per second from object stores, over all ranks of one node."
    )
    metrics: bool = Field(
        default=False,
        description="Publish metrics of each rank: at Ray's Prometheus endpoint, or through OpenTelemetry where there is no Ray.",
    )
    strict_index: bool = Field(
        default=False,
        description="Refuse a checkpoint whose index json and files disagree. Otherwise the index decides, with a warning.",
    )
    cache_dir: str = Field(
        default="~/.cache/ray_streamer",
        min_length=1,
        description="Folder on each node that caches config and tokenizer files of remote checkpoints.",
    )
    s3_endpoint_url: Annotated[str, AfterValidator(_refuse_user)] | None = Field(
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
    credentials_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        le=_LONGEST_SECONDS,
        allow_inf_nan=False,
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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Where values come from, the first before the others; called by pydantic-settings."""
        return init_settings, env_settings, _AliasSource(settings_cls)

    @validates_model(mode="after")
    def _check_credentials(self) -> Self:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("s3_access_key_id and s3_secret_access_key go together; give both or none")
        if self.s3_session_token is not None and self.s3_access_key_id is None:
            raise ValueError("s3_session_token needs the s3_access_key_id and s3_secret_access_key that it came with")
        if self.s3_unsigned and (self.s3_access_key_id is not None or self.s3_requester_pays):
            raise ValueError("s3_unsigned sends no credentials; give it, or keys and s3_requester_pays, not both")
        return self

    @classmethod
    def resolve(cls, **explicit: Any) -> Self:
        """The settings in force; arguments that are None count as not given.

        Raises:
            SettingsError: A value, given or from the environment, cannot be used; names each one.
        """
        given = {name: value for name, value in explicit.items() if value is not None}
        _tell_misspelt_variables()
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsError(_explain(error, set(given))) from None

    @classmethod
    def of_call(cls, settings: Self | None, **explicit: Any) -> Self:
        """The settings of one call: its own arguments win over `settings`, which stand in place of the environment.

        Raises:
            SettingsError: A value cannot be used.
        """
        return cls.resolve(**explicit) if settings is None else settings.override(**explicit)

    def override(self, **explicit: Any) -> Self:
        """These settings with some replaced; arguments that are None count as not given.

        Raises:
            SettingsError: A value cannot be used.
        """
        given = {name: value for name, value in explicit.items() if value is not None}
        # Frozen, and checked when they were made.
        return type(self).resolve(**self.model_dump() | given) if given else self


SECRET_SETTINGS = frozenset(
    name for name, info in Settings.model_fields.items() if SecretStr in get_args(info.annotation)
)
"""Settings that no output shows and that no command line takes, since command lines are public."""


def replaces_runai() -> bool:
    """Whether `REPLACE_RUNAI` is on in this process.

    Raises:
        SettingsError: Its value is neither yes nor no.
    """
    text = os.environ.get(REPLACE_RUNAI, "")
    try:
        return TypeAdapter(bool).validate_python(text or False)
    except ValidationError:
        raise SettingsError(f"environment variable {REPLACE_RUNAI}={text!r}: give 1, or leave it out") from None


_told: set[str] = set()


def _tell_misspelt_variables() -> None:
    """Warns once of variables that look like settings and are none: they change nothing, and somebody meant them to."""
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix(ENV_PREFIX).lower()
        is_ours = variable.upper().startswith(ENV_PREFIX) and variable != REPLACE_RUNAI
        if is_ours and name not in Settings.model_fields and variable not in _told:
            _told.add(variable)
            logger.warning("environment variable %s is no setting%s", variable, _nearest(name, prefix=ENV_PREFIX))


def _nearest(name: str, *, prefix: str = "") -> str:
    """The end of a sentence about a name that is no setting: the setting that may have been meant."""
    found = difflib.get_close_matches(name.lower(), Settings.model_fields, 1)
    if not found:
        return "; docs/settings.md lists them"
    return f"; did you mean {prefix + found[0].upper() if prefix else found[0]}?"


def _explain(error: ValidationError, explicit: set[str]) -> str:
    lines: list[str] = []
    for fault in error.errors(include_url=False):
        if not fault["loc"]:
            line = fault["msg"]
        else:
            name = str(fault["loc"][0])
            wrong = fault["msg"] if name in Settings.model_fields else f"no such setting{_nearest(name)}"
            line = f"{_origin(name, explicit)}={_shown(name, fault['input'])}: {wrong}"
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)


def _origin(name: str, explicit: set[str]) -> str:
    """The argument or variable that gave a setting its value."""
    if name in explicit:
        return name
    variables = [f"{ENV_PREFIX}{name.upper()}", *(alias.variable for alias in ALIASES if alias.setting == name)]
    return f"environment variable {next((found for found in variables if os.environ.get(found)), variables[0])}"


def _shown(name: str, value: Any) -> str:
    """The value, unless it could be a secret: what belongs to a misspelt name may be one, and so may a user in a url."""
    is_secret = name in SECRET_SETTINGS or name not in Settings.model_fields or "@" in str(value)
    return "(not shown)" if is_secret else repr(value)
