"""How gradients pass through an equilibrium.

A gradient estimator takes the solved state as a constant: ``gradient(cell, params, u, z) -> state``. It returns a state
of the same value, or one a few steps further on. This state carries gradients to the cell's parameters and to the
injection. `Phantom` differentiates a few damped steps, `Unrolled` plain ones;
`Implicit` and `Neumann` are in `adjoints`. Only with `Backprop` does `deq` also differentiate the solver.

Derivatives of any order are right in reverse mode: ``jax.grad(jax.grad(f))``, ``jax.jacrev(jax.jacrev(f))`` for a
Hessian. JAX refuses forward mode (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) through `Implicit` and `Neumann` with a
TypeError about custom_vjp; `Phantom` and `Unrolled` have both modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax.core.cells import apply
from deq_jax.core.compilation import compiled
from deq_jax.core.errors import require, require_count
from deq_jax.core.types import Array, Cell, Gradient, Params, PyTree


@dataclass(frozen=True)
class Phantom:
    """``z <- f(z)``, then `steps` times ``z <- (1 - damping) z + damping f(z)``, all differentiated.

    Attributes:
      steps: K, damped steps after the plain one.
      damping: weight of f(z), in (0, 1].

    References: Geng et al. 2021, eq. 9 (unrolling-based phantom gradient).

    Differs from the reference: a trained model is evaluated with the same number of steps.

    Examples:
      >>> from deq_jax import Broyden, Dynamics, Phantom
      >>> Dynamics(Broyden(8), gradient=Phantom(steps=5, damping=0.5)).gradient.applications
      6
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        require_count("Phantom: steps", self.steps, 0)
        require(0 < self.damping <= 1, f"Phantom: damping must be in (0, 1], got {self.damping!r}")

    @property
    def applications(self) -> int:
        """Number of cell applications in the forward pass; see `Gradient`."""
        return self.steps + 1

    @compiled("self", "cell")
    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        def step(z: PyTree, damping: Array) -> tuple[PyTree, None]:
            return _damped_step(cell, params, u, z, damping), None

        # The plain step is a step of damping 1, so that the cell is compiled once.
        damping = jnp.full(self.steps + 1, self.damping, _dtype(z)).at[0].set(1)
        return lax.scan(step, z, damping)[0]


@dataclass(frozen=True)
class PhantomUpTo:
    """`Phantom` with a traced number of steps and damping: all settings share one compiled program.

    Attributes:
      max_steps: largest number of damped steps; those beyond `steps` are skipped at run time.
      steps: K, a number or a scalar array.
      damping: weight of f(z), a number or a scalar array.

    Examples:
      >>> from deq_jax.core import PhantomUpTo
      >>> PhantomUpTo(max_steps=9, steps=5, damping=0.5).applications
      6
    """

    max_steps: int
    steps: int | Array
    damping: float | Array

    @property
    def applications(self) -> int | Array:
        """Number of cell applications in the forward pass; see `Gradient`."""
        return self.steps + 1

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        return self._take(cell, params, u, z, self.max_steps, self.steps, self.damping)

    @staticmethod
    @compiled("cell", "max_steps")
    def _take(cell: Cell, params: Params, u: PyTree, z: PyTree, max_steps: int, steps: Any, damping: Any) -> PyTree:
        def step(z: PyTree, scheduled: tuple[Array, Array]) -> tuple[PyTree, None]:
            number, damping = scheduled
            advance = partial(_damped_step, cell, params, u)
            return lax.cond(number <= steps, advance, lambda z, damping: z, z, damping), None

        numbers = jnp.arange(max_steps + 1)
        damping = jnp.where(numbers == 0, 1, damping).astype(_dtype(z))
        return lax.scan(step, z, (numbers, damping))[0]


@dataclass(frozen=True)
class AtState:
    """The raw state itself, which carries the gradient that another estimator has at it (`straight_through`).

    For predictors that classify a state without a further application of the cell.

    Attributes:
      gradient: the estimator.

    Examples:
      >>> from deq_jax.core import AtState, Phantom
      >>> AtState(Phantom(5)).applications  # Phantom(5) alone applies the cell 6 times
      0
    """

    gradient: Gradient

    def __post_init__(self) -> None:
        way = "Backprop(AtState(...)) is the raw state with the derivative of the solver's steps"
        require(not isinstance(self.gradient, Backprop), f"AtState: expected another estimator, got Backprop; {way}")

    @property
    def applications(self) -> int:
        """Number of cell applications in the forward pass; see `Gradient`."""
        return 0

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        return straight_through(z, self.gradient(cell, params, u, z))


@dataclass(frozen=True)
class Unrolled:
    """`steps` times ``z <- f(z)``, differentiated; memory grows with the steps.

    With ``solver=None`` it is plain backpropagation through f^steps(z0): shallow pre-training, and a
    second way to the exact gradient in tests.

    Attributes:
      steps: number of applications of the cell, at least 1.

    Examples:
      >>> from deq_jax import Dynamics, Unrolled
      >>> Dynamics(solver=None, gradient=Unrolled(4)).gradient.applications
      4
    """

    steps: int

    def __post_init__(self) -> None:
        require_count("Unrolled: steps", self.steps)

    @property
    def applications(self) -> int:
        """Number of cell applications in the forward pass; see `Gradient`."""
        return self.steps

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        return Phantom(self.steps - 1, damping=1.0)(cell, params, u, z)


@dataclass(frozen=True)
class Backprop:
    """Backpropagation through the solver's own steps, converged or not, and through those that follow it.

    This is the exact derivative of the computed prediction. The other estimators give the derivative at an equilibrium,
    which the solver may not have reached. Memory grows with the solver's steps. `deq` then runs the solver
    differentiably.

    Attributes:
      then: the estimator that gives the value. `Phantom` and `Unrolled` are differentiated as computed,
        `Implicit` and `Neumann` as the one application of the cell that they make, `AtState` as the state itself.

    Examples:
      >>> from deq_jax import Backprop, Broyden, Dynamics
      >>> dynamics = Dynamics(Broyden(8), gradient=Backprop())
    """

    then: Gradient = Phantom()

    def __post_init__(self) -> None:
        require(not isinstance(self.then, Backprop), "Backprop: then must be another estimator, got Backprop")

    @property
    def applications(self) -> int | Array:
        """Number of cell applications in the forward pass; see `Gradient`."""
        return self.then.applications

    def __call__(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        """The estimator `then`: a constant state has no solver steps to differentiate."""
        return self.then(cell, params, u, z)

    def through(self, cell: Cell, params: Params, u: PyTree, z: PyTree) -> PyTree:
        """The value of `then` at a state that carries the derivative of the solver's steps."""
        if isinstance(self.then, AtState):
            return z
        advance = Phantom(0) if has_adjoint(self.then) else self.then
        return advance(cell, params, u, z)


def at_state(gradient: Gradient) -> AtState | Backprop:
    """The estimator for a predictor that classifies the raw state, with the gradient that `gradient` has there."""
    return Backprop(AtState(gradient.then)) if isinstance(gradient, Backprop) else AtState(gradient)


def has_adjoint(gradient: Any) -> bool:
    """Whether an estimator's backward pass has an adjoint state, like `Implicit` and `Neumann`.

    Examples:
      >>> from deq_jax.core import Implicit, Phantom, has_adjoint
      >>> has_adjoint(Implicit()), has_adjoint(Phantom())
      (True, False)
    """
    return hasattr(innermost(gradient), "adjoint")


def innermost(gradient: Any) -> Any:
    """The estimator itself, also where it is wrapped in `AtState`."""
    return innermost(gradient.gradient) if isinstance(gradient, AtState) else gradient


@jax.custom_vjp
def straight_through(value: PyTree, proxy: PyTree) -> PyTree:
    """The value; its cotangent goes to the proxy instead. If nothing is differentiated, the proxy costs nothing.

    Args:
      value: leaves of any shape.
      proxy: leaves of the same shapes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax.core import straight_through
      >>> float(jax.grad(lambda x: straight_through(jnp.sign(x), 3 * x))(0.5))
      3.0
    """
    return value


straight_through.defvjp(
    lambda value, proxy: (straight_through(value, proxy), None), lambda _, cotangent: (None, cotangent)
)


def _damped_step(cell: Cell, params: Params, u: PyTree, z: PyTree, damping: Array) -> PyTree:
    def step(a: Array, b: Array) -> Array:
        weight = damping.astype(a.dtype)
        return (1 - weight) * a + weight * b

    return jax.tree.map(step, z, apply(cell, params, z, u))


def _dtype(tree: PyTree) -> np.dtype:
    return jnp.result_type(*jax.tree.leaves(tree))
