"""Finding a Ray: the connected one, a named one, none at all."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray._private.node import Node

from ray_streamer.cluster.connection import RayConnection, connect, has_same_variables
from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.cluster.jobs import find_dashboard
from ray_streamer.errors import ClusterError, SettingsError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

# The actors cannot import a test module; they get its classes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def dead_address(dead_port: int) -> str:
    """An address where nobody listens."""
    return f"127.0.0.1:{dead_port}"


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose name leaves room for the names of Ray's Unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def test_an_address_that_does_not_answer_is_refused_at_once(dead_address: str) -> None:
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at address='{dead_address}'.*host:port"):
        connect(dead_address)
    assert not ray.is_initialized()


def test_an_address_of_something_else_is_given_up_within_the_connect_timeout() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ClusterError, match=r"not as the control service of a Ray .* connect_timeout_seconds=0\.5"):
            connect(f"127.0.0.1:{silent.getsockname()[1]}", connect_timeout_seconds=0.5)
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", [None, "auto"])
def test_the_environments_address_is_named_when_it_does_not_answer(
    address: str | None, dead_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", dead_address)
    with pytest.raises(ClusterError, match=f"RAY_ADDRESS='{dead_address}'"):
        connect(address)


@pytest.mark.parametrize("address", ["nonsense", "host:port", "ray://127.0.0.1:10001"])
def test_an_address_that_cannot_be_used_is_a_cluster_error(address: str) -> None:
    with pytest.raises(ClusterError, match=r"address=|Ray Client") as caught:
        connect(address)
    assert "invalid literal" not in str(caught.value)


def test_a_user_in_an_address_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("me:hunter2@127.0.0.1:6379", "http://me:hunter2@127.0.0.1:8265"):
        for ask in (connect, lambda address: find_dashboard(address, 1.0)):
            with pytest.raises(SettingsError, match="has a user in it") as caught:
                ask(address)
            assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("RAY_ADDRESS", "me:hunter2@127.0.0.1:6379")
    with pytest.raises(SettingsError, match="has a user in it"):
        connect()


def test_an_address_of_another_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: Any = 6379
    for ask in (connect, lambda address: find_dashboard(address, 1.0)):
        with pytest.raises(SettingsError, match="address is the text host:port, auto or local, got int"):
            ask(wrong)
    with pytest.raises(SettingsError, match="is the text host:port, auto or local, got 'bogus://x'"):
        connect("bogus://x")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(SettingsError, match=r"RAY_ADDRESS of a Ray cluster is the text host:port.*`ray job submit`"):
        connect()


def test_ray_client_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ClusterError, match="ray job submit"):
        connect()


def test_a_local_ray_is_started_when_the_remembered_cluster_is_gone(
    dead_address: str, short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    (short_folder / "ray").mkdir()
    (short_folder / "ray" / "ray_current_cluster").write_text(dead_address)
    connection = connect(num_local_cpus=5)
    try:
        assert connection.is_opened_here
        assert ray.cluster_resources()["CPU"] == 5
        second = connect("auto")
        assert (second.address, second.is_opened_here) == (connection.address, False)
        second.close()
        assert ray.is_initialized()
        assert connect(connection.address).address == connect("local").address == connection.address
        for other in ("127.0.0.1:1", "nonsense"):
            with pytest.raises(
                ClusterError, match=rf"at {connection.address}, and address='{other}' is another one; .*shutdown"
            ):
                connect(other)
    finally:
        connection.close()
    assert not ray.is_initialized()
    connection.close()


def test_a_cluster_is_joined_by_its_address(ray_of_one_node: Any, caplog: pytest.LogCaptureFixture) -> None:
    address = ray_of_one_node.address()
    connection = connect(address)
    assert (connection.address, connection.is_opened_here) == (address, True)
    assert len(ray.nodes()) == 1
    assert connect(f"localhost:{address.rpartition(':')[2]}").address == address
    assert not caplog.records
    assert connect("10.0.0.9:6379").address == address, "another address of this cluster, for all that is known"
    assert f"'10.0.0.9:6379' is not used: this process is connected to the Ray at {address}" in caplog.text
    connection.close()
    assert not ray.is_initialized()


def test_a_process_that_was_forked_from_a_connected_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray itself does not promise to survive a fork, nor does the end of a test.
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with warnings.catch_warnings():
        # Python 3.12 and later warn of threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        try:
            connect()
        except ClusterError as error:
            os._exit(0 if "forked from" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


def test_threads_that_connect_at_once_share_one_ray(monkeypatch: pytest.MonkeyPatch, short_folder: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    barrier = threading.Barrier(4)

    def meet_and_connect() -> RayConnection:
        barrier.wait()
        return connect("local", num_local_cpus=3)

    with ThreadPoolExecutor(4) as pool:
        connections = [future.result() for future in [pool.submit(meet_and_connect) for _ in range(4)]]
    try:
        assert len({connection.address for connection in connections}) == 1
        assert sum(connection.is_opened_here for connection in connections) == 1
        # The threads have ended; Ray lives on.
        assert ray.cluster_resources()["CPU"] == 3
        assert ray.get(ray.put("alive")) == "alive"
    finally:
        for connection in connections:
            connection.close()
    assert not ray.is_initialized()
    assert not [thread for thread in threading.enumerate() if thread.name == "ray_streamer-ray"]


def children() -> set[int]:
    """Processes that this one has started, and that are still there."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.fixture
def no_other_ray(monkeypatch: pytest.MonkeyPatch, short_folder: Path) -> Path:
    """The folder in which a Ray of this process would be started, since there is no other one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    return short_folder


def test_a_ray_whose_folder_cannot_be_made_is_told_with_the_folder(no_other_ray: Path) -> None:
    (no_other_ray / "ray").write_text("a file")
    with pytest.raises(
        ClusterError, match=rf"cannot start a local Ray: .*{no_other_ray}/ray, must be .* set RAY_TMPDIR"
    ):
        connect()
    assert not ray.is_initialized()


@pytest.mark.parametrize("is_main_thread", [True, False])
def test_a_ray_that_does_not_come_up_leaves_no_process(
    no_other_ray: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None], *, is_main_thread: bool
) -> None:
    """As on a busy machine, or where the disk is full: its first processes run."""
    started: set[int] = set()
    before = children()

    def give_up(_: Any) -> None:
        started.update(children() - before)
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - Ray's own

    def connect_in_a_thread() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(connect, "local").result()

    monkeypatch.setattr(Node, "start_ray_processes", give_up)
    with pytest.raises(ClusterError, match=r"timed out during startup\. Its folder, .* busy machine .* try again"):
        connect("local") if is_main_thread else connect_in_a_thread()
    assert started
    wait_until(lambda: not started & children())
    assert not ray.is_initialized()


def test_a_rank_that_rays_memory_monitor_ends_is_told_with_what_to_do(
    no_other_ray: Path, monkeypatch: pytest.MonkeyPatch, starts_alone: Callable[[], AbstractContextManager[None]]
) -> None:
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "50")
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.0001")
    with starts_alone():
        connection = connect("local", num_local_cpus=1)
    try:
        # In the start of the rank or in the call: the monitor may look in between.
        with (
            pytest.raises(ClusterError, match=r"running low on memory\. .* smaller memory_limit") as caught,
            WorkerGroup(Sleeper, 1, timeouts=Timeouts.of(Settings(startup_timeout_seconds=300))) as group,
        ):
            group.call("sleep")
    finally:
        connection.close()
    assert "is ray_streamer installed" not in str(caught.value).lower()
    # Ray lists the command lines of the node's processes.
    assert "COMMAND" not in str(caught.value)


class Sleeper:
    """What a rank holds that does nothing."""

    def __init__(self, rank: int) -> None:
        """Any rank."""

    def sleep(self) -> None:
        threading.Event().wait(600)


TASK_THAT_PRINTS = """
import ray
from ray_streamer.cluster.connection import connect

@ray.remote
def talk():
    import logging, sys
    print("a print of a task")
    print("an error of a task", file=sys.stderr)
    logging.getLogger("mine").warning("a log of a task")

connection = connect("local", num_local_cpus=1)
ray.get(talk.remote())
connection.close()
"""


def test_what_tasks_print_reaches_the_driver(short_folder: Path) -> None:
    environment = os.environ | {"RAY_TMPDIR": str(short_folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", TASK_THAT_PRINTS], capture_output=True, text=True, check=True, env=environment
    )
    said = ended.stdout + ended.stderr
    assert {"a print of a task", "an error of a task", "a log of a task"} <= {
        line.rpartition(")")[2].replace("\x1b[0m", "").strip() for line in said.splitlines()
    }


@pytest.fixture(scope="module")
def guarded_ray(
    tmp_path_factory: pytest.TempPathFactory, starts_alone: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray that asks for a token: its address, and the environment of the user whom it lets in."""
    with ray_of_another_process(tmp_path_factory.mktemp("home"), {}, starts_alone) as found:
        yield found


@pytest.fixture(scope="module")
def open_ray(
    tmp_path_factory: pytest.TempPathFactory, starts_alone: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray that asks for none: its address, and the environment of a user who has one."""
    disabled = {"RAY_AUTH_MODE": "disabled"}
    with ray_of_another_process(tmp_path_factory.mktemp("home"), disabled, starts_alone) as found:
        yield found


@contextmanager
def ray_of_another_process(
    home: Path, variables: dict[str, str], starts_alone: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray that was started with these variables: its address, and the environment without them of a user with a token."""
    folder = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment |= {"HOME": str(home), "RAY_TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        for attempt in range(3):
            with started_head(folder / f"log-{attempt}", environment | variables, starts_alone) as address:
                if address is not None:
                    yield address, environment
                    return
        pytest.fail((folder / "log-2").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started_head(
    log: Path, environment: dict[str, str], starts_alone: Callable[[], AbstractContextManager[None]]
) -> Iterator[str | None]:
    """The address of a Ray for the length of the block; None when it gave up, as Ray does on a machine with much other work."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["start", "--head", f"--port={port}", "--num-cpus=1", "--block"]
    # What this needs not: each of them is a process that takes seconds of CPU to start.
    command += ["--include-dashboard=false", "--include-log-monitor=false", "--no-monitor"]
    with log.open("w") as output, starts_alone():
        head = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *command],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while head.poll() is None and "runtime started" not in log.read_text():
            time.sleep(0.1)
    try:
        yield f"127.0.0.1:{port}" if head.poll() is None else None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(30)


CONNECT_AND_SAY = """
import sys, ray
from ray_streamer.cluster.connection import connect
from ray_streamer.errors import ClusterError
try:
    connect(sys.argv[1])
    print("connected,", len(ray.nodes()), "node")
except ClusterError as error:
    print(error)
"""


def connect_elsewhere(address: str, environment: dict[str, str]) -> str:
    """What a process with this environment says when it connects."""
    ended = subprocess.run(
        [sys.executable, "-c", CONNECT_AND_SAY, address], env=environment, capture_output=True, text=True, check=True
    )
    return ended.stdout


@pytest.mark.parametrize("mode", [{}, {"RAY_AUTH_MODE": "token"}], ids=["unset", "token"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "auto"])
def test_a_ray_with_a_token_is_joined_by_its_own_user(
    guarded_ray: tuple[str, dict[str, str]], host: str, mode: dict[str, str]
) -> None:
    address, environment = guarded_ray
    named = host if host == "auto" else f"{host}:{address.rpartition(':')[2]}"
    assert connect_elsewhere(named, environment | mode) == "connected, 1 node\n"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"RAY_AUTH_MODE": "disabled"}, id="disabled"),
        pytest.param({"HOME": "/nonexistent"}, id="no-token"),
        pytest.param({"HOME": "/nonexistent", "RAY_AUTH_MODE": "token"}, id="token-mode-without-one"),
        pytest.param({"RAY_AUTH_TOKEN": "f" * 32, "RAY_AUTH_MODE": "token"}, id="wrong"),
        pytest.param({"RAY_AUTH_TOKEN": "f" * 32}, id="wrong-unset"),
    ],
)
def test_a_ray_with_another_token_is_refused_with_the_way_in(
    guarded_ray: tuple[str, dict[str, str]], changes: dict[str, str]
) -> None:
    address, environment = guarded_ray
    said = connect_elsewhere(address, environment | changes)
    assert "lets nobody in without its token" in said
    assert "Set RAY_AUTH_MODE=token" in said
    assert "~/.ray/auth_token" in said


START_AN_ACTOR = """
import sys
from ray_streamer.cluster.connection import connect
from ray_streamer.cluster.group import WorkerGroup
from ray_streamer.errors import ClusterError
from ray_streamer.exchange.liveness import Timeouts
from ray_streamer.settings import Settings
connection = connect(sys.argv[1])
try:
    with WorkerGroup(int, 1, timeouts=Timeouts.of(Settings())):
        print("started")
except ClusterError as error:
    print(error)
connection.close()
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [({}, "started"), ({"RAY_AUTH_MODE": "token"}, "Connect from a new process with RAY_AUTH_MODE=disabled")],
    ids=["unset", "token"],
)
def test_a_token_is_not_used_where_nobody_asks_for_it(
    open_ray: tuple[str, dict[str, str]], variables: dict[str, str], said: str
) -> None:
    """Whoever sends one asks for one, and the Ray's calls to its drivers have none."""
    _, environment = open_ray
    ended = subprocess.run(
        [sys.executable, "-c", START_AN_ACTOR, "auto"],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said in ended.stdout


def test_a_group_whose_ray_was_shut_down_says_so_and_starts_no_other(
    monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    connection = connect("local", num_local_cpus=1)
    group = WorkerGroup(int, 1, timeouts=Timeouts.of(Settings(startup_timeout_seconds=60)))
    connection.close()
    with pytest.raises(ClusterError, match="Ray was shut down"):
        group.call("anything")
    assert not ray.is_initialized()
    group.shutdown()


def test_variables_are_the_same_until_one_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://here")
    assert has_same_variables(None)
    assert has_same_variables({"pip": ["numpy"]})
    assert has_same_variables({"env_vars": {"AWS_ENDPOINT_URL": "http://here"}})
    assert not has_same_variables({"env_vars": {"AWS_ENDPOINT_URL": "http://there"}})
    assert not has_same_variables({"env_vars": {"AWS_PROFILE": "mine"}})
