"""What saves memory, and that it changes nothing but the memory, or rounding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from deq_jax import Anderson, Broyden, Dynamics, Equilibrium, Implicit, Phantom, Standard, solve
from deq_jax.core import cross_entropy
from deq_jax.core.solvers import differentiable
from deq_jax.models import SmallCell, SmallDecoder, SmallEncoder, classifiers
from deq_jax.training import AdamCosine, Batch, initial_state, train_step
from tests.helpers import tiny

X = jnp.asarray(np.random.default_rng(0).uniform(size=(16, 8, 8, 1)), jnp.float32)
Y = jnp.arange(16) % 10


def loss_of(dynamics):
    classifier = Equilibrium(SmallEncoder(8), SmallCell(8), SmallDecoder(10), dynamics)
    variables = classifier.init(jax.random.key(0), X)

    def loss(params):
        return cross_entropy(classifier({**variables, "params": params}, X).logits, Y).mean()

    return loss, variables["params"]


def scratch_bytes(dynamics):
    """Temporary memory of a forward and backward pass, as compiled."""
    loss, params = loss_of(dynamics)
    return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_implicit_gradients_does_not_grow_with_the_steps():
    def scratch(steps):
        return scratch_bytes(Dynamics(Anderson(steps, history_size=5), gradient=Implicit(Anderson(8, history_size=5))))

    assert scratch(64) <= 1.1 * scratch(8)


@pytest.mark.slow
def test_less_is_kept_for_the_backward_pass_and_the_gradient_stays(monkeypatch):
    kept = Dynamics(Broyden(4), gradient=Phantom(6))  # convolutions
    nothing = replace(kept, rematerialize=True)

    def measured(dynamics):
        jax.clear_caches()
        loss, params = loss_of(dynamics)
        return scratch_bytes(dynamics), jax.jit(jax.grad(loss))(params)

    (less, gradient), (least, other) = measured(kept), measured(nothing)
    monkeypatch.setattr(classifiers, "_is_costly", jax.checkpoint_policies.everything_saveable)
    most, expected = measured(kept)
    assert less < 0.6 * most and least < 0.7 * less
    for found in (gradient, other):
        (flat, _), (exact, _) = ravel_pytree(found), ravel_pytree(expected)
        assert jnp.linalg.norm(flat - exact) < 1e-5 * jnp.linalg.norm(exact)


def test_the_gradient_through_broyden_keeps_no_state_for_each_pair(monkeypatch):
    u = jnp.linspace(0, 1, 200).reshape(2, 100)

    def total(u):
        return solve(
            differentiable(Broyden(16, tolerance=0)), lambda params, z, u: jnp.tanh(z + u), (), 0 * u, u
        ).z.sum()

    def measured():
        compiled = jax.jit(lambda u: jax.grad(total)(u)).lower(u).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(u)

    less, gradient = measured()
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)
    most, expected = measured()
    assert less < 0.6 * most
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


@pytest.mark.slow
def test_bfloat16_cells_agree_to_half_precision():
    dynamics = Dynamics(Broyden(4), gradient=Phantom(2))
    values, gradients = zip(
        *(
            jax.jit(jax.value_and_grad(loss))(params)
            for loss, params in map(loss_of, (dynamics, replace(dynamics, compute_dtype=jnp.bfloat16)))
        ),
        strict=True,
    )
    assert values[0] != values[1]
    np.testing.assert_allclose(values[0], values[1], rtol=2e-2)
    full, half = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in gradients)
    assert half.dtype == jnp.float32
    assert full @ half / (jnp.linalg.norm(full) * jnp.linalg.norm(half)) > 0.99


@pytest.mark.slow
def test_accumulated_gradients_are_the_mean_over_the_parts():
    config = tiny.get_config(objective=Standard(), classifier=tiny.classifier(dropout=0.0), optimizer=AdamCosine(1e-3))
    optimizer = config.optimizer.transformation(100)
    data = config.dataset.load()
    state = initial_state(config, optimizer, data)
    batch = Batch(data.train.x[:16], data.train.y[:16], np.arange(16, dtype=np.int32))

    def step(config, batch):
        return jax.jit(lambda state, batch: train_step(config, optimizer, state, batch))(state, batch)

    whole, metrics = step(replace(config, accumulate=2), batch)
    parts = [step(config, Batch(*(leaf[half] for leaf in batch))) for half in (slice(0, 8), slice(8, 16))]
    moments = [part.opt_state[0].mu for part, _ in parts]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *moments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), whole.opt_state[0].mu, mean)
    np.testing.assert_allclose(metrics["loss"], np.mean([m["loss"] for _, m in parts]), rtol=1e-5)
    assert metrics["residual_max"] == max(m["residual_max"] for _, m in parts)
