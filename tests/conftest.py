"""For all tests: Ray's workers are forks."""

import os

import pytest
from forked_workers import nursery


@pytest.fixture(scope="session", autouse=True)
def forked_workers():
    if os.environ.get("RAYALIGN_TESTS_FORK", "1") == "0":
        yield
    else:
        with nursery():
            yield
