"""Errors cross process borders: every class survives pickling, with what it says and what it knows."""

from __future__ import annotations

import inspect
import pickle

import pytest

from ray_streamer import errors

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("error_class", CLASSES)
def test_every_error_is_ours_documented_and_picklable(error_class):
    assert issubclass(error_class, errors.RayStreamerError)
    assert error_class.__doc__
    assert error_class.__name__ in errors.__doc__
    given = (3, "node-b", errors.ShortReadError("short")) if error_class is errors.RankFailedError else ("what, where",)
    error = error_class(*given)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert str(copy) == str(error)


def test_a_failed_rank_keeps_rank_node_and_cause():
    copy = pickle.loads(pickle.dumps(errors.RankFailedError(3, "node-b", errors.ShortReadError("short"))))
    assert (copy.rank, copy.node, type(copy.cause)) == (3, "node-b", errors.ShortReadError)
    assert str(copy) == "rank 3 on node node-b failed: ShortReadError: short"


@pytest.mark.parametrize(
    ("error_class", "builtin"),
    [
        (errors.SettingsError, ValueError),
        (errors.ObjectMissingError, FileNotFoundError),
        (errors.AccessError, PermissionError),
        (errors.StartupTimeoutError, TimeoutError),
    ],
)
def test_some_errors_are_also_what_python_calls_them(error_class, builtin):
    assert issubclass(error_class, builtin)
