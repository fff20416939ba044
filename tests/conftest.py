"""Fixtures that every test may use: a clean environment, and a real local S3 server."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from ray_streamer.testing.s3_server import S3Server, S3ServerUnavailableError, start_s3_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

# No test asserts on time, and a first example may wait for a machine that is busy. The same sources get the same examples;
# `--hypothesis-profile random` looks for others.
for profile, derandomize in (("repeatable", True), ("random", False)):
    hypothesis.settings.register_profile(
        profile,
        deadline=None,
        derandomize=derandomize,
        max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "40")),
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("repeatable")

# Read when Ray is imported: without it Ray listens on all addresses and all nodes get the same one.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# Ray asks for tokens from the moment on when a process starts a Ray of its own. Such a process could use none of those that tests share
# if these had no token, or another one.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# Ray ends actors where a machine has little memory left, whoever has the rest.
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112 - Ray's own
# Several processes share few CPUs: threads of torch would mostly wait for each other, and burn a CPU while they do.
os.environ["OMP_NUM_THREADS"] = "1"

OF_THE_MACHINE = re.compile(
    # Settings, credentials and servers.
    r"(RAY_STREAMER|RUNAI_STREAMER|AWS|AZURE|GOOGLE|STORAGE_EMULATOR)_.*|RAY_ADDRESS|HF_ENDPOINT|HF_TOKEN|HUGGING_FACE_HUB_TOKEN|"
    r"(?i:.*_proxy)|"
    # What a terminal is like.
    r"FORCE_COLOR|NO_COLOR|COLUMNS|LINES|TTY_COMPATIBLE|TTY_INTERACTIVE|"
    # What a launcher says of ranks, if the tests run in a job of Slurm, say.
    r"(SLURM|OMPI|PMIX?|MPI|MV2|PALS|HOROVOD|PET|TORCHELASTIC)_.*|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|"
    r"LOCAL_SIZE|CROSS_SIZE|NNODES"
)
"""Variables that no test sees."""

OF_TESTS = {
    "AWS_EC2_METADATA_DISABLED": "true",
    # On a busy machine any answer may be late; tests that count requests would count the second ones too.
    "RAY_STREAMER_HEDGE_PERCENT": "0",
    # A home directory may hold credentials too.
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "TERM": "xterm",
}
"""Variables that every test sees."""

# Now, since what tests share starts before the first of them: Rays, servers, processes of ranks.
for variable in filter(OF_THE_MACHINE.fullmatch, list(os.environ)):
    del os.environ[variable]
os.environ.update(OF_TESTS)

RAY_NODE_IPS = ("127.0.0.2", "127.0.0.3")
# No measure of anything: a busy machine takes long.
HANG_SECONDS = 120.0

# What needs Ray stays together, in as many processes as there are, and shares the Rays that were started there.
RAY_TESTS = {
    # They start Rays of their own in their process.
    "ray, connections": ("cluster/test_connection.py", "cluster/test_gpus.py"),
    "ray, loads": tuple(
        f"api/test_{name}.py" for name in ("bad_input", "kills", "load_sharded", "memory", "meshes", "secrets")
    ),
    "ray, groups": ("cluster/", "api/test_two_nodes.py"),
    "ray, commands and failures": ("cli/", "api/test_failures.py", "api/test_ready_models.py"),
}

WAITING_TESTS = ("tests/storage/test_waits.py", "tests/exchange/test_failures.py", "tests/test_process_limits.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, beside what waits most: where all processes work on Rays, these take long to start."""
    first, second, *others = RAY_TESTS
    groups = [first, second, *WAITING_TESTS, *others]
    items.sort(key=lambda item: groups.index(group) if (group := group_of(item.nodeid)) in groups else len(groups))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file, and those of one group of `RAY_TESTS`, run in one process when several share the work."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def group_of(nodeid: str) -> str:
    """The group of a test, or its file."""
    file_name = nodeid.partition("::")[0]
    name = file_name.removeprefix("tests/")
    return next((group for group, names in RAY_TESTS.items() if name.startswith(names)), file_name)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that one test leaves in the environment reaches another."""
    for name in filter(OF_THE_MACHINE.fullmatch, list(os.environ)):
        monkeypatch.delenv(name)
    for name, value in OF_TESTS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """A run that was started in the background of a shell ignores SIGINT; what is tested here does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def own_ray_folder() -> Iterator[None]:
    """Ray remembers in its folder which cluster was started last; it must not be another process's one."""
    folder = tempfile.mkdtemp(prefix="rs-", dir="/tmp")  # sockets lie in it, whose paths must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_starts_alone() -> Iterator[None]:
    """One Ray starts at a time, whatever process starts it: Ray gives a start up after 30 s, which several at once may take."""
    with open(os.path.join(tempfile.gettempdir(), f"ray-starts-{os.getuid()}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def starts_alone() -> Callable[[], AbstractContextManager[None]]:
    """See `ray_starts_alone`."""
    return ray_starts_alone


class SharedRay:
    """A Ray on this machine that starts with the first test which needs it, and anew after one that ended a node of it.

    A start takes as much of the CPUs as many tests do. Nobody finds it by itself.

    Args:
        nodes: Arguments of Ray's `Cluster.add_node` for each.
    """

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self._nodes = nodes
        self._cluster: Any = None

    def address(self) -> str:
        if self._cluster is not None and any(node.dead_processes() for node in self._cluster.list_all_nodes()):
            self.close()
        if self._cluster is None:
            self._start_patiently()
        return self._cluster.address

    def _start_patiently(self) -> None:
        """Starts it again where Ray gave up, as it does on a busy machine."""
        for is_last in (False, False, True):
            try:
                self._start()
            except Exception as error:  # Ray has no class for it
                self.close()
                if is_last or "timed out" not in str(error):
                    raise
            else:
                return

    def _start(self) -> None:
        from ray._common.utils import reset_ray_address
        from ray.cluster_utils import Cluster

        with ray_starts_alone():
            self._cluster = Cluster()
            for node in self._nodes:
                # It reads the logs of all actors over and over.
                self._cluster.add_node(**node, include_log_monitor=False)
            reset_ray_address()

    def close(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.shutdown()


@pytest.fixture(scope="session")
def ray_of_one_node(own_ray_folder: None) -> Iterator[SharedRay]:
    """With room for four ranks."""
    with closing(SharedRay({"num_cpus": 4, "node_ip_address": "127.0.0.1", "include_dashboard": False})) as shared:
        yield shared


@pytest.fixture(scope="session")
def ray_of_two_nodes(own_ray_folder: None) -> Iterator[SharedRay]:
    """With 2 CPUs on each."""
    head = {"num_cpus": 2, "node_ip_address": RAY_NODE_IPS[0], "include_dashboard": False}
    other = {"num_cpus": 2, "node_ip_address": RAY_NODE_IPS[1], "labels": {"zone": "far"}}
    with closing(SharedRay(head, other)) as shared:
        yield shared


@pytest.fixture(scope="module")
def local_ray(ray_of_one_node: SharedRay, wait_until: Callable[..., None]) -> Iterator[None]:
    """This process is connected to a Ray with room for four ranks, all of it free."""
    from ray_streamer.cluster.connection import connect

    connection = connect(ray_of_one_node.address())
    try:
        _wait_until_free(wait_until)
        yield
    finally:
        connection.close()


@pytest.fixture(scope="module")
def ray_cluster(ray_of_two_nodes: SharedRay, wait_until: Callable[..., None]) -> Iterator[str]:
    """This process is connected to the first of two nodes with 2 CPUs each; the cluster's address."""
    import ray

    address = ray_of_two_nodes.address()
    ray.init(address=address, _node_ip_address=RAY_NODE_IPS[0], log_to_driver=False, logging_level="ERROR")
    try:
        _wait_until_free(wait_until)
        yield address
    finally:
        ray.shutdown()


@pytest.fixture
def idle_cluster(ray_cluster: str, wait_until: Callable[..., None]) -> Iterator[str]:
    """The same cluster, all of it free again after the test: where Ray puts the next group depends on it."""
    yield ray_cluster
    _wait_until_free(wait_until)


def _wait_until_free(wait_until: Callable[..., None]) -> None:
    """Waits for actors and groups of other tests to be gone."""
    import ray

    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], Any]], None]:
    """Poll a condition until it holds."""

    def wait(holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not holds():
            assert time.monotonic() < deadline, f"not so within {HANG_SECONDS} s"
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def assert_gone(wait_until: Callable[..., None]) -> Callable[[Iterable[int]], None]:
    """Every one of these processes ends."""

    def check(pids: Iterable[int]) -> None:
        alive = list(pids)
        assert alive
        wait_until(lambda: not any(_is_running(pid) for pid in alive))

    return check


def _is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port of 127.0.0.1 where nobody listens, nor can before the end of the test."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(scope="session")
def save_tiny_llama() -> Callable[..., Path]:
    """Saves a tiny Llama to a folder, as transformers does, and gives the folder; its vocabulary does not divide."""

    def save(folder: Path, *, eos_token_id: int | None) -> Path:
        import torch
        import transformers

        torch.manual_seed(1)
        config = transformers.LlamaConfig(
            vocab_size=131,
            hidden_size=64,
            intermediate_size=97,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=eos_token_id,
        )
        model = transformers.LlamaForCausalLM(config)
        # Far from ties: rounding on two ranks changes no token.
        model.lm_head.weight.data.mul_(50)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server for the whole session; tests share it, so each uses a bucket or prefix of its own."""
    try:
        server = start_s3_server(tls=True)
    except S3ServerUnavailableError as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def s3_credentials(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The same server, with its endpoint and credentials in the environment of this process and its children."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server
