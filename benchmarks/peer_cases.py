"""The networks that benchmarks/peers.py measures, with random weights, in JAX and in PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bare import PHANTOM, STEPS
from benchmarks.steps import images
from deq_jax import Broyden, Dynamics, Equilibrium, Phantom
from deq_jax.models import Variables, mdeq_large, mdeq_small

Run = Callable[[], Any]

MODELS = {"small": mdeq_small, "LARGE": mdeq_large}

BATCHES = {"small": 16, "LARGE": 8, "plain": 64}


class Work(NamedTuple):
    """What a row measures: an operation, its bare computation, and its peers by name."""

    ours: Run
    limit: Run
    peers: dict[str, Run]


class Case:
    """An MDEQ without dropout, its variables, random images and labels.

    Attributes:
      modules: encoder, cell and decoder.
      model: the classifier made of them.
      variables: its variables.
      x: images [B, 32, 32, 3].
      labels: [B].
    """

    def __init__(self, size: str) -> None:
        dynamics = Dynamics(Broyden(STEPS, tolerance=0), gradient=Phantom(PHANTOM - 1, damping=0.5))
        self.modules = MODELS[size](10, dropout=0.0)
        self.model = Equilibrium(*self.modules, dynamics)
        x, self.labels = images(BATCHES[size])
        self.x = jnp.asarray(x)
        self.variables: Variables = drawn(jax.eval_shape(self.model.init, 0, self.x))
        self.params = self.variables["params"]["cell"]

    def injection(self) -> tuple[Any, Any]:
        """The injection u of the images, and the state 0."""
        u = jax.jit(self.model.encode)(self.variables, self.x)
        return u, jax.tree.map(jnp.zeros_like, u.features)

    def torch(self) -> Any:
        """The same network in PyTorch, its images and labels; None without PyTorch."""
        if not installed("torch", "torchdeq"):
            return None
        import torch  # noqa: PLC0415 (optional)

        from benchmarks import torch_mdeq  # noqa: PLC0415

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        network = torch_mdeq.TorchMdeq.of(self.variables, self.model.cell)
        return torch_mdeq, network, torch_mdeq.images(self.x), torch.tensor(self.labels)


def drawn(shapes: Any) -> Any:
    """Random variables of these shapes, which take no time to compile."""
    rng, constants = np.random.default_rng(0), {"g": 1, "scale": 1, "var": 1, "bias": 0, "mean": 0}

    def leaf(path: Any, like: Any) -> jax.Array:
        name = path[-1].key
        if name in constants:
            return jnp.full(like.shape, constants[name], like.dtype)
        return jnp.asarray(rng.normal(size=like.shape) / np.sqrt(np.prod(like.shape[:-1])), like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def installed(*packages: str) -> bool:
    """Whether all these packages are installed."""
    return all(find_spec(package) is not None for package in packages)
