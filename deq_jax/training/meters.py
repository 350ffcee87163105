"""Metrics of training steps, gathered from one line of the log to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from deq_jax.core.types import Array

Sums = dict[str, list[float]]
"""``{name: [number of steps that had it, sum]}``; for names that end in ``_max`` the largest value replaces the sum."""

TIMINGS = (
    "seconds_per_step",
    "images_per_second",
    "cell_evaluations_per_second",
    "input_share",
    "compile_seconds",
    "device_memory_gb",
)
"""Names of what a line tells about the machine rather than about the run."""


class Meter:
    """Means over the steps since the last line, and how long these took.

    Metrics stay on their devices until `wait`, so that no step waits for them. They are summed step by step in double
    precision: an interval ends with the same means if its sums are saved in a checkpoint and given to another meter.

    Args:
      batch_size: images of a step.
      sums: sums over the interval's steps so far.
    """

    def __init__(self, batch_size: int, sums: Sums):
        self.sums = sums
        self._batch_size = batch_size
        self._pending: list[dict[str, Array]] = []
        self._seconds, self._input_seconds, self._compile_seconds, self._timed = 0.0, 0.0, 0.0, 0
        self.start()

    def start(self) -> None:
        """Time counts from here on, until `wait`."""
        self._started = time.perf_counter()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Counts the time inside as compilation: a first call, which returns before its step has run."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._compile_seconds += seconds
        self._started += seconds

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Counts the time inside as preparation of images."""
        started = time.perf_counter()
        yield
        self._input_seconds += time.perf_counter() - started

    def add(self, metrics: dict[str, Array]) -> None:
        """Takes the metrics of a step that may still run."""
        self._pending.append(metrics)

    def wait(self) -> list[float]:
        """Waits for the steps since the last call, adds them to the sums, and returns their losses."""
        steps = jax.device_get(self._pending)
        self._seconds += time.perf_counter() - self._started
        self._timed += len(steps)
        self._pending = []
        for step in steps:
            for name, value in step.items():
                count, total = self.sums.get(name, [0, -np.inf if name.endswith("_max") else 0.0])
                total = np.maximum(total, value) if name.endswith("_max") else total + float(value)
                self.sums[name] = [count + 1, float(total)]
        return [float(step["loss"]) for step in steps]

    def line(self) -> dict[str, Any]:
        """Means, largest values and `TIMINGS` of the interval; the next one begins."""
        means = {name: total / (1 if name.endswith("_max") else count) for name, (count, total) in self.sums.items()}
        seconds = self._seconds / max(self._timed, 1)
        timings = {"seconds_per_step": seconds, "images_per_second": self._batch_size / seconds}
        if "cell_evaluations" in means:
            timings["cell_evaluations_per_second"] = means["cell_evaluations"] * timings["images_per_second"]
        timings["input_share"] = self._input_seconds / self._seconds
        if self._compile_seconds:
            timings["compile_seconds"] = self._compile_seconds
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if peak is not None:
            timings["device_memory_gb"] = peak / 2**30
        self.sums = {}
        self._seconds, self._input_seconds, self._compile_seconds, self._timed = 0.0, 0.0, 0.0, 0
        return means | timings
