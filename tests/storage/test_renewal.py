"""A token that is still good is used while its renewal fails; without one, everybody hears why."""

from __future__ import annotations

import threading

import pytest

from ray_streamer.errors import CredentialsError
from ray_streamer.storage import renewal
from ray_streamer.storage.renewal import Freshness, Renewal


class Tokens:
    """A token that a test lets grow old."""

    def __init__(self):
        self.freshness, self.error, self.num_renewals = Freshness.ENDED, None, 0
        self.renewal = Renewal(lambda: self.freshness, self.renew)

    def renew(self):
        self.num_renewals += 1
        if self.error:
            raise self.error
        self.freshness = Freshness.FRESH


@pytest.fixture
def tokens():
    tokens = Tokens()
    tokens.renewal.ensure()
    return tokens


def test_a_fresh_token_is_used_as_it_is(tokens):
    tokens.renewal.ensure()
    assert tokens.num_renewals == 1


def test_a_token_that_ends_soon_is_renewed(tokens):
    tokens.freshness = Freshness.ENDS_SOON
    tokens.renewal.ensure()
    assert (tokens.num_renewals, tokens.freshness) == (2, Freshness.FRESH)


def test_a_good_token_is_used_on_if_its_renewal_fails_and_renewed_later(tokens, monkeypatch, caplog):
    tokens.freshness, tokens.error = Freshness.ENDS_SOON, CredentialsError("none in 60 s")
    for _ in range(5):
        tokens.renewal.ensure()
    assert tokens.num_renewals == 2
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["none in 60 s"]
    monkeypatch.setattr(renewal, "_PAUSE_SECONDS", 0.0)
    tokens.renewal._next_early_at = 0.0
    for _ in range(2):
        tokens.renewal.ensure()
    assert tokens.num_renewals == 4
    assert len(caplog.records) == 1
    tokens.error = None
    tokens.renewal.ensure()
    assert tokens.freshness is Freshness.FRESH


def test_a_token_that_ended_or_was_refused_is_not_used(tokens):
    tokens.freshness, tokens.error = Freshness.ENDS_SOON, CredentialsError("none in 60 s")
    tokens.renewal.ensure()
    tokens.freshness = Freshness.ENDED
    for _ in range(2):
        with pytest.raises(CredentialsError, match="none in 60 s"):
            tokens.renewal.ensure()


def test_nobody_waits_for_the_renewal_of_a_good_token(tokens):
    is_renewing, is_over, renew = threading.Event(), threading.Event(), tokens.renew

    def renew_slowly():
        is_renewing.set()
        is_over.wait(30)
        renew()

    tokens.renewal._renew = renew_slowly
    tokens.freshness = Freshness.ENDS_SOON
    other = threading.Thread(target=tokens.renewal.ensure)
    other.start()
    is_renewing.wait(30)
    tokens.renewal.ensure()
    assert tokens.num_renewals == 1
    is_over.set()
    other.join(30)
    assert tokens.num_renewals == 2
