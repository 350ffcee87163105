"""Optimisers and schedules: each beside a plain optax loop, and a run that is stopped and resumed with each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deq_jax import InputError
from deq_jax.training import AdamCosine, AdamW, Cosine, OneCycle, Piecewise, Sgd, WeightAverage

STEPS = 12
START = {"w": jnp.arange(6.0).reshape(2, 3) / 4 - 0.5, "b": jnp.ones(3)}


def gradient(params, step):
    """Some function of the parameters and the step, of the order of 1."""
    return jax.tree.map(lambda leaf: jnp.sin(3 * leaf + step) + leaf, params)


def walked(transformation):
    """The parameters after each step."""
    params, state, path = START, transformation.init(START), []
    for step in range(STEPS):
        updates, state = transformation.update(gradient(params, step), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, state


def cosine(step, peak, warmup=0, final=0.0):
    if step < warmup:
        return peak * step / warmup
    share = (1 + np.cos(np.pi * min(1, (step - warmup) / (STEPS - warmup)))) / 2
    return peak * (final + (1 - final) * share)


def test_sgd_is_the_rule_of_pytorch():
    """v <- m v + g + d w;  w <- w - r v, with the gradient shortened first."""
    path, _ = walked(Sgd(0.1, momentum=0.8, weight_decay=0.05, clip=1.5).transformation(STEPS))
    params, velocity = jax.tree.map(np.asarray, START), jax.tree.map(np.zeros_like, START)
    for step, found in enumerate(path):
        given = jax.tree.map(np.asarray, gradient(params, step))
        length = np.sqrt(sum((leaf**2).sum() for leaf in given.values()))
        for name in params:
            pull = given[name] * min(1, 1.5 / length) + 0.05 * params[name]
            velocity[name] = 0.8 * velocity[name] + pull
            params[name] = params[name] - cosine(step, 0.1) * velocity[name]
            np.testing.assert_allclose(found[name], params[name], rtol=1e-5, atol=1e-6)


def test_nesterov_looks_ahead():
    path, _ = walked(Sgd(0.1, momentum=0.8, nesterov=True, weight_decay=0.0).transformation(STEPS))
    first = gradient(START, 0)
    np.testing.assert_allclose(path[0]["w"], START["w"] - 0.1 * 1.8 * first["w"], rtol=1e-5)


def test_adamw_is_the_rule_of_its_paper():
    path, _ = walked(AdamW(0.01, weight_decay=0.3, rates=Cosine(final=0.5)).transformation(STEPS))
    params = {name: np.asarray(leaf, np.float64) for name, leaf in START.items()}
    first, second = ({name: np.zeros(leaf.shape) for name, leaf in params.items()} for _ in range(2))
    for step, found in enumerate(path):
        given = gradient({name: jnp.asarray(leaf, jnp.float32) for name, leaf in params.items()}, step)
        for name in params:
            g = np.asarray(given[name], np.float64)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
            pull = mean / (np.sqrt(square) + 1e-8) + 0.3 * params[name]
            params[name] = params[name] - cosine(step, 0.01, final=0.5) * pull
            np.testing.assert_allclose(found[name], params[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Cosine(), lambda step: cosine(step, 2.0)),
        (Cosine(warmup=0.25, final=0.1), lambda step: cosine(step, 2.0, 3, 0.1)),
        (OneCycle(rise=0.25), lambda step: 2.0 * step / 3 if step < 3 else 2.0 * (STEPS - step) / 9),
        (Piecewise((0.5, 0.75), 0.1), lambda step: 2.0 * (1 if step < 6 else 0.1 if step < 9 else 0.01)),
        (Piecewise((), 0.1), lambda step: 2.0),
    ],
)
def test_schedules_have_their_closed_form(schedule, expected):
    rates = [schedule.over(STEPS, 2.0)(step) for step in range(STEPS + 1)]
    np.testing.assert_allclose(rates, [expected(step) for step in range(STEPS + 1)], atol=1e-6)


@pytest.mark.parametrize("schedule", [Cosine(warmup=0.9), OneCycle(), Piecewise()])
@pytest.mark.parametrize("steps", [1, 2])
def test_schedules_of_the_shortest_runs_are_finite(schedule, steps):
    assert all(0 <= float(schedule.over(steps, 1.0)(step)) <= 1 for step in range(steps + 1))


def test_the_average_is_that_of_the_parameters():
    inner = AdamCosine(0.1)
    plain, _ = walked(inner.transformation(STEPS))
    path, state = walked(WeightAverage(inner, decay=0.6).transformation(STEPS))
    average = START
    for step, params in enumerate(plain, 1):
        share = max(0.4, 9 / (step + 9))
        average = jax.tree.map(lambda old, new, share=share: old + share * (new - old), average, params)
    jax.tree.map(np.testing.assert_array_equal, path, plain)  # the steps are those of the optimiser
    jax.tree.map(
        lambda found, kept: np.testing.assert_allclose(found, kept, rtol=1e-5, atol=1e-6), state.average, average
    )


def test_the_average_tells_the_rate_of_its_optimizer():
    assert WeightAverage(Sgd(0.3)).schedule(STEPS)(0) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sgd(0.0), "Sgd: learning_rate must be positive"),
        (lambda: Sgd(momentum=1.0), r"Sgd: momentum must be in \[0, 1\)"),
        (lambda: Sgd(weight_decay=-1.0), "Sgd: weight_decay must be >= 0"),
        (lambda: AdamW(clip=0.0), "AdamW: clip must be positive or None"),
        (lambda: Cosine(warmup=1.0), "Cosine: warmup must be a share"),
        (lambda: Cosine(final=2.0), "Cosine: final must be a share"),
        (lambda: OneCycle(rise=0.0), "OneCycle: rise must be a share"),
        (lambda: Piecewise((50.0,)), "Piecewise: milestones must be shares"),
        (lambda: Piecewise(factor=0.0), "Piecewise: factor must be positive"),
        (lambda: WeightAverage(Sgd(), decay=1.0), r"WeightAverage: decay must be in \[0, 1\)"),
    ],
)
def test_settings_that_are_none(make, message):
    with pytest.raises(InputError, match=message):
        make()
