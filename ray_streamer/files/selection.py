"""Which files of a folder are meant? Globs of paths, as `huggingface_hub.snapshot_download` takes them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_streamer.errors import CheckpointError, SettingsError
from ray_streamer.wording import has_controls, shown

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Selection:
    """Files whose path matches one of `allow`, if there are any, and none of `ignore` unless one of `keep`.

    >>> Selection(allow=("*.json",), ignore=("original/*",)).of(["config.json", "a.bin", "original/params.json"])
    ['config.json']

    Attributes:
        allow: Globs of paths relative to the folder; `*` also stands for "/". None given = every file.
        ignore: The same, of files that are left out.
        keep: The same, of files that are not left out after all.

    Raises:
        SettingsError: They are no tuples of text.
    """

    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, globs in (("allow", self.allow), ("ignore", self.ignore), ("keep", self.keep)):
            if not isinstance(globs, tuple) or not all(isinstance(glob, str) and glob for glob in globs):
                raise SettingsError(f'{name} is a list of globs such as ["*.json", "tokenizer*"], got {globs!r}')

    @classmethod
    def from_globs(cls, allow: str | Sequence[str] | None, ignore: str | Sequence[str] | None) -> Selection:
        """What people write: one glob, several, or None.

        Raises:
            SettingsError: It is neither.
        """
        return cls(_as_globs(allow), _as_globs(ignore))

    def of(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are meant, in their order."""
        return [path for path in paths if self._means(path)]

    def _means(self, path: str) -> bool:
        is_allowed = not self.allow or _matches(path, self.allow)
        return is_allowed and (not _matches(path, self.ignore) or _matches(path, self.keep))


def _matches(path: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, glob) for glob in globs)


ENGINE_FILES = Selection(
    ignore=(
        *(f"*.{suffix}" for suffix in ("safetensors", "bin", "pt", "pth", "gguf", "ggml", "h5", "msgpack", "onnx")),
        *("*.tensors", "*.ckpt", "*.npz", "*.tflite", "*.pdf", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.mp4", "*.zip"),
        *("original/*", "metal/*", "onnx/*", "openvino/*", "coreml/*", "runs/*", ".*", "*/.*"),
    ),
    # What engines take from the folder themselves: modules of sentence-transformers, heads of bge-m3 and ClefOmni, and Kimi-Audio's encoder.
    keep=(
        *("[0-9]*_Dense/*.safetensors", "[0-9]*_Dense/pytorch_model.bin"),
        *("*_linear.pt", "joint_head.safetensors", "whisper-large-v3/*.safetensors"),
    ),
)
"""What an engine needs beside the weights: config, tokenizer, chat template, remote code. Of weights, whatever their format, only those
that it looks for there."""


def check_path(path: str, *, uri: str) -> None:
    """Refuses a path that could lead out of the folder that it is copied to.

    Raises:
        CheckpointError: Names it.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts) or has_controls(path):
        raise CheckpointError(
            f"{uri} has a file called {shown(path)}, which is no plain relative path; remove it there, or leave it "
            "out with ignore="
        )


def _as_globs(globs: str | Sequence[str] | None) -> Any:
    """Globs as a tuple; what is no series of any kind as it is, to be refused by name."""
    if globs is None:
        return ()
    return (globs,) if isinstance(globs, str) else tuple(globs) if isinstance(globs, Iterable) else globs
