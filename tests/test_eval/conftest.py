"""The benchmarks' command line in this process."""

from functools import partial

import pytest


@pytest.fixture
def bench(farspan):
    """`bench("kernels", ...)` -> (exit status, standard output, standard error) of `farspan bench kernels ...`."""
    return partial(farspan, "bench")
