"""Predictors that classify a raw state: their gradients are those of the classifier's estimator, whatever it is."""

import jax
import numpy as np
import pytest

from deq_jax import Backprop, Broyden, EnsembleState, Implicit, IntermediateState, Keys, Phantom
from deq_jax.core import cross_entropy
from deq_jax.defences import deployed
from deq_jax.surrogates import Direct, ThroughSolver
from tests.helpers import dense

BASE = dense.defence_of(Broyden(4, tolerance=0)).base
X = jax.random.uniform(jax.random.key(0), (3, 4, 4, 1))
Y, KEYS = np.array([0, 1, 2]), Keys.of(0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("readout", [IntermediateState(2), EnsembleState()], ids=["early", "ensemble"])
@pytest.mark.parametrize("then", [Phantom(2), Implicit()], ids=["phantom", "implicit"])
def test_a_model_trained_by_backpropagation_through_the_solver_keeps_that_gradient(readout, then):
    variables = BASE.init(0, X)
    predictor = deployed(BASE.with_dynamics(gradient=Backprop(then)), readout)
    own, through, estimated = (
        surrogate(model, variables).grad(cross_entropy, X, Y, KEYS)[2]
        for surrogate, model in (
            (Direct(), predictor),
            (ThroughSolver(), deployed(BASE.with_dynamics(gradient=then), readout)),
            (Direct(), deployed(BASE.with_dynamics(gradient=then), readout)),
        )
    )
    np.testing.assert_allclose(own, through, rtol=1e-6, atol=1e-9)
    assert not np.allclose(own, estimated, rtol=0.02)
