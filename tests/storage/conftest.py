"""Assertions of the shared suite are explained as those of tests are."""

import pytest

pytest.register_assert_rewrite("ray_streamer.testing.storage_suite")
