"""Shared by all tests: eight simulated devices, and double precision on request."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# A command switches the persistent cache on for its whole process, and so for all later tests. JAX was seen to crash
# when it read or wrote executables of eight simulated devices.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
