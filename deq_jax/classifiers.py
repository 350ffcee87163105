"""Classifiers: networks with `init` and `__call__` as pure functions of their variables.

`Equilibrium` is the one place where modules and dynamics meet; `Explicit` is any ordinary network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_jax.gradients import Phantom, deq
from deq_jax.readouts import FinalState
from deq_jax.types import Array, Gradient, Injection, Keys, Prediction, PyTree, Readout, Solver, Variables


@dataclass(frozen=True)
class Dynamics:
    """How a DEQ is run: which trajectory, which state of it, differentiated how."""

    solver: Solver | None
    readout: Readout = FinalState()
    gradient: Gradient = Phantom(steps=5, damping=0.5)


@dataclass(frozen=True)
class Equilibrium:
    """A DEQ classifier: logits = decoder(z*), z* = cell(z*; encoder(x)), from z_0 = 0.

    Attributes:
      encoder: ``(x, train, keys, axis_name) -> Injection``.
      cell: ``(z, injection) -> z``.
      decoder: ``(z, train, axis_name) -> logits``.
      dynamics: how the equilibrium is found, read out and differentiated.
    """

    encoder: nn.Module
    cell: nn.Module
    decoder: nn.Module
    dynamics: Dynamics

    def init(self, key: Array, x: Array) -> Variables:
        """Variables ``{"params", "batch_stats"}``, each with the entries encoder, cell and decoder.

        Args:
          key: PRNG key.
          x: images [B, H, W, C]; only their shape and dtype matter.
        """
        keys = jax.random.split(key, 3)
        u, encoder = self.encoder.init_with_output(keys[0], x)
        z, cell = self.cell.init_with_output(keys[1], _start(u), u)
        decoder = self.decoder.init(keys[2], z)
        parts = {"encoder": encoder, "cell": cell, "decoder": decoder}
        return {
            collection: {name: variables.get(collection, {}) for name, variables in parts.items()}
            for collection in ("params", "batch_stats")
        }

    def __call__(
        self,
        variables: Variables,
        x: Array,
        *,
        train: bool = False,
        keys: Keys | None = None,
        axis_name: str | None = None,
    ) -> Prediction:
        """Classifies images.

        Args:
          variables: as `init` makes them.
          x: images [B, H, W, C] in [0, 1].
          train: normalise by the batch's statistics, update the running ones, draw dropout masks.
          keys: randomness for dropout and random readouts; None: deterministic.
          axis_name: mapped axis over whose devices the batch is spread (for batch statistics).
        """
        u, encoder_stats = self._encode(variables, x, train, keys, axis_name)
        dynamics = self.dynamics
        z, solution = deq(
            self.apply_cell,
            variables["params"]["cell"],
            u,
            _start(u),
            solver=dynamics.solver,
            readout=dynamics.readout,
            gradient=dynamics.gradient,
            keys=keys,
        )
        logits, decoder_stats = _apply(self.decoder, _part(variables, "decoder"), train, z, train, axis_name)
        batch_stats = variables["batch_stats"] | {"encoder": encoder_stats, "decoder": decoder_stats}
        return Prediction(logits, batch_stats, solution)

    def apply_cell(self, params: PyTree, z: PyTree, u: Injection) -> PyTree:
        """f(z; u), as a pure function of the cell's parameters."""
        return self.cell.apply({"params": params}, z, u)

    def encode(self, variables: Variables, x: Array) -> Injection:
        """The injection u of images x, in evaluation mode."""
        return self._encode(variables, x, False, None, None)[0]

    def decode(self, variables: Variables, z: PyTree) -> Array:
        """The logits [B, K] of states z, in evaluation mode: no further application of the cell."""
        return _apply(self.decoder, _part(variables, "decoder"), False, z, False, None)[0]

    def _encode(self, variables, x, train, keys, axis_name):
        return _apply(self.encoder, _part(variables, "encoder"), train, x, train, keys, axis_name)


@dataclass(frozen=True)
class Explicit:
    """An ordinary network: a module ``(x, train, keys, axis_name) -> logits``."""

    module: nn.Module

    def init(self, key: Array, x: Array) -> Variables:
        """Variables ``{"params", "batch_stats"}``; see `Equilibrium.init`."""
        return {"batch_stats": {}} | dict(self.module.init(key, x))

    def __call__(
        self,
        variables: Variables,
        x: Array,
        *,
        train: bool = False,
        keys: Keys | None = None,
        axis_name: str | None = None,
    ) -> Prediction:
        """Classifies images; see `Equilibrium.__call__`."""
        logits, batch_stats = _apply(self.module, variables, train, x, train, keys, axis_name)
        return Prediction(logits, batch_stats, None)


def _start(u: Injection) -> PyTree:
    return jax.tree.map(jnp.zeros_like, u.features)


def _part(variables: Variables, name: str) -> Variables:
    """The variables of the encoder, cell or decoder."""
    return {collection: parts[name] for collection, parts in variables.items()}


def _apply(module: nn.Module, variables: Variables, train: bool, *args: Any) -> tuple[Array, PyTree]:
    """The module's output and its batch statistics, updated in training."""
    output, updated = module.apply(variables, *args, mutable=["batch_stats"] if train else [])
    return output, updated.get("batch_stats", variables["batch_stats"])
