"""Shared by all tests: eight simulated devices, programs that compile fast, and double precision on request."""

import gc
import os
from itertools import count
from pathlib import Path

from tests.helpers.compiling import FAST

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FAST}"
os.environ["JAX_PLATFORMS"] = "cpu"
# A command switches the persistent cache on for its whole process, and so for all later tests. JAX was seen to crash
# when it read or wrote executables of eight simulated devices; benchmarks/faults.py takes the risk.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get("TESTS_COMPILATION_CACHE", "")

import jax
import pytest

MAPS = Path("/proc/self/maps")
TESTS = count()


def pytest_collection_finish():
    """Collects garbage less often: tracing makes millions of objects, and searching them took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def x64():
    """Double precision for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Forgets compiled programs before there are too many: each has memory maps of its own, and Linux allows 65,530.

    Beyond that a compilation crashes the process. Counting that many takes some 60 ms, so one test of ten counts.
    """
    yield
    if next(TESTS) % 10 == 0 and MAPS.exists() and len(MAPS.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
