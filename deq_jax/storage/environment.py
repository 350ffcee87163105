"""The environment of a process: numbers depend on it, though no config names it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax.core.errors import require

# A run that continued under another value of these would be another run.
DECISIVE = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")

SETTINGS = (*DECISIVE, "jax_default_prng_impl")

FLAGS = ("XLA_FLAGS", "NVIDIA_TF32_OVERRIDE")

PACKAGES = ("deq_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

ROOT = Path(__file__).parents[2]  # of the checkout, if the package lies in one

CHANGES = ("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)docs")
"""Lists changed files with git. Documents are left out: benchmarks write their results there, one after another."""


def environment() -> dict[str, dict[str, Any]]:
    """The surroundings of this process, as JSON data.

    Returns:
      ``settings`` of JAX (x64, precision of matrix products, random numbers), and the default float that follows from
      them; ``flags`` of XLA and CUDA, None where unset; ``platform``, kind and number of the devices, over all
      processes; ``versions`` of Python, of this package and of those that compute, None where one is not installed;
      ``code``, the git revision of the package's checkout and whether its files are as committed, None for an
      installed package; ``command``, the arguments of this process.

    Examples:
      >>> from deq_jax.storage import environment
      >>> sorted(environment())
      ['code', 'command', 'flags', 'platform', 'settings', 'versions']
    """
    device = jax.devices()[0]
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    kinds = {"platform": device.platform, "device_kind": device.device_kind, "devices": jax.device_count()}
    return {
        "settings": settings | {"default_float": jnp.result_type(float).name},
        "flags": {name: os.environ.get(name) for name in FLAGS},
        "platform": kinds,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "code": dict(_code()),
        "command": {"arguments": list(sys.argv)},
    }


def decisive_settings() -> dict[str, Any]:
    """The settings of this process that a run must keep, and share with all its processes.

    Examples:
      >>> from deq_jax.storage import decisive_settings
      >>> "jax_enable_x64" in decisive_settings()
      True
    """
    return {name: getattr(jax.config, name) for name in DECISIVE}


def resumed_environments(
    records: list[dict[str, Any]], step: int, images: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The environments of a run that continues at `step` in this process.

    Args:
      records: records of the run so far, each an `environment` and its first ``step`` (from 0).
      step: first step to be taken; later records are dropped.
      images: digest of the images and labels of the run; None if it is not to be recorded.

    Returns:
      The records with this process's environment, if it is another one; and the differences from the last one.

    Raises:
      InputError: one of the settings differs that a run must keep, or its images.
    """
    kept = [record for record in records if record["step"] < step]
    now = environment() | ({} if images is None else {"data": {"images": images}})
    if not kept:
        return [{"step": step, **now}], []
    found = _differences(kept[-1], now)
    for name in DECISIVE:
        advice = f"set {name.upper()} as before, or choose another --workdir"
        require(name not in found, f"the workdir holds a run under another setting of JAX: {found.get(name)}; {advice}")
    advice = "take the images of before, or choose another --workdir"
    require("images" not in found, f"the workdir holds a run on other images: {found.get('images')}; {advice}")
    return kept + [{"step": step, **now}] * bool(found), list(found.values())


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """Differences of two environments, by name, but of the command; entries that only one of them has do not count."""
    pairs = {
        name: (old[part][name], value)
        for part, values in new.items()
        if part != "command"
        for name, value in values.items()
        if name in old.get(part, {})
    }
    return {name: f"{name} was {was}, now {now}" for name, (was, now) in pairs.items() if was != now}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _code() -> dict[str, Any]:
    """The git revision of the checkout, and whether its files are as committed, but for the documents."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
            return None

    top, revision = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if top is None or revision is None or Path(top.strip()) != ROOT.resolve():
        return {"revision": None, "unchanged": None}
    return {"revision": revision.strip(), "unchanged": git(*CHANGES) == ""}
