"""Whatever chain of views a loader makes, and whatever strided memory it copies it into: the moves land the same bytes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_streamer.testing.captured_loaders import assert_same, numbered

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def divisors(number: int) -> list[int]:
    return [factor for factor in range(1, number + 1) if number % factor == 0]


@st.composite
def narrowed(draw: st.DrawFn, shape: tuple[int, ...]):
    dim = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[dim] - 1))
    length = draw(st.integers(1, shape[dim] - start))
    return lambda tensor: tensor.narrow(dim, start, length)


@st.composite
def indexed(draw: st.DrawFn, shape: tuple[int, ...]):
    keys = tuple(
        draw(
            st.one_of(
                st.integers(-size, size - 1),
                st.builds(slice, st.integers(0, size - 1), st.none(), st.integers(1, 3)),
                st.just(slice(None)),
            )
        )
        for size in shape
    )
    if draw(st.booleans()):
        keys = (None, *keys)
    return lambda tensor: tensor[keys]


@st.composite
def permuted(draw: st.DrawFn, shape: tuple[int, ...]):
    order = draw(st.permutations(range(len(shape))))
    return lambda tensor: tensor.permute(order)


@st.composite
def chunked(draw: st.DrawFn, shape: tuple[int, ...]):
    dim = draw(st.integers(0, len(shape) - 1))
    parts = draw(st.integers(1, shape[dim]))
    which = draw(st.integers(0, parts))
    return lambda tensor: tensor.chunk(parts, dim)[which % len(tensor.chunk(parts, dim))]


@st.composite
def split(draw: st.DrawFn, shape: tuple[int, ...]):
    dim = draw(st.integers(0, len(shape) - 1))
    size = draw(st.integers(1, shape[dim]))
    return lambda tensor: tensor.split(size, dim)[-1]


@st.composite
def unflattened(draw: st.DrawFn, shape: tuple[int, ...]):
    dim = draw(st.integers(0, len(shape) - 1))
    factor = draw(st.sampled_from(divisors(shape[dim])))
    return lambda tensor: tensor.unflatten(dim, (factor, -1))


@st.composite
def reshaped(draw: st.DrawFn, shape: tuple[int, ...]):
    total = torch.Size(shape).numel()
    factor = draw(st.sampled_from(divisors(total)))
    return lambda tensor: tensor.reshape(factor, total // factor)


@st.composite
def repeated(draw: st.DrawFn, shape: tuple[int, ...]):
    times = draw(st.integers(1, 3))
    return lambda tensor: tensor.unsqueeze(0).expand(times, *shape)


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...]):
    total = torch.Size(shape).numel()
    rows = draw(st.integers(1, min(total, 4)))
    step = draw(st.integers(1, 4))
    columns = 1 + (total - rows) // step
    return lambda tensor: tensor.contiguous().as_strided((rows, min(columns, 3)), (1, step), 0)


PLAIN = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "clone": lambda tensor: tensor.clone(),
    "detach": lambda tensor: tensor.detach(),
    "data": lambda tensor: tensor.data,
    "flatten": lambda tensor: tensor.flatten(),
    "squeeze": lambda tensor: tensor.squeeze(),
    "mT": lambda tensor: tensor.mT if tensor.dim() > 1 else tensor,
    "unbind": lambda tensor: tensor.unbind(0)[-1],
    "iterate": lambda tensor: next(iter(tensor)),
    "cat": lambda tensor: torch.cat([tensor, tensor], dim=0),
    "stack": lambda tensor: torch.stack([tensor, tensor], dim=-1),
    "same dtype": lambda tensor: tensor.to(tensor.dtype),
}
STEPS = (narrowed, indexed, permuted, chunked, split, unflattened, reshaped, repeated, strided)


@st.composite
def chains(draw: st.DrawFn):
    shape = draw(SHAPES)
    example = torch.zeros(shape)
    steps = []
    for _ in range(draw(st.integers(0, 6))):
        if example.dim() == 0 or example.numel() > 5000:
            break
        step = draw(
            st.one_of(
                st.sampled_from(sorted(PLAIN)).map(PLAIN.__getitem__),
                *(build(tuple(example.shape)) for build in STEPS),
            )
        )
        example = step(example)
        if example.dim() > 6 or not example.numel():
            break
        steps.append(step)
    return shape, steps


def apply(steps, tensor):
    for step in steps:
        tensor = step(tensor)
    return tensor


@st.composite
def targets(draw: st.DrawFn, shape: tuple[int, ...]):
    """A larger tensor with its dimensions in any order in memory, and how to see a target of `shape` in it."""
    if not shape:
        room = torch.full((5,), -7.0)
        return room, lambda tensor: tensor[3]
    room_shape = [size * draw(st.integers(1, 2)) + draw(st.integers(0, 2)) for size in shape]
    order = draw(st.permutations(range(len(shape))))
    room = torch.full([room_shape[dim] for dim in order], -7.0).permute([order.index(dim) for dim in range(len(shape))])
    keys = []
    for size, have in zip(shape, room.shape, strict=True):
        step = 2 if have >= 2 * size - 1 and draw(st.booleans()) else 1
        start = draw(st.integers(0, have - (1 + (size - 1) * step)))
        keys.append(slice(start, start + 1 + (size - 1) * step, step))
    return room, lambda tensor: tensor[tuple(keys)]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_chain_of_views_lands_where_it_was_copied(data):
    shape, steps = data.draw(chains())
    source = numbered(*shape)
    room, part_of = data.draw(targets(tuple(apply(steps, source).shape)))

    def load(weights, params):
        for _, tensor in weights:
            part_of(params["room"]).copy_(apply(steps, tensor))

    captured = assert_same({"w": source}, {"room": room}, load)
    report = captured.report
    # What was joined is made in memory where it cannot be planned, and is read at once when a later step looks at it.
    is_joined = any(step in (PLAIN["cat"], PLAIN["stack"]) for step in steps)
    assert report.planned.names or report.whole.names or (is_joined and report.early.names)


NUMBERS = st.one_of(st.integers(-5, 5), st.booleans(), st.just(1.0), st.builds(np.int64, st.integers(-3, 3)))
ONE_STEP = st.one_of(
    st.builds(lambda *given: lambda tensor: tensor.narrow(*given), NUMBERS, NUMBERS, NUMBERS),
    st.builds(lambda dim: lambda tensor: tensor.narrow(dim=dim, start=1, length=1), NUMBERS),
    st.builds(lambda dim: lambda tensor: tensor.unbind(dim), NUMBERS),
    st.builds(lambda dim: lambda tensor: tensor.unsqueeze(dim), NUMBERS),
    st.builds(lambda index: lambda tensor: tensor[index], NUMBERS),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=3).map(tuple), ONE_STEP, ONE_STEP)
def test_views_are_those_that_torch_makes_and_errors_are_torchs(shape, first, second):
    def geometry(tensor):
        found = []
        try:
            for step in (first, second):
                tensor = step(tensor)
                parts = tensor if isinstance(tensor, tuple) else (tensor,)
                found.append(
                    [(part.shape, part.stride(), part.storage_offset(), part.ndim, part.dim()) for part in parts]
                )
                tensor = parts[0]
        except (TypeError, IndexError, RuntimeError, ValueError) as error:
            # torch repeats the arguments as they were given.
            found.append(f"{type(error).__name__}: {str(error).partition('(')[0]}")
        return found

    plain, lazies = numbered(*shape), []

    def load(weights, _):
        lazies.extend(geometry(tensor) for _, tensor in weights)

    assert_same({"w": plain}, {}, load)
    assert lazies[0] == lazies[1] == geometry(plain)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_several_copies_into_one_target_keep_their_order(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    sources = {f"w{number}": numbered(rows, columns, start=1 + 40 * number) for number in range(3)}
    boxes = []
    for name in sources:
        row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
        step = data.draw(st.integers(1, 2))
        boxes.append((name, slice(row, None, step), slice(column, None)))
    reads_between = data.draw(st.integers(0, 3))

    def load(weights, params):
        for number, (name, tensor) in enumerate(weights):
            _, first, second = boxes[number]
            params["p"][first, second].copy_(tensor[first, second])
            if number == reads_between:
                params["sum"].copy_(params["p"].sum())
            assert name == boxes[number][0]

    assert_same(sources, {"p": torch.zeros(rows, columns), "sum": torch.zeros(())}, load)
