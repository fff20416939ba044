"""Four ranks load from each store: every byte is sent once, by the count of what leaves the server, and who asks is renewed meanwhile."""

from __future__ import annotations

import secrets
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
from api_support import rank_tasks
from api_support.processes import RankProcesses
from pyarrow import fs

from ray_streamer.checkpoint.header_reads import HEAD_BYTES
from ray_streamer.settings import Settings
from ray_streamer.testing.azure_identity import MachineIdentity
from ray_streamer.testing.azurite import ACCOUNT, KEY, azurite, azurite_program
from ray_streamer.testing.certificates import make_certificates
from ray_streamer.testing.faults import FaultProxy
from ray_streamer.testing.file_server import FileServer, file_bytes
from ray_streamer.testing.google_tokens import TokenServer
from ray_streamer.testing.hostile_store import HostileStore, answer_bytes
from ray_streamer.testing.hub_server import HubServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ray_streamer.rank.statistics import RankStatistics
    from ray_streamer.testing.hostile_store import Asked

TP = 4
GOOGLE_SERVER = Path(__file__).parents[1] / "storage" / "google_server.py"
SETTINGS = Settings(memory_limit=1 << 20, block_bytes=1 << 16, max_gap_bytes=0, hedge_percent=0)
NUM_REQUESTS_BEFORE_THE_END = 20
"""So many requests are answered before credentials or addresses end; a load has about three times as many."""


@dataclass
class Place:
    """A checkpoint in a store.

    Attributes:
        uri: Of it.
        proxies: All that the store sends goes through these.
        environment: By which the ranks find it.
        google: What the ranks take for Google's own address.
        hub: What stands in for the Hub.
    """

    uri: str
    proxies: list[FaultProxy] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    google: str = ""
    hub: HubServer | None = None

    @property
    def bytes_sent(self) -> int:
        return sum(proxy.num_body_bytes for proxy in self.proxies)

    @property
    def num_requests(self) -> int:
        return sum(len(proxy.ranges) for proxy in self.proxies)


@pytest.fixture(scope="module")
def quartet() -> Iterator[RankProcesses]:
    """Four processes that can be ranks."""
    with RankProcesses(TP, are_forked=True) as processes:
        yield processes


def load(quartet: RankProcesses, place: Place, folder: Path) -> list[RankStatistics]:
    """Load on four ranks, compare every slice with the files, and give the ranks' statistics."""
    session = secrets.token_hex(8)
    for rank in range(TP):
        quartet.order(
            rank,
            rank_tasks.load_and_count,
            environment=place.environment,
            uri=place.uri,
            folder=str(folder),
            google=place.google,
            tp=TP,
            rank=rank,
            world_size=TP,
            session=session,
            settings=SETTINGS,
        )
    answers = [quartet.answer(rank) for rank in range(TP)]
    assert [answer for answer in answers if isinstance(answer, Exception)] == []
    assert [wrong for wrong, _ in answers] == [[]] * TP
    return [statistics for _, statistics in answers]


@contextmanager
def google(files: dict[str, bytes], tls_file: Path | None = None) -> Iterator[Place]:
    command = [sys.executable, str(GOOGLE_SERVER)]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as server:
        address = server.stdout.readline().strip()
        write(fs.GcsFileSystem(anonymous=True, scheme="http", endpoint_override=address), files)
        with FaultProxy(f"http://{address}", tls_file=tls_file) as proxy:
            yield Place("gs://models/llama", [proxy], {"STORAGE_EMULATOR_HOST": proxy.url})
        server.stdin.close()


@contextmanager
def azure(files: dict[str, bytes], tls_file: Path | None = None) -> Iterator[Place]:
    program = azurite_program()
    if program is None:
        pytest.skip("no Azurite here: make azurite")
    with azurite(program) as url, FaultProxy(url, tls_file=tls_file) as proxy:
        places = {f"{kind}_storage_authority": url.removeprefix("http://") for kind in ("blob", "dfs")}
        schemes = {"blob_storage_scheme": "http", "dfs_storage_scheme": "http"}
        filesystem = fs.AzureFileSystem(ACCOUNT, account_key=KEY, **places, **schemes)
        filesystem.create_dir("models")
        write(filesystem, files)
        yield Place("az://models/llama", [proxy], azure_environment(proxy.url, key=KEY))


@contextmanager
def web(files: dict[str, bytes], tls_file: Path | None = None) -> Iterator[Place]:
    with (
        FileServer({f"llama/{name}": content for name, content in files.items()}) as server,
        FaultProxy(server.url, tls_file=tls_file) as proxy,
    ):
        yield Place(f"{proxy.url}/llama", [proxy])


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[Place]:
    with (
        HubServer() as server,
        FaultProxy(server.url) as front,
        FaultProxy(server.delivery.url) as delivery,
    ):
        server.push("org/llama", files)
        server.private.add("org/llama")
        server.delivery.url = delivery.url
        environment = {"HF_ENDPOINT": front.url, "HF_TOKEN": server.token}
        yield Place("hf://org/llama", [front, delivery], environment, hub=server)


def write(filesystem: fs.FileSystem, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with filesystem.open_output_stream(f"models/llama/{name}") as stream:
            stream.write(content)


def azure_environment(url: str, *, key: str = "") -> dict[str, str]:
    said = {"AccountName": ACCOUNT, "BlobEndpoint": f"{url}/{ACCOUNT}", **({"AccountKey": key} if key else {})}
    return {"AZURE_STORAGE_CONNECTION_STRING": ";".join(f"{name}={value}" for name, value in said.items())}


def all_bytes(checkpoint: Any, files: dict[str, bytes]) -> int:
    """What one load asks for: each tensor once, JSON, and the first bytes of each file, where its header is."""
    heads = sum(min(HEAD_BYTES, len(content)) for name, content in files.items() if name.endswith(".safetensors"))
    jsons = sum(len(content) for name, content in files.items() if name.endswith(".json"))
    return checkpoint.num_bytes + heads + jsons


@pytest.mark.parametrize("store", [google, azure, web, hub], ids=["gs", "az", "https", "hf"])
def test_each_byte_is_sent_once(quartet: RankProcesses, checkpoint: Any, store: Callable[..., Any]) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()}
    num_shards = sum(name.endswith(".safetensors") for name in files)
    with store(files) as place:
        num_read = sum(rank.num_requests for rank in load(quartet, place, checkpoint.folder))
        assert place.bytes_sent == all_bytes(checkpoint, files)
        num_addresses = 0
        if place.hub is not None:
            # Each rank asks the Hub for the address of each large file, once, besides; such answers have no bodies.
            num_addresses = sum(asked.key.endswith(".safetensors") for asked in place.hub.requests)
            assert num_addresses <= (TP + 1) * num_shards
        assert place.num_requests == num_read + len(files) + num_addresses


@pytest.mark.parametrize("store", [google, azure, web], ids=["gs", "az", "https"])
def test_each_byte_is_sent_once_over_tls(
    quartet: RankProcesses, checkpoint: Any, store: Callable[..., Any], tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()}
    certificates = make_certificates(tmp_path)
    with store(files, certificates.server_file) as place:
        place.environment["REQUESTS_CA_BUNDLE"] = str(certificates.ca_file)
        load(quartet, place, checkpoint.folder)
        assert place.bytes_sent == all_bytes(checkpoint, files)


class TokenStore(HostileStore):
    """Gives files to those who have a good token, and takes none of the tokens of before after some requests.

    Attributes:
        issuer: Gives the tokens.
        num_refused: Requests that came with a token that was over.
        bytes_sent: Of files.
    """

    def __init__(self, files: dict[str, bytes], issuer: TokenServer | MachineIdentity) -> None:
        super().__init__(self.answer_with_token)
        self.issuer = issuer
        self.num_refused = self.bytes_sent = self._num_ended = 0
        self._files = files
        self._counting = threading.Lock()

    def answer_with_token(self, asked: Asked) -> bytes:
        number = int(asked.headers["authorization"].rpartition("-")[2])
        with self._counting:
            if asked.number == NUM_REQUESTS_BEFORE_THE_END:
                self._num_ended = self.issuer.num_tokens
            if number <= self._num_ended:
                self.num_refused += 1
                return answer_bytes(401, f"over: {asked.headers}".encode())
        content = self._files.get(unquote(asked.key).rpartition("/")[2])
        if content is None:
            return answer_bytes(404)
        answer = file_bytes(content, asked).replace(b"\r\n", b"\r\nx-goog-generation: 17\r\n", 1)
        with self._counting:
            self.bytes_sent += len(answer.partition(b"\r\n\r\n")[2])
        return answer


@pytest.mark.parametrize("store", ["gs", "az"])
def test_tokens_that_end_in_the_middle_are_renewed(
    quartet: RankProcesses, checkpoint: Any, tmp_path: Path, store: str
) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()}
    with TokenServer() if store == "gs" else MachineIdentity() as issuer, TokenStore(files, issuer) as server:
        if isinstance(issuer, TokenServer):
            issuer.write_account(tmp_path / "account.json")
            account = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "account.json")}
            place = Place("gs://models/llama", environment=account, google=server.url)
        else:
            place = Place("az://models/llama", environment=issuer.environment | azure_environment(server.url))
        load(quartet, place, checkpoint.folder)
        # Each rank renews for itself, once, however many of its requests were under way.
        assert server.num_refused >= 1
        assert TP < issuer.num_tokens <= 2 * TP
        assert server.bytes_sent == all_bytes(checkpoint, files)


def test_addresses_of_the_hub_that_end_in_the_middle_are_asked_for_again(
    quartet: RankProcesses, checkpoint: Any
) -> None:
    files = {path.name: path.read_bytes() for path in checkpoint.folder.iterdir()}
    with hub(files) as place:
        delivery = place.hub.delivery
        answer, refused = delivery.answer, []

        def answer_or_end(asked: Asked) -> bytes | None:
            if asked.number == NUM_REQUESTS_BEFORE_THE_END:
                place.hub.end_addresses()
            answered = answer(asked)
            refused.extend([asked] * (b" 403 " in (answered or b"")[:20]))
            return answered

        delivery.answer = answer_or_end
        load(quartet, place, checkpoint.folder)
        assert refused
        refusals = sum(len(answer(asked).partition(b"\r\n\r\n")[2]) for asked in refused)
        assert place.bytes_sent - refusals == all_bytes(checkpoint, files)
