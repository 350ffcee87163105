"""A DEQ of smooth dense layers: it compiles in no time and has second derivatives."""

import flax.linen as nn
import jax.numpy as jnp

from deq_jax import Broyden, Dynamics, EntropyReduced, Equilibrium, Phantom
from deq_jax.core import Injection

WIDTH = 6


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, keys=None, axis_name=None):
        return Injection(3 * nn.Dense(WIDTH)(x.reshape(len(x), -1)))


class Cell(nn.Module):
    @nn.compact
    def __call__(self, z, u):
        return jnp.tanh(nn.Dense(WIDTH, use_bias=False)(z) + u.features)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z, train=False, axis_name=None):
        return nn.Dense(4)(2 * z)


def defence_of(solver=Broyden(4, tolerance=0), **changes):
    """The DEQ with input entropy reduction."""
    base = Equilibrium(Encoder(), Cell(), Decoder(), Dynamics(solver, gradient=Phantom(2, 0.5)))
    return EntropyReduced(base, **{"steps": 3, "step_size": 0.02, "epsilon": 0.03, **changes})


class Net(nn.Module):
    """A network with layers of Flax's own.

    Attributes:
      norm: none, or batch normalisation by each device's "own" images or by "all".
      collection: of the dropout's keys.
      classes: K.
    """

    norm: str = "none"
    collection: str = "dropout"
    classes: int = 3

    @nn.compact
    def __call__(self, x, train=False, keys=None, axis_name=None):
        y = nn.Dense(8)(x.reshape(len(x), -1))
        if self.norm != "none":
            y = nn.BatchNorm(use_running_average=not train, axis_name=axis_name if self.norm == "all" else None)(y)
        return nn.Dense(self.classes)(nn.Dropout(0.5, deterministic=not train, rng_collection=self.collection)(y))
