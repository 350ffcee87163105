"""Every gradient estimator and solver, with few steps, and a small cell to run them on."""

import jax.numpy as jnp

from deq_jax import Anderson, Broyden, FixedPoint, Implicit, Neumann, Phantom, Unrolled, deq
from deq_jax.core import AtState, PhantomUpTo

GRADIENTS = [Phantom(3), Neumann(3), Implicit(Broyden(4)), Unrolled(3), AtState(Phantom(1)), PhantomUpTo(4, 2, 0.5)]
SOLVERS = [FixedPoint(4), Anderson(4), Broyden(4), None]
SOLVER = Broyden(3, tolerance=0)
P, U = 0.3 * jnp.eye(3), jnp.linspace(-1, 1, 6).reshape(2, 3)


def cell(params, z, u):
    return jnp.tanh(z @ params + u)


def layer(params=P, u=U, z0=None, f=cell, solver=SOLVER, gradient=GRADIENTS[0], **options):
    """The state of the layer."""
    return deq(f, params, u, jnp.zeros_like(U) if z0 is None else z0, solver=solver, gradient=gradient, **options)[0]
