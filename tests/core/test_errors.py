"""Each role of the layer, played by something else: one line says where, what was expected, and what was given."""

import jax
import jax.numpy as jnp
import pytest

from deq_jax import Anderson, Broyden, Implicit, InputError, LastState, RandomIntermediateState, deq
from deq_jax.core.errors import described, require_role

U = jnp.ones((2, 3))


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


def test_values_are_described_in_one_line():
    assert described((jnp.zeros((2, 1)), {"a": 1}, None)) == "a tuple of float32 (2, 1), a dict with keys a, None"
    assert described(0.1) == "0.1"
    require_role("here", cell, ("__call__",), "a function")
