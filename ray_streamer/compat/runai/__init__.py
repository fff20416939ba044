"""How does a script that was written for Run:ai's model streamer load through this package? Only its import changes.

    from ray_streamer.compat.runai import SafetensorsStreamer      # was: from runai_model_streamer import ...

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(["s3://bucket/llama/model-00001-of-00002.safetensors", ...])
        for name, tensor in streamer.get_tensors():
            model[name].copy_(tensor)

Names, arguments, defaults and kinds of errors are those of version 0.17. `docs/runai_compat.md` says what differs.
"""

from ray_streamer.compat.runai.chunks import FileChunks
from ray_streamer.compat.runai.credentials import S3Credentials
from ray_streamer.compat.runai.errors import (
    CorruptedFileError,
    FileAccessError,
    RunaiStreamerInvalidInputException,
    RunaiStreamerMemoryLimitException,
    UnusableDeviceError,
)
from ray_streamer.compat.runai.file_streamer import DistributedStreamer, FileStreamer
from ray_streamer.compat.runai.files import ObjectStorageModel, list_safetensors, pull_files
from ray_streamer.compat.runai.safetensors_streamer import SafetensorMetadata, SafetensorsStreamer

__all__ = [
    "CorruptedFileError",
    "DistributedStreamer",
    "FileAccessError",
    "FileChunks",
    "FileStreamer",
    "ObjectStorageModel",
    "RunaiStreamerInvalidInputException",
    "RunaiStreamerMemoryLimitException",
    "S3Credentials",
    "SafetensorMetadata",
    "SafetensorsStreamer",
    "UnusableDeviceError",
    "list_safetensors",
    "pull_files",
]
