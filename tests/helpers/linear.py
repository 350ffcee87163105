"""Softmax regression on digits: a classifier that is trained and attacked in seconds."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from deq_jax import Explicit
from deq_jax.core import cross_entropy
from deq_jax.data import Digits

DATA = Digits().load()


class Linear(nn.Module):
    """`levels` > 0 rounds the images first, so that all gradients vanish."""

    levels: int = 0

    @nn.compact
    def __call__(self, x, train=False, keys=None, axis_name=None):
        if self.levels > 0:
            x = jnp.round(self.levels * x) / self.levels
        return nn.Dense(10)(x.reshape(len(x), -1))


@functools.cache
def trained():
    """Variables for any number of levels."""
    classifier, optimizer = Explicit(Linear()), optax.adam(0.02)
    variables = classifier.init(jax.random.key(0), jnp.asarray(DATA.train.x[:2]))

    def loss(variables):
        return jnp.mean(cross_entropy(classifier(variables, DATA.train.x).logits, DATA.train.y))

    def step(carry, _):
        variables, state = carry
        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return (optax.apply_updates(variables, updates), state), None

    variables = jax.jit(lambda start: jax.lax.scan(step, start, length=60))((variables, optimizer.init(variables)))[0][
        0
    ]
    return jax.device_get(variables)
