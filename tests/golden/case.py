"""The golden model and its numbers, for tests to compare with; see README.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import Broyden, Dynamics, Equilibrium, solve
from deq_jax.core import Gradient, cross_entropy
from deq_jax.interop import from_torch
from deq_jax.models import mdeq

GOLDEN = Path(__file__).parent
BRANCHES = ((8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4))  # C, H, W
SOLVER = Broyden(8, batch_joint=True)
ATTACKED = (1, 2, 10)  # the steps of a trajectory stored as one array

# A third less compile time on the CPU.
OPTIONS = {"xla_llvm_disable_expensive_passes": True}
compiled = partial(jax.jit, compiler_options=OPTIONS)


class Case:
    """The golden model in one precision: what it computes, and what it should.

    Attributes:
      golden: the golden numbers, by key; see README.md.
      noise: their relative rounding in float32.
      errors: of every comparison so far, by key: its relative error, and the rounding it was judged by.
    """

    def __init__(self, dtype: str):
        self.dtype = dtype
        self.golden = {key: array for path in GOLDEN.glob("tiny_*.npz") for key, array in np.load(path).items()}
        self.noise = json.loads((GOLDEN / "tiny_noise.json").read_text())
        modules = mdeq(10, (8, 16, 32, 64), (4, 8, 16, 32), final_channels=64, expansion=2, dropout=0.0)
        self.classifier = Equilibrium(*modules, Dynamics(SOLVER))
        self.x = self.image(self.golden["x_uint8"].astype(np.float32) / np.float32(255))
        self.y = jnp.asarray(self.golden["y"])
        named = {name[7:]: array for name, array in self.golden.items() if name.startswith("params/")}
        self.parameter_names = [name for name in named if "running" not in name]
        shapes = jax.eval_shape(self.classifier.init, jax.random.key(0), self.x)
        self.variables = jax.tree.map(self.array, from_torch(named, shapes))
        self.params = self.variables["params"]["cell"]
        self.gradients: dict[Gradient, Callable[..., Any]] = {}
        self.errors: dict[str, dict[str, float]] = {}

    def compiled(self, function):
        """`function` that is called often. In double precision it is optimised: otherwise it would run for long."""
        return jax.jit(
            function, compiler_options=OPTIONS | {"xla_backend_optimization_level": int(self.dtype == "float64")}
        )

    def array(self, values):
        return jnp.asarray(values, self.dtype)

    def image(self, values):
        return self.array(values).transpose(0, 2, 3, 1)

    def state(self, key, index=...):
        flat = self.golden[key][index]
        ends = np.cumsum([np.prod(shape) for shape in BRANCHES])[:-1]
        parts = np.split(flat, ends, axis=-1)
        return tuple(
            self.array(np.moveaxis(part.reshape(*part.shape[:-1], *shape), -3, -1))
            for part, shape in zip(parts, BRANCHES, strict=True)
        )

    def close(self, key, value, expected=None, floor=None):
        """Relative l2 error at most 1e-6 in float64, within a few times the recorded rounding in float32.

        The rounding is that recorded for `key`, or for the key `floor`.
        """
        value = np.asarray(value, np.float64)
        expected = np.asarray(self.golden[key] if expected is None else expected, np.float64)
        assert value.shape == expected.shape, key
        error, rounding = np.linalg.norm(value - expected) / np.linalg.norm(expected), self.noise[floor or key]
        self.errors[key] = {"error": float(error), "rounding": rounding}
        tolerance = 1e-6 if self.dtype == "float64" else 2e-6 + 5 * rounding
        assert error <= tolerance, f"{key}: relative error {error:.1e} > {tolerance:.1e} in {self.dtype}"

    def state_close(self, key, z, floor=None):
        """Compares sampled entries, and norms per branch, of a state with leaves [..., B, H, W, C]."""
        parts = [np.moveaxis(np.asarray(leaf), -1, -3) for leaf in z]
        parts = [part.reshape(*part.shape[:-3], -1) for part in parts]
        self.close(f"{key}_sub", np.concatenate(parts, axis=-1)[..., self.golden["sub_idx"]], floor=floor)
        self.close(f"{key}_norm", np.stack([np.linalg.norm(part, axis=-1) for part in parts], axis=-1), floor=floor)

    def image_close(self, key, x, expected=None):
        self.close(key, np.moveaxis(np.asarray(x), -1, -3), expected)

    def attacked(self, key, step):
        """The recorded images of an attack after this step, or None."""
        if f"{key}_{step}" in self.golden:
            return self.image(self.golden[f"{key}_{step}"])
        if key not in self.golden or step not in ATTACKED:
            return None
        return self.image(self.golden[key][ATTACKED.index(step)])

    @cached_property
    def encode(self):
        return compiled(partial(self.classifier.encode, self.variables))

    @cached_property
    def decode(self):
        return compiled(partial(self.classifier.decode, self.variables))

    @cached_property
    def cell(self):
        return compiled(self.classifier.apply_cell)

    @cached_property
    def solve(self):
        """``x -> Solution`` of 8 Broyden steps."""
        return self.compiled(partial(self.run, SOLVER))

    def run(self, solver, x):
        u = self.classifier.encode(self.variables, x)
        start = jax.tree.map(jnp.zeros_like, u.features)
        return solve(solver, self.classifier.apply_cell, self.params, start, u)

    @cached_property
    def solution(self):
        return self.solve(self.x)

    def gradient(self, estimator):
        """``(x, z) -> gradient of the mean cross-entropy with respect to x, (loss, logits)``."""
        if estimator not in self.gradients:

            def loss(x, z):
                u = self.classifier.encode(self.variables, x)
                state = estimator(self.classifier.apply_cell, self.params, u, z)
                logits = self.classifier.decode(self.variables, state)
                mean = jnp.mean(cross_entropy(logits, self.y))
                return mean, (mean, logits)

            self.gradients[estimator] = self.compiled(jax.grad(loss, has_aux=True))
        return self.gradients[estimator]

    def gradient_close(self, key, estimator, z):
        gradient, (loss, logits) = self.gradient(estimator)(self.x, z)
        self.close(f"{key}/logits", logits)
        self.close(f"{key}/loss", loss)
        self.image_close(f"{key}/grad_x", gradient)
