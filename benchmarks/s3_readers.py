"""Who reads from S3? One class for each client: objects in, blocks of them in memory, nothing kept.

Each reads every byte of the objects once, with so many requests in flight at a time and so much memory for what is under way
(`Task.streams` blocks, or the least that the client accepts). Blocks are handed to `seen` where they landed, for as long as the call
lasts. Clients whose reads fill memory of the caller's get memory that is there already; others bring their own.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Seen = Callable[[str, int, Any], None]
    """Called with key, offset and bytes of what has landed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be read, and how.

    Attributes:
        endpoint_url: The server.
        ca_file: What to trust there; None for plain HTTP.
        region: Of the server.
        access_key: Of the one user.
        secret_key: Of the one user.
        bucket: Where the objects are.
        sizes: Bytes of each object, by key.
        streams: Requests in flight.
        block_bytes: Of one request.
    """

    endpoint_url: str
    ca_file: str | None
    region: str
    access_key: str
    secret_key: str
    bucket: str
    sizes: dict[str, int]
    streams: int
    block_bytes: int

    @property
    def memory_bytes(self) -> int:
        """What may be under way."""
        return self.streams * self.block_bytes

    def blocks(self) -> Iterator[tuple[str, int, int]]:
        """Key, start and stop of each request."""
        for key, size_bytes in self.sizes.items():
            for start in range(0, size_bytes, self.block_bytes):
                yield key, start, min(start + self.block_bytes, size_bytes)


class Reader(Protocol):
    """A client, opened for one task."""

    def __init__(self, task: Task) -> None: ...

    def read_all(self, seen: Seen) -> None:
        """Read every object once."""
        ...


class _Threads:
    """Readers whose client fills a buffer, or gives one, for one range at a time: as many threads as streams."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.slots = [memoryview(bytearray(b"\1" * task.block_bytes)) for _ in range(task.streams)]

    def read(self, key: str, start: int, stop: int, slot: memoryview) -> Any:
        """The bytes of one range, in `slot` or in memory of the client's."""
        raise NotImplementedError

    def read_all(self, seen: Seen) -> None:
        blocks = self.task.blocks()
        lock = threading.Lock()

        def work(slot: memoryview) -> None:
            while True:
                with lock:
                    block = next(blocks, None)
                if block is None:
                    return
                key, start, stop = block
                seen(key, start, self.read(key, start, stop, slot[: stop - start]))

        with ThreadPoolExecutor(self.task.streams) as pool:
            for _ in pool.map(work, self.slots):
                pass


class RayStreamer(_Threads):
    """This project's storage, as a rank's threads use it."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from ray_streamer import Settings
        from ray_streamer.storage import open_storage

        settings = Settings.resolve(
            concurrency=task.streams,
            s3_endpoint_url=task.endpoint_url,
            s3_region=task.region,
            s3_ca_bundle=task.ca_file,
            s3_access_key_id=task.access_key,
            s3_secret_access_key=task.secret_key,
        )
        self.storage = open_storage(f"s3://{task.bucket}", settings)
        self.etags = {key: self.storage.size_and_etag(key).etag for key in task.sizes}

    def read(self, key: str, start: int, stop: int, slot: memoryview) -> Any:
        from ray_streamer.extent import Extent

        self.storage.read_into(key, Extent(start, stop), slot, etag=self.etags[key])
        return slot


def _boto3_client(task: Task) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=task.endpoint_url,
        region_name=task.region,
        verify=task.ca_file,
        aws_access_key_id=task.access_key,
        aws_secret_access_key=task.secret_key,
        config=Config(max_pool_connections=task.streams, s3={"addressing_style": "path"}),
    )


class Boto3Get(_Threads):
    """boto3 `get_object` of a range, and `readinto`."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.client = _boto3_client(task)

    def read(self, key: str, start: int, stop: int, slot: memoryview) -> Any:
        body = self.client.get_object(Bucket=self.task.bucket, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
        num_bytes = 0
        while num_bytes < stop - start:
            num_bytes += body.readinto(slot[num_bytes:])
        body.close()
        return slot


class Boto3Download:
    """boto3 `download_fileobj`, one object after the other, into a file that keeps nothing."""

    def __init__(self, task: Task) -> None:
        from boto3.s3.transfer import TransferConfig

        self.task = task
        self.client = _boto3_client(task)
        self.config = TransferConfig(
            multipart_threshold=task.block_bytes,
            multipart_chunksize=task.block_bytes,
            max_concurrency=task.streams,
            use_threads=task.streams > 1,
        )

    def read_all(self, seen: Seen) -> None:
        for key in self.task.sizes:
            self.client.download_fileobj(self.task.bucket, key, _Sink(key, seen), Config=self.config)


class _Sink:
    """A file that shows what is written to it."""

    def __init__(self, key: str, seen: Seen) -> None:
        self._key = key
        self._seen = seen
        self._num_bytes = 0

    def write(self, data: bytes) -> int:
        self._seen(self._key, self._num_bytes, data)
        self._num_bytes += len(data)
        return len(data)


class Obstore(_Threads):
    """obstore `get_range`, in threads; it brings its own memory."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from pathlib import Path

        import obstore
        from obstore.store import S3Store

        options: dict[str, Any] = {"allow_http": True}
        if task.ca_file:
            options["root_certificate"] = Path(task.ca_file).read_text()
        self.get_range = obstore.get_range
        self.store = S3Store(
            task.bucket,
            endpoint=task.endpoint_url,
            region=task.region,
            access_key_id=task.access_key,
            secret_access_key=task.secret_key,
            client_options=options,
        )

    def read(self, key: str, start: int, stop: int, slot: memoryview) -> Any:
        return memoryview(self.get_range(self.store, key, start=start, end=stop))


class S3TorchConnector(_Threads):
    """s3torchconnector's range based reader, one per thread and object."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        if task.ca_file:
            raise NotImplementedError("takes no CA file")
        from s3torchconnector import S3ClientConfig, S3ReaderConstructor
        from s3torchconnector._s3client import S3Client

        os.environ["AWS_ACCESS_KEY_ID"] = task.access_key
        os.environ["AWS_SECRET_ACCESS_KEY"] = task.secret_key
        self.constructor = S3ReaderConstructor.range_based(buffer_size=0)
        config = S3ClientConfig(force_path_style=True, part_size=task.block_bytes)
        self.client = S3Client(task.region, endpoint=task.endpoint_url, s3client_config=config)

    def read(self, key: str, start: int, stop: int, slot: memoryview) -> Any:
        reader = self.client.get_object(self.task.bucket, key, reader_constructor=self.constructor)
        reader.seek(start)
        reader.readinto(slot)
        return slot


class Awscrt(_Threads):
    """awscrt's S3 client: one ranged GET per block, of which its own threads copy the body."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        from urllib.parse import urlsplit

        from awscrt import auth, http, io, s3

        self.http = http
        self.s3 = s3
        self.host = urlsplit(task.endpoint_url).netloc
        tls = None
        if task.ca_file:
            context = io.TlsContextOptions()
            context.override_default_trust_store_from_path(None, task.ca_file)
            tls = io.ClientTlsContext(context).new_connection_options()
        self.client = s3.S3Client(
            bootstrap=io.ClientBootstrap.get_or_create_static_default(),
            region=task.region,
            tls_mode=s3.S3RequestTlsMode.ENABLED if tls else s3.S3RequestTlsMode.DISABLED,
            tls_connection_options=tls,
            signing_config=s3.create_default_s3_signing_config(
                region=task.region,
                credential_provider=auth.AwsCredentialsProvider.new_static(task.access_key, task.secret_key),
            ),
            part_size=task.block_bytes,
            max_active_connections_override=task.streams,
            # The least that it accepts.
            memory_limit=1 << 30,
        )

    def read(self, key: str, start: int, stop: int, slot: memoryview) -> Any:
        headers = self.http.HttpHeaders([("host", self.host), ("range", f"bytes={start}-{stop - 1}")])
        request = self.http.HttpRequest("GET", f"/{self.task.bucket}/{key}", headers)

        def on_body(chunk: bytes, offset: int, **_: Any) -> None:
            at = offset - start if offset >= start else offset
            slot[at : at + len(chunk)] = chunk

        self.client.make_request(
            type=self.s3.S3RequestType.GET_OBJECT, request=request, on_body=on_body
        ).finished_future.result()
        return slot


class RunaiStreamer:
    """Run:ai's streamer as it comes, but for the memory limit; its number of connections is its own choice."""

    environment: dict[str, str] = {}  # noqa: RUF012 - read before an instance exists

    def __init__(self, task: Task) -> None:
        self.task = task
        os.environ |= {
            "AWS_ENDPOINT_URL": task.endpoint_url,
            "AWS_ACCESS_KEY_ID": task.access_key,
            "AWS_SECRET_ACCESS_KEY": task.secret_key,
            "AWS_DEFAULT_REGION": task.region,
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            **({"AWS_CA_BUNDLE": task.ca_file} if task.ca_file else {}),
            **{name: value.format(streams=task.streams) for name, value in self.environment.items()},
        }
        from runai_model_streamer import FileStreamer
        from runai_model_streamer.file_streamer.requests_iterator import FileChunks

        self.streamer = FileStreamer
        self.keys = list(task.sizes)
        self.starts = {key: [at for name, at, _ in task.blocks() if name == key] for key in self.keys}
        self.chunks = [
            FileChunks(
                number,
                f"s3://{task.bucket}/{key}",
                self.starts[key],
                [stop - start for name, start, stop in task.blocks() if name == key],
            )
            for number, key in enumerate(self.keys)
        ]

    def read_all(self, seen: Seen) -> None:
        with self.streamer() as streamer:
            streamer.stream_files(self.chunks, None, "cpu", self.task.memory_bytes)
            for number, block, tensor in streamer.get_chunks():
                key = self.keys[number]
                seen(key, self.starts[key][block], memoryview(tensor.numpy()).cast("B"))


class RunaiStreamerTuned(RunaiStreamer):
    """Run:ai's streamer as it costs least here: one client, as many connections as streams, a modest target."""

    environment = {  # noqa: RUF012
        "RUNAI_STREAMER_OBJ_CONCURRENCY": "1",
        "RUNAI_STREAMER_S3_MAX_CONNECTIONS": "{streams}",
        "RUNAI_STREAMER_S3_TARGET_GBPS": "4",
        "RUNAI_STREAMER_RING_BUFFERS": "{streams}",
    }


READERS: dict[str, type[Any]] = {
    "ray_streamer": RayStreamer,
    "boto3 get_object, readinto": Boto3Get,
    "boto3 download_fileobj": Boto3Download,
    "obstore get_range": Obstore,
    "s3torchconnector": S3TorchConnector,
    "awscrt": Awscrt,
    "Run:ai streamer": RunaiStreamer,
    "Run:ai streamer, tuned": RunaiStreamerTuned,
}
"""By name, this project first."""
