"""Messages come out as they went in, and what is no message is refused by type."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_streamer import errors
from ray_streamer.errors import ObjectMissingError, RankFailedError, RayStreamerError, StartupTimeoutError
from ray_streamer.exchange.messages import (
    MAX_INLINE_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_NUMBERS,
    MAX_REASON_CHARACTERS,
    PROTOCOL_VERSION,
    Failure,
    Hello,
    MessageKind,
    Pulse,
    ValueHead,
    decode_failure,
    decode_hello,
    decode_numbers,
    decode_pulse,
    decode_value,
    encode_failure,
    encode_hello,
    encode_numbers,
    encode_pulse,
    encode_value,
)

SMALLEST_SOCKET_BUFFER = 4608
"""What Linux makes of SO_SNDBUF=1."""


@given(st.integers(0, 1 << 15), st.integers(1, 1 << 15))
def test_hello(local_rank, more):
    hello = Hello(local_rank=local_rank, num_local_ranks=local_rank + more)
    assert decode_hello(encode_hello(hello)) == hello


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        bytes([MessageKind.DONE]),
        *(
            bytes([MessageKind.HELLO]) + payload
            for payload in (
                b"",
                b"{",
                b"[]",
                b"{}",
                b'{"local_rank": 1}',
                b"\xff",
                b"null",
                b"[" * 100_000,
                b'{"version": 2, "local_rank": 0, "num_local_ranks": 2}',
                b'{"version": 3, "local_rank": 2, "num_local_ranks": 2}',
                b'{"version": 3, "local_rank": -1, "num_local_ranks": 2}',
                b'{"version": 3, "local_rank": true, "num_local_ranks": 2}',
                b'{"version": 3, "local_rank": 1.0, "num_local_ranks": 2}',
                b'{"version": 3, "local_rank": "1", "num_local_ranks": 2}',
                b'{"version": 3, "local_rank": 0, "num_local_ranks": 99999999999}',
                b'{"version": 3, "local_rank": 0, "num_local_ranks": 2, "more": 1}',
            )
        ),
    ],
    ids=lambda message: repr(message[:60]),
)
def test_a_greeting_that_is_none(message):
    with pytest.raises(ValueError, match=r"said|greeting|version|rank"):
        decode_hello(message)


@given(st.binary(max_size=200))
def test_a_greeting_of_any_bytes_is_read_or_refused(payload):
    try:
        hello = decode_hello(bytes([MessageKind.HELLO]) + payload)
    except ValueError:
        return
    assert hello.version == PROTOCOL_VERSION
    assert json.loads(payload)["local_rank"] == hello.local_rank


@given(st.integers(0, (1 << 32) - 1), st.binary(max_size=MAX_INLINE_BYTES), st.integers(0, 1 << 60))
def test_a_value_that_fits_into_its_message(step, value, memory_bytes):
    head = ValueHead(step, len(value), memory_bytes)
    message = encode_value(head, value)
    assert decode_value(message[1:]) == (head, value)
    assert len(message) < SMALLEST_SOCKET_BUFFER


@given(st.builds(Pulse, st.integers(0, 1 << 60), st.booleans(), st.text(max_size=60)))
def test_pulse(pulse):
    message = encode_pulse(pulse)
    assert decode_pulse(message[1:])[:2] == pulse[:2]
    if len(pulse.phase.encode()) <= 200:
        assert decode_pulse(message[1:]) == pulse


@given(
    st.builds(
        Failure,
        rank=st.integers(-1, 1 << 20),
        node=st.text(max_size=100),
        kind=st.text(max_size=100),
        text=st.text(max_size=300),
        absent=st.lists(st.integers(0, 1 << 20), max_size=8).map(tuple),
    )
)
def test_failure(failure):
    assert decode_failure(encode_failure(failure)[1:]) == failure


def test_a_long_reason_is_cut():
    message = encode_failure(Failure(rank=0, node="n", kind="", text="\N{PILE OF POO}" * 100_000))
    assert len(message) <= MAX_MESSAGE_BYTES
    assert len(decode_failure(message[1:]).text) == MAX_REASON_CHARACTERS


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, RayStreamerError) and kind is not RankFailedError
    ],
)
def test_an_error_of_this_package_keeps_its_class_for_the_others(kind):
    told = Failure.of(kind("what happened"), rank=3, node="n").as_error()
    assert (told.rank, told.node) == (3, "n")
    assert type(told.cause) is kind
    assert str(told) == f"rank 3 on node n failed: {kind.__name__}: what happened"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LookupError("no place"), "LookupError: no place"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (RankFailedError(7, "other", "its process ended"), "rank 7 on node other failed: its process ended"),
    ],
)
def test_an_error_of_anybody_else_keeps_its_words(error, text):
    assert text in str(Failure.of(error, rank=3, node="n").as_error())


def test_a_failure_that_was_told_is_told_on_under_its_own_name():
    first = RankFailedError(7, "other", ObjectMissingError("gone"))
    told = Failure.of(first, rank=3, node="n").as_error()
    assert (told.rank, told.node, type(told.cause)) == (7, "other", ObjectMissingError)


def test_whom_a_rank_gave_up_waiting_for_is_told_on_and_the_rank_itself_did_not_fail():
    told = Failure.of(StartupTimeoutError("did not come", [5, 6]), rank=3, node="n").as_error()
    assert (type(told), told.ranks, str(told)) == (StartupTimeoutError, (5, 6), "did not come")


def test_a_start_that_took_too_long_on_the_rank_itself_is_its_own_failure():
    told = Failure.of(StartupTimeoutError("torch was not imported"), rank=3, node="n").as_error()
    assert (told.rank, type(told.cause)) == (3, StartupTimeoutError)


@pytest.mark.parametrize("name", ["RankFailedError", "annotations", "__builtins__", "nothing", ""])
def test_a_class_that_is_no_error_of_this_package_is_only_a_word(name):
    told = Failure(rank=1, node="n", kind=name, text="text").as_error()
    assert isinstance(told.cause, str)


@given(
    st.sampled_from([MessageKind.ANNOUNCE, MessageKind.RELEASE]),
    st.lists(st.integers(0, (1 << 32) - 1), max_size=MAX_NUMBERS),
)
def test_numbers(kind, numbers):
    message = encode_numbers(kind, numbers)
    assert message[0] == kind
    assert decode_numbers(message[1:]) == numbers
    assert len(message) < SMALLEST_SOCKET_BUFFER
