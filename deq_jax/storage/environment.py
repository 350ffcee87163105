"""The environment of a process: numbers depend on it, though no config names it."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax.core.errors import require

# A run that continued under another value of these would be another run.
DECISIVE = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")

SETTINGS = (*DECISIVE, "jax_default_prng_impl")

FLAGS = ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")

PACKAGES = ("deq_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def environment() -> dict[str, dict[str, Any]]:
    """The surroundings of this process, as JSON data.

    Returns:
      ``settings`` of JAX (x64, precision of matrix products, random numbers), and the default float that follows from
      them; ``flags`` of XLA and CUDA, None where unset; ``platform`` and kind of the devices; ``versions`` of this
      package and of those that compute, None where one is not installed.

    Examples:
      >>> from deq_jax.storage import environment
      >>> sorted(environment())
      ['flags', 'platform', 'settings', 'versions']
    """
    device = jax.devices()[0]
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    return {
        "settings": settings | {"default_float": jnp.result_type(float).name},
        "flags": {name: os.environ.get(name) for name in FLAGS},
        "platform": {"platform": device.platform, "device_kind": device.device_kind},
        "versions": {name: _version(name) for name in PACKAGES},
    }


def decisive_settings() -> dict[str, Any]:
    """The settings of this process that a run must keep, and share with all its processes.

    Examples:
      >>> from deq_jax.storage import decisive_settings
      >>> "jax_enable_x64" in decisive_settings()
      True
    """
    settings = environment()["settings"]
    return {name: settings[name] for name in DECISIVE}


def resumed_environments(records: list[dict[str, Any]], step: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The environments of a run that continues at `step` in this process.

    Args:
      records: records of the run so far, each an `environment` and its first ``step`` (from 0).
      step: first step to be taken; later records are dropped.

    Returns:
      The records with this process's environment, if it is another one; and what differs from the last one.

    Raises:
      InputError: one of the settings differs that a run must keep.
    """
    kept, now = [record for record in records if record["step"] < step], environment()
    if not kept:
        return [{"step": step, **now}], []
    found = _differences(kept[-1], now)
    for name in DECISIVE:
        advice = f"set {name.upper()} as before, or choose another --workdir"
        require(name not in found, f"the workdir holds a run under another setting of JAX: {found.get(name)}; {advice}")
    return kept + [{"step": step, **now}] * bool(found), list(found.values())


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Differences of two environments, by name; entries that only one of them has do not count."""
    pairs = {
        name: (old[part][name], value)
        for part, values in new.items()
        for name, value in values.items()
        if name in old.get(part, {})
    }
    return {name: f"{name} was {was}, now {now}" for name, (was, now) in pairs.items() if was != now}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
