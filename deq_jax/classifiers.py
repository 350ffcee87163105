"""Classifiers: networks with `init` and `__call__` as pure functions of their variables.

`Equilibrium` is the one place where modules and dynamics meet; `Explicit` is any ordinary network.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_jax.gradients import Phantom, deq
from deq_jax.readouts import FinalState, RandomIntermediateState
from deq_jax.regularizers import JacobianRegularization
from deq_jax.types import (
    Array,
    Cell,
    Gradient,
    Injection,
    InputError,
    Keys,
    Prediction,
    PyTree,
    Readout,
    Solver,
    Variables,
)


@dataclass(frozen=True)
class Dynamics:
    """How a DEQ is run: which trajectory, which state of it, differentiated how.

    Attributes:
      solver: which trajectory; None for none.
      readout: which state of it.
      gradient: how that state is differentiated.
      compute_dtype: in which the cell computes, e.g. ``jax.numpy.bfloat16``; parameters, states and the solver's
        arithmetic keep theirs. None: as the parameters.
      rematerialize: compute the inside of the cell again in the backward pass, where every application would
        otherwise keep it: about a third more computation for a fraction of the memory.
    """

    solver: Solver | None
    readout: Readout = FinalState()
    gradient: Gradient = Phantom(steps=5, damping=0.5)
    compute_dtype: Any = None
    rematerialize: bool = False


@dataclass(frozen=True)
class Equilibrium:
    """A DEQ classifier: logits = decoder(z*), z* = cell(z*; encoder(x)), from z_0 = 0.

    Attributes:
      encoder: ``(x, train, keys, axis_name) -> Injection``.
      cell: ``(z, injection) -> z``.
      decoder: ``(z, train, axis_name) -> logits``.
      dynamics: how the equilibrium is found, read out and differentiated.
      jacobian: penalises the cell's Jacobian at the state that is read out, in training mode; None for no penalty.
    """

    encoder: nn.Module
    cell: nn.Module
    decoder: nn.Module
    dynamics: Dynamics
    jacobian: JacobianRegularization | None = None

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
        jacobian = self.jacobian if train else None
        dynamics = self.dynamics if jacobian is None else _jittered(self.dynamics, jacobian)
        params = variables["params"]["cell"]
        z, solution = deq(
            self.apply_cell,
            params,
            u,
            _start(u),
            solver=dynamics.solver,
            readout=dynamics.readout,
            gradient=dynamics.gradient,
            keys=keys,
        )
        logits, decoder_stats = _apply(self.decoder, _part(variables, "decoder"), train, z, train, axis_name)
        batch_stats = variables["batch_stats"] | {"encoder": encoder_stats, "decoder": decoder_stats}
        evaluations = solution.evaluations + dynamics.gradient.applications
        prediction = Prediction(logits, batch_stats, solution._replace(evaluations=evaluations))
        if jacobian is None:
            return prediction
        if keys is None:
            raise InputError("Equilibrium: a penalty in training mode needs keys, for its probes")
        solved = dynamics.readout(solution, keys)
        return prediction._replace(penalty=jacobian.penalty(self.apply_cell, params, u, solved, keys))

    def apply_cell(self, params: PyTree, z: PyTree, u: Injection) -> PyTree:
        """f(z; u), as a pure function of the cell's parameters."""

        def f(params, z, u):
            return self.cell.apply({"params": params}, z, u)

        dynamics = self.dynamics
        if dynamics.compute_dtype is not None:
            f = _computed_in(dynamics.compute_dtype, f)
        if dynamics.rematerialize:
            f = jax.checkpoint(f, prevent_cse=False)  # prevented by the loops in which it is differentiated
        return f(params, z, u)

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


def _jittered(dynamics: Dynamics, jacobian: JacobianRegularization) -> Dynamics:
    """The dynamics of a penalised training pass; see `JacobianRegularization`."""
    solver: Any = dynamics.solver
    if solver is None or not isinstance(dynamics.readout, FinalState):
        return dynamics
    first = max(1, solver.steps - jacobian.fewer)
    longer = replace(solver, steps=solver.steps + jacobian.more)
    return replace(dynamics, solver=longer, readout=RandomIntermediateState(first=first))


def _computed_in(dtype: Any, f: Cell) -> Cell:
    """The cell f computing in another dtype; the new state has the dtype of the old one."""

    def cast(params: PyTree, z: PyTree, u: PyTree) -> PyTree:
        lower = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, z, u))
        return jax.tree.map(lambda new, old: new.astype(old.dtype), f(*lower), z)

    return cast


def _part(variables: Variables, name: str) -> Variables:
    """The variables of the encoder, cell or decoder."""
    return {collection: parts[name] for collection, parts in variables.items()}


def _apply(module: nn.Module, variables: Variables, train: bool, *args: Any) -> tuple[Array, PyTree]:
    """The module's output and its batch statistics, updated in training."""
    output, updated = module.apply(variables, *args, mutable=["batch_stats"] if train else [])
    return output, updated.get("batch_stats", variables["batch_stats"])
