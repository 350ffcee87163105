"""Bare computations in JAX, the limits of benchmarks/peers.py: cells and gradients in plain loops.

Each has as many applications of the cell as the operation, and as many gradients of them. No solver, readout or attack
of the package is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks.kernels import cells
from configs.cifar import EPSILON, STEP_SIZE
from deq_jax import EntropyReduced, Equilibrium
from deq_jax.core import Cell, cross_entropy, entropy, kl
from deq_jax.training import TrainState

Logits = Callable[[jax.Array], jax.Array]

STEPS, PHANTOM, BACKWARD = 8, 6, 7
"""Steps of the solver, applications that a phantom gradient differentiates, steps of the implicit gradient's solver."""

ATTACK_STEPS = {"step": 10, "plain": 20}


def bare_phantom(apply: Cell, params: Any, u: Any, z: Any, cotangent: Any) -> Any:
    """The cells of the solver, and the gradient of those that follow."""
    state = cells(apply, STEPS + 1, params, z, u)
    return jax.vjp(lambda params, u: cells(apply, PHANTOM, params, state, u), params, u)[1](cotangent)


def bare_implicit(apply: Cell, params: Any, u: Any, z: Any, cotangent: Any) -> Any:
    """The cells of the solver, the products with the Jacobian, and a gradient."""
    state = cells(apply, STEPS + 1, params, z, u)
    vjp_state = jax.vjp(lambda z: apply(params, z, u), state)[1]

    def step(w: Any, _: None) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, vjp_state(w)[0], cotangent), None

    w = lax.scan(step, cotangent, length=BACKWARD + 1)[0]
    return jax.vjp(lambda params, u: apply(params, state, u), params, u)[1](w)


def bare(model: Equilibrium, variables: Any, x: jax.Array, train: bool = False) -> tuple[jax.Array, Any]:
    """Logits of as many bare cells, and batch statistics: the last cells are differentiated."""
    parts = [
        {"params": variables["params"][name], "batch_stats": variables["batch_stats"][name]}
        for name in ("encoder", "decoder")
    ]
    u, encoder = model.encoder.apply(parts[0], x, train, mutable=["batch_stats"])
    start, params = jax.tree.map(jnp.zeros_like, u.features), variables["params"]["cell"]
    state = cells(model.apply_cell, STEPS + 1, *lax.stop_gradient((params, start, u)))
    state = cells(model.apply_cell, PHANTOM, params, state, u)
    logits, decoder = model.decoder.apply(parts[1], state, train, mutable=["batch_stats"])
    return logits, {"encoder": encoder["batch_stats"], "cell": {}, "decoder": decoder["batch_stats"]}


def bare_attack(loss: Logits, x: jax.Array, steps: int) -> jax.Array:
    """Steps along the sign of the gradient of a summed loss."""

    def step(x_adv: jax.Array, _: None) -> tuple[jax.Array, None]:
        return bare_update(loss, x_adv, x), None

    return lax.scan(step, x + 1e-3, length=steps)[0]


def bare_update(loss: Logits, x_adv: jax.Array, x: jax.Array) -> jax.Array:
    """A step along the sign of the gradient of a summed loss."""
    return projected(x_adv + STEP_SIZE * jnp.sign(jax.grad(lambda x: jnp.sum(loss(x)))(x_adv)), x)


def projected(x_adv: jax.Array, x: jax.Array) -> jax.Array:
    """Onto the ball around x and onto [0, 1]."""
    return jnp.clip(jnp.clip(x_adv, x - EPSILON, x + EPSILON), 0, 1)


def bare_step(
    model: Equilibrium,
    trades: bool,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    x: jax.Array,
    labels: jax.Array,
) -> tuple[Any, Any, Any]:
    """A training step of bare cells."""
    logits: Logits = lambda x: bare(model, state.variables, x)[0]  # noqa: E731
    reference = logits(x) if trades else labels
    against = kl if trades else cross_entropy
    x_adv = bare_attack(lambda x: against(logits(x), reference), x, ATTACK_STEPS["step"])

    def loss(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        if not trades:
            found, statistics = bare(model, variables, x_adv, train=True)
            return jnp.mean(cross_entropy(found, labels)), statistics
        natural, statistics = bare(model, variables, x, train=True)
        found, statistics = bare(model, {"params": params, "batch_stats": statistics}, x_adv, train=True)
        return jnp.mean(cross_entropy(natural, labels)) + 6 * jnp.mean(kl(found, natural)), statistics

    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return value, statistics, (optax.apply_updates(state.params, updates), opt_state)


def bare_entropy_reduction(defence: EntropyReduced, variables: Any, x: jax.Array) -> Any:
    """As many cells, gradients of the entropy, encoders and decoders, one after the other."""
    model, params = defence.base, variables["params"]["cell"]

    def block(carry: tuple[Any, jax.Array], _: None) -> tuple[tuple[Any, jax.Array], None]:
        z, x_hat = carry
        z = cells(model.apply_cell, defence.every, params, z, model.encode(variables, x_hat))

        def total(x: jax.Array) -> jax.Array:
            fz = model.apply_cell(params, z, model.encode(variables, x))
            return jnp.sum(entropy(model.decode(variables, fz)))

        def update(x_hat: jax.Array, _: None) -> tuple[jax.Array, None]:
            return projected(x_hat - defence.step_size * jnp.sign(jax.grad(total)(x_hat)), x), None

        x_hat = lax.scan(update, x_hat, length=defence.steps)[0]
        return (model.apply_cell(params, z, model.encode(variables, x_hat)), x_hat), None

    u = model.encode(variables, x)
    z = model.apply_cell(params, jax.tree.map(jnp.zeros_like, u.features), u)
    last = lax.scan(block, (z, x), length=defence.blocks)[0][0]
    return model.decode(variables, last)
