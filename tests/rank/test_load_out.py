"""Tensors of the caller are filled in place or refused by name before anything is read; callbacks see complete tensors."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from ray_streamer.device.cpu import CpuDevice
from ray_streamer.errors import DeviceError
from ray_streamer.planning.topology import Topology
from ray_streamer.testing.parts import TensorPart

if TYPE_CHECKING:
    from ray_streamer.planning.read_plan import ReadPlan

SPECS = [("rows", "F32", (64, 48)), ("columns", "BF16", (96, 200)), ("empty", "I64", (0, 3)), ("scalar", "F64", ())]


@pytest.fixture
def mixed_plan(ranks, split, tmp_path) -> ReadPlan:
    """Two ranks; rows and columns are split, the rest is replicated; "alone" belongs to rank 0."""
    folder = ranks.write(tmp_path, [[*SPECS, ("alone", "U8", (10,))]])
    slices = {
        "rows": split((64, 48), 2),
        "columns": split((96, 200), 2, dim=1),
        "empty": (TensorPart.whole((0, 3)),) * 2,
        "scalar": (TensorPart.whole(()),) * 2,
        "alone": (TensorPart.whole((10,)), None),
    }
    return ranks.plan(str(folder), slices, topology=Topology.even(2))


@pytest.fixture
def alone_plan(ranks, tmp_path) -> ReadPlan:
    folder = ranks.write(tmp_path, [SPECS])
    slices = {name: (TensorPart.whole(shape),) for name, _, shape in SPECS}
    return ranks.plan(str(folder), slices, topology=Topology.even(1))


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit: random floats may be NaN."""
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("is_staged", [False, True], ids=["direct", "staged"])
def test_given_tensors_are_filled_in_place(ranks, alone_plan, is_staged):
    expected = ranks.prepare(alone_plan).start().tensors()[0]
    out = {"rows": torch.zeros(64, 48), "scalar": torch.zeros((), dtype=torch.float64)}
    addresses = {name: tensor.data_ptr() for name, tensor in out.items()}
    (tensors,) = ranks.prepare(alone_plan, out=out, is_staged=is_staged).start().tensors()
    for name, given in out.items():
        assert tensors[name] is given
        assert given.data_ptr() == addresses[name]
        assert _equal(given, expected[name])
    # The others are made as ever.
    assert tensors.keys() == expected.keys()
    assert _equal(tensors["columns"], expected["columns"])


@pytest.mark.parametrize("is_staged", [False, True], ids=["direct", "staged"])
def test_views_into_a_bigger_buffer_are_filled_and_their_surroundings_left(ranks, alone_plan, is_staged):
    expected = ranks.prepare(alone_plan).start().tensors()[0]
    buffer = torch.full((3, 64, 48), 7.0)
    pool = torch.full((96 * 200 + 10,), 7.0, dtype=torch.bfloat16)
    out = {"rows": buffer[1], "columns": pool[5:-5].view(96, 200)}
    ranks.prepare(alone_plan, out=out, is_staged=is_staged).start().tensors()
    assert _equal(buffer[1], expected["rows"])
    assert _equal(pool[5:-5].view(96, 200), expected["columns"])
    assert (buffer[[0, 2]] == 7).all()
    assert (pool[:5] == 7).all()
    assert (pool[-5:] == 7).all()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_memory_that_may_not_be_written_is_refused(ranks, alone_plan, tmp_path):
    """A write would end the process."""
    (tmp_path / "mapped").write_bytes(bytes(64 * 48 * 4))
    read_only = torch.from_numpy(np.memmap(tmp_path / "mapped", dtype=np.float32, mode="r", shape=(64, 48)))
    with pytest.raises(DeviceError, match=r"out\['rows'\] lies in memory that is read-only"):
        ranks.prepare(alone_plan, out={"rows": read_only})
    own_copy = torch.from_numpy(np.memmap(tmp_path / "mapped", dtype=np.float32, mode="c", shape=(64, 48)))
    (tensors,) = ranks.prepare(alone_plan, out={"rows": own_copy}).start().tensors()
    assert tensors["rows"] is own_copy
    assert not any((tmp_path / "mapped").read_bytes())


def test_parameters_may_be_given(ranks, alone_plan):
    expected = ranks.prepare(alone_plan).start().tensors()[0]
    parameter = torch.nn.Parameter(torch.zeros(64, 48))
    (tensors,) = ranks.prepare(alone_plan, out={"rows": parameter}).start().tensors()
    assert tensors["rows"] is parameter
    assert _equal(parameter.detach(), expected["rows"])


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("rows", torch.zeros(64, 47), r"out\['rows'\] on rank 0 must have shape \(64, 48\).*got \(64, 47\)"),
        ("rows", torch.zeros(64 * 48), r"must have shape \(64, 48\)"),
        ("rows", torch.zeros(64, 48, dtype=torch.float16), r"dtype torch.float32, got .* torch.float16"),
        (
            "rows",
            torch.zeros(48, 64).t(),
            r"out\['rows'\] has strides \(1, 64\) for shape \(64, 48\).* give a contiguous tensor",
        ),
        ("rows", torch.zeros(64, 48, device="meta"), r"out\['rows'\] lies on meta"),
        ("nonsense", torch.zeros(1), r"out names tensors that rank 0 does not hold: nonsense"),
    ],
    ids=["shape", "flat", "dtype", "transposed", "device", "name"],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_read(ranks, alone_plan, name, given, message):
    with ranks.nothing_left(), pytest.raises(DeviceError, match=message):
        ranks.prepare(alone_plan, out={name: given})


def test_a_tensor_that_only_a_neighbour_holds_is_refused(ranks, mixed_plan):
    out = {"alone": torch.zeros(10, dtype=torch.uint8)}
    ranks.prepare(mixed_plan, ranks=[0], out=out).close()
    with pytest.raises(DeviceError, match="out names tensors that rank 1 does not hold: alone"):
        ranks.prepare(mixed_plan, ranks=[1], out=out)


def test_on_complete_sees_each_tensor_once_and_complete(ranks, mixed_plan):
    expected = ranks.prepare(mixed_plan).start().tensors()
    lock, seen = threading.Lock(), []

    def on_complete(items: list[tuple[str, torch.Tensor]]) -> None:
        with lock:
            seen.extend((name, tensor, tensor.clone()) for name, tensor in items)

    tensors = ranks.prepare(mixed_plan, memory_limit=2 * 4096, on_complete=on_complete).start().tensors()
    assert Counter(name for name, _, _ in seen) == Counter(name for held in tensors for name in held)
    for rank, held in enumerate(tensors):
        for name, tensor in held.items():
            (content,) = [copy for _, given, copy in seen if given is tensor]
            assert _equal(content, expected[rank][name])


def test_no_tensor_is_complete_before_its_last_piece(ranks, alone_plan):
    """Copies are held one by one: whatever is reported complete was complete by then, the rest is not reported."""
    expected = ranks.prepare(alone_plan).start().tensors()[0]
    reported: list[str] = []
    out = {"columns": torch.zeros(96, 200, dtype=torch.bfloat16)}

    class WatchedDevice(CpuDevice):
        def deliver(self, source, copies, done) -> None:
            is_complete = _equal(out["columns"], expected["columns"])
            assert ("columns" in reported) == is_complete
            super().deliver(source, copies, done)

    running = ranks.prepare(
        alone_plan,
        concurrency=1,
        devices={0: WatchedDevice()},
        is_staged=True,
        out=out,
        on_complete=lambda items: reported.extend(name for name, _ in items),
    )
    running.start().tensors()
    assert sorted(reported) == sorted(name for name, _, _ in SPECS)
    assert reported[0] == "empty"
