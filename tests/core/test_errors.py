"""Each role of the layer, played by something else: one line says where, what was expected, and what was given."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from deq_jax import (
    Anderson,
    Broyden,
    Dynamics,
    Explicit,
    FixedPoint,
    Implicit,
    InputError,
    IntermediateState,
    LastState,
    Phantom,
    RandomIntermediateState,
    Standard,
    TrainConfig,
    deq,
    fit,
)
from deq_jax.attacks import PGD, Linf
from deq_jax.core import LowEntropy, Neumann, Unrolled, spectral_radius
from deq_jax.core.errors import described, require_role
from deq_jax.data import Digits
from deq_jax.models import SmallCNN, small_cnn, small_deq
from tests.helpers.ranges import assert_range

U = jnp.ones((2, 3))


def radius(steps):
    return spectral_radius(lambda params, z, u: z / 2 + u, {}, U, U, U, steps=steps)


RANGES = [
    (partial(FixedPoint, 3), "tolerance", [0], [-1e-9]),
    (partial(FixedPoint, 3), "damping", [1e-9, 1], [0, 1.001]),
    (FixedPoint, "steps", [1], [0]),
    (partial(Anderson, 3), "tolerance", [0], [-1e-9]),
    (partial(Anderson, 3), "ridge", [1e-9], [0]),
    (partial(Anderson, 3), "beta", [1e-9, 1], [0, 1.001]),
    (partial(Anderson, 3), "history_size", [2], [1]),
    (partial(Broyden, 3), "tolerance", [0], [-1e-9]),
    (partial(Broyden, 3), "history_size", [1, None], [0]),
    (partial(Neumann, 3), "damping", [1e-9, 1], [0, 1.001]),
    (Neumann, "terms", [0], [-1]),
    (partial(Phantom, 3), "damping", [1e-9, 1], [0, 1.001]),
    (Phantom, "steps", [0], [-1]),
    (Unrolled, "steps", [1], [0]),
    (IntermediateState, "state", [1], [0]),
    (RandomIntermediateState, "first", [1], [0]),
    (LowEntropy, "weight", [0], [-1e-9]),
    (radius, "steps", [2], [1]),
]


@pytest.mark.parametrize(("make", "setting", "allowed", "refused"), RANGES)
def test_the_ends_of_a_range_are_allowed_and_nothing_beyond(make, setting, allowed, refused):
    assert_range(make, setting, allowed, refused)


def cell(params, z, u):
    return 0.5 * z + u


class NoFields(Broyden):
    def init(self, f, z, u):
        return z, f(z, u)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"solver": Anderson}, r"solve: solver: expected a solver, such as Broyden\(8\), got the class Anderson"),
        ({"solver": "anderson"}, "solve: solver: .* got 'anderson'"),
        ({"solver": NoFields(4)}, "NoFields.init: expected a memory with fields z and fz, .* got a tuple of float32"),
        ({"gradient": Implicit}, r"deq: gradient: .* such as Implicit\(\), got the class Implicit"),
        ({"gradient": None}, "deq: gradient: .* got None"),
        ({"readout": LastState}, "deq: readout: .* got the class LastState"),
        ({"keys": 0}, "deq: keys: expected Keys, .* got int32"),
        ({"keys": jax.random.PRNGKey(0)}, "deq: keys: .* got uint32"),
    ],
)
def test_the_layer_names_the_choice_that_is_not_one(choices, message):
    given = {"solver": Broyden(4), "gradient": Implicit(), "readout": RandomIntermediateState()} | choices
    with pytest.raises(InputError, match=message) as error:
        deq(cell, (), U, U, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Dynamics(Implicit()), r"Dynamics: solver: .* such as Broyden\(8\), got an Implicit"),
        (lambda: Dynamics(Broyden), "Dynamics: solver: .* got the class Broyden"),
        (lambda: Dynamics(None, readout=LastState), "Dynamics: readout: .* got the class LastState"),
        (lambda: Dynamics(None, gradient=Implicit), "Dynamics: gradient: .* got the class Implicit"),
        (lambda: Implicit(3), "Implicit: solver: .* got 3"),
        (lambda: small_deq(3, 4, Broyden(8)), "Equilibrium: dynamics: expected Dynamics of a solver, .* got a Broyden"),
        (lambda: Explicit(SmallCNN), "Explicit: module: expected a Flax module, .* got the class SmallCNN"),
        (lambda: fit(small_cnn(3, 4)), "fit: config: expected a TrainConfig, got an Explicit"),
        (lambda: Anderson(2.5), "Anderson: steps must be a positive integer, got 2.5"),
        (lambda: Phantom(True), "Phantom: steps must be an integer >= 0, got True"),
        (lambda: PGD(Linf(0.1), steps="7"), "PGD: steps must be a positive integer, got '7'"),
        (lambda: TrainConfig(small_cnn(3, 4), Standard(), Digits(), epochs=1.5), "TrainConfig: epochs must be a pos"),
    ],
)
def test_choices_are_checked_when_they_are_made(make, found):
    with pytest.raises(InputError, match=found) as error:
        make()
    assert "\n" not in str(error.value)


def test_values_are_described_in_one_line():
    assert described((jnp.zeros((2, 1)), {"a": 1}, None)) == "a tuple of float32 (2, 1), a dict with keys a, None"
    assert described(0.1) == "0.1"
    require_role("here", cell, ("__call__",), "a function")


def test_a_message_is_one_line_whatever_it_names():
    assert str(InputError("expected a radius, got Dense(\n    # attributes\n    features = 3\n)")) == (
        "expected a radius, got Dense( # attributes features = 3 )"
    )
    assert str(pickle.loads(pickle.dumps(InputError("a\nb")))) == "a b"
