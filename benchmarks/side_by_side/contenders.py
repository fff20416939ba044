"""Who loads? This project and others; and where somebody cannot load from, with the reason, which the tables print."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_FILES_ONLY = "reads local files; what a download costs is in the row of safetensors' slices"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to load.

    Attributes:
        name: In tables.
        loader: Its class, a name of `loaders.LOADERS`.
        environment: Variables that its processes get; {staging_bytes} is the staging memory of a rank.
        refusals: By kind of place, or by a place's name: why it cannot load from there.
        package: The distribution whose version is told.
    """

    name: str
    loader: str
    environment: Mapping[str, str] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)
    package: str

    def refusal(self, place: str, kind: str) -> str | None:
        """Why it cannot load from a place; None where it can."""
        return self.refusals.get(place, self.refusals.get(kind))


OURS = Contender(name="ray_streamer", loader="ray_streamer", package="ray_streamer")

_RUNAI_TUNED = {
    "RUNAI_STREAMER_MEMORY_LIMIT": "{staging_bytes}",
    # One client with as many connections as this project has streams: what costs it least here.
    "RUNAI_STREAMER_OBJ_CONCURRENCY": "1",
    "RUNAI_STREAMER_S3_MAX_CONNECTIONS": "16",
    "RUNAI_STREAMER_S3_TARGET_GBPS": "4",
    "RUNAI_STREAMER_CONCURRENCY": "4",
}
_NO_WEB = {"web": "has no client for web servers"}

OTHERS = (
    Contender(name="Run:ai streamer", loader="runai", refusals=_NO_WEB, package="runai-model-streamer"),
    Contender(
        name="Run:ai streamer, tuned",
        loader="runai",
        environment=_RUNAI_TUNED,
        refusals=_NO_WEB,
        package="runai-model-streamer",
    ),
    Contender(
        name="Run:ai streamer, distributed (gloo)",
        loader="runai, distributed",
        environment={"RUNAI_STREAMER_DIST": "1"},
        refusals=_NO_WEB,
        package="runai-model-streamer",
    ),
    Contender(name="safetensors, slices", loader="safetensors, slices", package="safetensors"),
    Contender(name="safetensors, every file whole", loader="safetensors, whole files", package="safetensors"),
    Contender(
        name="boto3 into memory, then safetensors",
        loader="boto3",
        refusals={"disk": "reads S3 only", "web": "reads S3 only"},
        package="boto3",
    ),
    Contender(
        name="transformers, tensor-parallel",
        loader="transformers",
        refusals={"s3-tls": _FILES_ONLY, "web": _FILES_ONLY},
        package="transformers",
    ),
    Contender(
        name="torch DCP, HuggingFaceStorageReader",
        loader="dcp",
        refusals={"s3-tls": _FILES_ONLY, "web": _FILES_ONLY},
        package="torch",
    ),
    Contender(
        name="fastsafetensors",
        loader="fastsafetensors",
        refusals={"s3-tls": _FILES_ONLY, "web": _FILES_ONLY},
        package="fastsafetensors",
    ),
)
OUR_DCP = Contender(name="torch DCP, ray_streamer's StorageReader", loader="dcp, ray_streamer", package="ray_streamer")
"""This project under torch's interface; measured where it is asked for."""

BY_DEFAULT = tuple(contender.name for contender in (OURS, *OTHERS))
CONTENDERS = {contender.name: contender for contender in (OURS, *OTHERS, OUR_DCP)}
"""By name, this project first."""
