"""Ranks that fill memory of their own by slices which they alone know: captured loaders, every byte read once, headers too."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from ray_streamer.api.rank import load_rank
from ray_streamer.capture import Capture
from ray_streamer.checkpoint.header_reads import HEAD_BYTES
from ray_streamer.errors import ObjectMissingError, RankFailedError
from ray_streamer.settings import Settings
from ray_streamer.testing.spawned import answers_of

TIMEOUT_SECONDS = 120
SLACK_BYTES = 10_000
"""What lies in the same pages as a tensor that is read for its values, and in gaps between tensors."""
SETTINGS = {"memory_limit": 4 << 20, "block_bytes": 1 << 16, "page_cache": "off", "max_gap_bytes": 0}


def parameters(world_size):
    """What a rank's model has, as an engine makes it."""
    return {
        "embed": torch.full((320 // world_size, 64), 7.0, dtype=torch.bfloat16),
        "qkv": torch.zeros(96 // world_size * 2, 64, dtype=torch.bfloat16),
        "down": torch.zeros(64, 128 // world_size, dtype=torch.bfloat16),
        "conv": torch.zeros(96 // world_size, 64, dtype=torch.bfloat16).t(),
        "experts": torch.zeros(4, 32 // world_size, 64, dtype=torch.bfloat16),
        "scale": torch.zeros(64),
        "mix": torch.zeros(400, 64),
    }


def load(tensors, targets, rank, world_size):
    """A loader with what engines' loaders do: columns, rows, padding, fused and stacked targets, casts, transposed, values."""
    for name, tensor in tensors:
        if name == "embed":
            rows = len(targets["embed"])
            part = tensor[rank * rows : (rank + 1) * rows]
            targets["embed"][: len(part)].copy_(part)
            targets["embed"][len(part) :].zero_()
        elif name in ("q", "k"):
            half = targets["qkv"].chunk(2)[name == "k"]
            half.copy_(tensor.chunk(world_size)[rank])
        elif name == "down":
            targets["down"].copy_(tensor.narrow(1, rank * 128 // world_size, 128 // world_size))
        elif name == "conv":
            targets["conv"].copy_(tensor.t().chunk(world_size, dim=1)[rank])
        elif name.startswith("expert"):
            targets["experts"][int(name[-1])].copy_(tensor.chunk(world_size)[rank])
        elif name == "scale":
            targets["scale"].copy_(tensor)
        else:
            targets["mix"].copy_(torch.cumsum(tensor.float(), 0) * (rank + 1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    tensors = {
        "embed": torch.randn(300, 64),
        "q": torch.randn(96, 64),
        "k": torch.randn(96, 64),
        "down": torch.randn(64, 128),
        "conv": torch.randn(96, 64),
        "scale": torch.randn(64),
        "mix": torch.randn(400, 64),
        **{f"expert{number}": torch.randn(32, 64) for number in range(4)},
    }
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    folder = tmp_path_factory.mktemp("fill")
    save_file(dict(list(tensors.items())[:5]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(list(tensors.items())[5:]), folder / "model-00002-of-00002.safetensors")
    return folder, tensors


class Captured:
    """What the loader wants, as a slice source."""

    def __init__(self, targets, rank, world_size, tensors):
        self.out, self.early_bytes = {}, 0
        self._targets, self._ranks, self._known = targets, (rank, world_size), tensors

    def __call__(self, index, rank):
        raise AssertionError("the others are there to read with")

    def with_values(self, index, rank, values):
        def read(names):
            assert all(name in self._known for name in names), "a tensor that the loader cannot bear"
            return values.read(names)

        recording = Capture(index, read)
        with recording:
            load(recording.tensors(), self._targets, *self._ranks)
        slices, found = recording.slices(self._targets)
        self.out.update(found)
        self.early_bytes = values.bytes_read
        return slices


def fill(uri, rank, world_size, tensors, group):
    """One rank: fills a model, and compares it with the loader itself."""
    mine, theirs = parameters(world_size), parameters(world_size)
    source, statistics = Captured(mine, rank, world_size, tensors), []
    ranks = {"rank": 0, "world_size": 1} if group is None else {"group": group}
    settings = Settings.resolve(**SETTINGS)
    load_rank(uri, slices=source, out=source.out, settings=settings, on_statistics=statistics.append, **ranks)
    load(tensors.items(), theirs, rank, world_size)
    wrong = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    return wrong, statistics[0].bytes_read + source.early_bytes


def fill_in_group(uri, rank, world_size, tensors, meeting):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    return fill(uri, rank, world_size, tensors, dist.group.WORLD)


def on_ranks(uri_of, world_size, tensors, tmp_path):
    ranks = [(uri_of(rank), rank, world_size, tensors, tmp_path / "meeting") for rank in range(world_size)]
    return answers_of(fill_in_group, ranks, timeout_seconds=TIMEOUT_SECONDS)


def all_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors.values())


def test_one_rank_on_its_own(checkpoint):
    folder, tensors = checkpoint
    wrong, num_bytes = fill(str(folder), 0, 1, tensors, None)
    assert not wrong
    assert num_bytes in range(all_bytes(tensors), all_bytes(tensors) + SLACK_BYTES)


def test_two_ranks_read_every_byte_once(checkpoint, tmp_path):
    folder, tensors = checkpoint
    answers = on_ranks(lambda rank: str(folder), 2, tensors, tmp_path)
    assert [wrong for wrong, _ in answers] == [[], []]
    assert sum(num_bytes for _, num_bytes in answers) in range(all_bytes(tensors), all_bytes(tensors) + SLACK_BYTES)


def test_from_s3_headers_are_read_once(checkpoint, s3_credentials, tmp_path):
    folder, tensors = checkpoint
    uri = s3_credentials.upload_folder(folder, "fill", "model")
    sent, requests = s3_credentials.bytes_sent(), s3_credentials.requests()
    answers = on_ranks(lambda rank: uri, 2, tensors, tmp_path)
    assert [wrong for wrong, _ in answers] == [[], []]
    sent = s3_credentials.bytes_sent() - sent
    needed = all_bytes(tensors)
    # The first bytes of each file, with its header, are all of files so small.
    heads = sum(min(HEAD_BYTES, path.stat().st_size) for path in folder.iterdir())
    assert needed <= sent - heads < needed + 10_000, f"{sent} bytes in {s3_credentials.requests() - requests} requests"


def test_a_missing_checkpoint_is_every_ranks_error(checkpoint, tmp_path):
    answers = on_ranks(lambda rank: str(tmp_path / "nothing"), 2, checkpoint[1], tmp_path)
    # Each rank opens it, and whoever is told first of the other's error has that one.
    assert any(isinstance(error, ObjectMissingError) for error in answers)
    for error in answers:
        assert isinstance(error, ObjectMissingError | RankFailedError)
        assert str(tmp_path / "nothing") in str(error)


def test_a_loader_that_fails_on_one_rank_ends_the_others(checkpoint, tmp_path):
    folder, tensors = checkpoint
    broken = {name: tensor for name, tensor in tensors.items() if name != "mix"}
    answers = on_ranks(lambda rank: str(folder), 2, broken, tmp_path)
    assert all(isinstance(error, AssertionError | RankFailedError) for error in answers), answers
    assert any(isinstance(error, AssertionError) for error in answers)
