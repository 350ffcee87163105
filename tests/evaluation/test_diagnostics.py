"""What an evaluation and a training run tell about the adjoint equation and the spectral radius."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Broyden, Explicit, Implicit, Neumann, Phantom
from deq_jax.attacks import Linf
from deq_jax.core import AtState, Injection, cross_entropy
from deq_jax.data import Images
from deq_jax.evaluation import EvalConfig, EvaluationRecord, worst_case
from deq_jax.evaluation.measure import adjoint_residuals
from deq_jax.evaluation.rows import Spread, spread
from deq_jax.evaluation.terminal import states_table
from deq_jax.models import SmallCNN
from deq_jax.training import fit
from tests.helpers import dense, tiny


def with_gradient(gradient):
    base = dense.defence_of(Broyden(20)).base
    return replace(base, dynamics=replace(base.dynamics, gradient=gradient))


def problem(classifier):
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 4, 4, 1)), jnp.float32)
    return classifier.init(jax.random.key(0), x), x, jnp.arange(4)


@pytest.mark.slow
def test_adjoint_residuals_are_those_of_dense_jacobians():
    classifier = with_gradient(Neumann(3, 0.5))
    variables, x, y = problem(classifier)
    params = variables["params"]["cell"]
    z, u = classifier(variables, x).solution.z, classifier.encode(variables, x)

    def cell(z, u):
        return classifier.apply_cell(params, z[None], Injection(u[None]))[0]

    jacobians = np.asarray(jax.vmap(jax.jacobian(cell))(z, u.features), np.float64)
    fz = classifier.apply_cell(params, z, u)
    g = np.asarray(jax.grad(lambda z: cross_entropy(classifier.decode(variables, z), y).sum())(fz), np.float64)
    expected = []
    for j, b in zip(jacobians.swapaxes(1, 2), g, strict=True):
        term = w = b
        for _ in range(3):
            term = 0.5 * term + 0.5 * j @ term
            w = w + term
        w = 0.5 * w
        expected.append(np.linalg.norm(b + j @ w - w) / np.linalg.norm(w))
    np.testing.assert_allclose(adjoint_residuals(classifier, variables, x, y), expected, rtol=1e-3)
    exact = adjoint_residuals(with_gradient(AtState(Implicit(Broyden(20)))), variables, x, y)
    assert exact.max() < 2e-3 < 1e-2 < min(expected)


@pytest.mark.parametrize(
    "classifier", [with_gradient(Phantom()), Explicit(SmallCNN(10, 4))], ids=["phantom", "explicit"]
)
def test_where_there_is_no_adjoint_state_there_is_no_residual(classifier):
    assert adjoint_residuals(classifier, {}, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, int)) is None


@pytest.mark.slow
def test_an_evaluation_reports_it_in_numbers_and_on_the_terminal(tmp_path):
    classifier = with_gradient(Implicit(Broyden(2)))
    variables, x, y = problem(classifier)
    config = EvalConfig(Linf(0.1), (), batch_size=8)
    result = worst_case(config, classifier, variables, Images(np.asarray(x), np.asarray(y)), tmp_path)
    record = EvaluationRecord.of(result)
    expected = np.asarray(adjoint_residuals(classifier, variables, x, y))
    assert record.adjoint_residual.mean == pytest.approx(expected.mean(), rel=1e-3)
    assert record.adjoint_residual.largest == pytest.approx(expected.max(), rel=1e-3)
    assert f"adjoint residual: mean {expected.mean():.1e}"[:-5] in states_table(record).caption


def test_images_that_are_not_finite_do_not_hide_the_others():
    assert spread(np.array([1.0, np.nan, 2.0, np.inf])) == Spread(1.5, 2.0)
    assert spread(np.array([np.nan])) == spread(None) == Spread(None, None)


@pytest.mark.slow
def test_a_training_run_logs_it_at_validation(tmp_path):
    classifier = replace(tiny.classifier(), dynamics=replace(tiny.classifier().dynamics, gradient=Implicit(Broyden(3))))
    lines: list[dict[str, Any]] = []
    fit(tiny.get_config(classifier=classifier), tmp_path / "run", report=lines.append)
    found = [line["adjoint_residual"] for line in lines if line["split"] == "validation"]
    assert len(found) == 1 and 0 < found[0] < 10
    assert not any("adjoint_residual" in line for line in lines if line["split"] == "train")
