"""Which GPU a rank takes: rules on made-up environments, and what a real Ray assigns on a node that says it has two."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ray_streamer import PlacementOptions, Replicate, load_sharded
from ray_streamer.cluster.gpus import assigned_device, choose_device
from ray_streamer.errors import DeviceError, RankFailedError
from ray_streamer.testing.checkpoints import TensorSpec, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("assigned", "environment", "expected"),
    [
        pytest.param(["3"], {"CUDA_VISIBLE_DEVICES": "3"}, "cuda:0", id="ray-hides-the-others"),
        pytest.param(["3"], {}, "cuda:3", id="ray-hides-nothing"),
        pytest.param(["7"], {"CUDA_VISIBLE_DEVICES": "4, 7"}, "cuda:1", id="the-node-shows-some"),
        pytest.param(["GPU-b"], {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, "cuda:1", id="named-by-uuid"),
        pytest.param(["1"], {"HIP_VISIBLE_DEVICES": "0,1"}, "cuda:1", id="amd"),
        pytest.param(["1"], {"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0,1"}, "cuda:0", id="both"),
        pytest.param(["2", "5"], {"CUDA_VISIBLE_DEVICES": "2,5"}, "cuda:0", id="several-gpus-of-one-rank"),
        pytest.param([], {"CUDA_VISIBLE_DEVICES": "0,1"}, "cuda", id="nothing-assigned"),
    ],
)
def test_the_assigned_gpu_among_the_visible(assigned: list[str], environment: dict[str, str], expected: str) -> None:
    assert choose_device(assigned, environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, r"Ray assigned GPU 'GPU-b', but CUDA_VISIBLE_DEVICES='0,1' hides it"),
        ({}, r"Ray assigned GPU 'GPU-b', which has no number here: set CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_that_cannot_be_found_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        choose_device(["GPU-b"], environment)


@pytest.mark.parametrize(
    ("given", "is_gpu", "expected"),
    [(None, True, 1), (None, False, 0), (0.25, True, 0.25), (0, True, 0), (2, False, 2)],
)
def test_ranks_with_a_gpu_reserve_one_unless_told_otherwise(given: Any, is_gpu: bool, expected: float) -> None:
    options = PlacementOptions(num_gpus_per_rank=given, num_cpus_per_rank=3).for_device(is_gpu=is_gpu)
    assert options == PlacementOptions(num_gpus_per_rank=expected, num_cpus_per_rank=3)


def look() -> tuple[str, str | None, list[str]]:
    """What a process of Ray would take, what it sees, and what Ray says that it has."""
    import ray

    assigned = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return assigned_device("cuda"), os.environ.get("CUDA_VISIBLE_DEVICES"), assigned


@pytest.fixture(scope="module")
def gpu_node(starts_alone: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A node of a real Ray that says that it has two GPUs."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    with starts_alone():
        cluster.add_node(num_cpus=4, num_gpus=2, node_ip_address="127.0.0.2", include_dashboard=False)
    try:
        ray.init(address=cluster.address, _node_ip_address="127.0.0.2", log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.usefixtures("gpu_node")
def test_ray_assigns_a_gpu_and_hides_the_others_or_not() -> None:
    import ray

    task = ray.remote(num_gpus=1)(look)
    hidden = task.remote()
    shown = task.options(runtime_env={"env_vars": {NOSET: "1"}}).remote()
    (device, visible, assigned), (device_of_all, _, assigned_of_all) = ray.get([hidden, shown], timeout=200)
    assert [visible] == assigned
    assert device == "cuda:0"
    assert [device_of_all] == [f"cuda:{number}" for number in assigned_of_all]


@pytest.mark.usefixtures("gpu_node")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_rank_whose_torch_sees_no_gpu_says_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [TensorSpec("a", "F32", (4, 4))], num_files=1, config={})
    with pytest.raises(RankFailedError, match=r"device 'cuda:0': torch .* sees no CUDA device") as caught:
        load_sharded(str(tmp_path), 2, device="cuda", rules={"*": Replicate()})
    assert isinstance(caught.value.cause, DeviceError)
