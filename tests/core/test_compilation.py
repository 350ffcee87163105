"""Calls outside `jax.jit` compile once; calls inside it are part of its program."""

import re
from dataclasses import dataclass, replace
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from deq_jax import (
    Broyden,
    Dynamics,
    Explicit,
    Implicit,
    Keys,
    Phantom,
    solve,
    surrogates,
)
from deq_jax.core import PhantomUpTo, cross_entropy, jacobian_norm, spectral_radius
from deq_jax.models import JacobianRegularization, SmallCNN
from deq_jax.surrogates import adaptive
from tests.helpers import dense
from tests.helpers.cells import GRADIENTS, SOLVER, SOLVERS, P, U, cell, layer

X = jnp.linspace(0, 1, 2 * 16).reshape(2, 4, 4, 1)
Y = jnp.array([0, 1])
KEYS = Keys.of(0, 2)


COMPILATIONS: list[str] = []


def record(name, seconds, **_):
    if name.endswith("backend_compile_duration"):
        COMPILATIONS.append(name)


monitoring.register_event_duration_secs_listener(record)


@cache
def defended():
    defence = dense.defence_of(SOLVER, every=3, steps=1)
    return defence, defence.init(0, X)


def logits_of(classifier, variables, x, **options):
    return classifier(variables, x, **options).logits


def oracles():
    """Logits and gradients by every surrogate, of a DEQ or of one with input entropy reduction."""
    defence, variables = defended()
    base = [
        surrogates.Direct(),
        surrogates.WithGradient(Implicit(Broyden(3))),
        surrogates.ThroughSolver(),
        surrogates.Intermediate(2),
        surrogates.MeanOverStates(),
        surrogates.SimultaneousAdjoint(2),
    ]
    both = [(defence.base, surrogate) for surrogate in base]
    head = adaptive.BPDAHead()
    both += [(defence, each) for each in (adaptive.BPDAIdentity(), head, adaptive.BPDASolver(), adaptive.EndToEnd())]
    both += [(defence, adaptive.PathAverage(each)) for each in (head, adaptive.EndToEnd())]
    for classifier, surrogate in both:
        oracle = surrogate(classifier, variables)
        name = type(surrogate).__name__
        yield f"{name} logits", lambda oracle=oracle: oracle.logits(X, KEYS)
        yield f"{name} gradient", lambda oracle=oracle: oracle.grad(cross_entropy, X, Y, KEYS)


def layers():
    """Everything that runs a cell, as a user calls it outside `jax.jit`."""
    for solver in SOLVERS:
        yield f"solve {type(solver).__name__}", lambda solver=solver: solve(solver, cell, P, jnp.zeros_like(U), U)
    for gradient in GRADIENTS:
        name = type(gradient).__name__
        yield name, lambda gradient=gradient: gradient(cell, P, U, U)
        yield f"{name} of arrays", lambda gradient=gradient: jax.grad(lambda p: jnp.sum(gradient(cell, p, U, U)))(P)
        yield f"deq {name}", lambda gradient=gradient: layer(gradient=gradient)
        yield f"deq {name} gradient", lambda g=gradient: jax.grad(lambda p: jnp.sum(layer(p, gradient=g)))(P)
    arrays = PhantomUpTo(4, jnp.array(2), jnp.array(0.5))
    yield "traced steps", lambda: arrays(cell, P, U, U)
    yield "jacobian_norm", lambda: jacobian_norm(cell, P, U, U, U[None])
    yield "spectral_radius", lambda: spectral_radius(cell, P, U, U, U, 3)


def classifiers():
    """Classifiers, and their gradients."""
    defence, variables = defended()
    network = Explicit(SmallCNN(3, 4, dropout=0.2))
    penalised = replace(defence.base, jacobian=JacobianRegularization())
    named = {"Equilibrium": (defence.base, variables), "EntropyReduced": (defence, variables)}
    for name, (classifier, weights) in {**named, "Explicit": (network, network.init(0, X))}.items():
        query = partial(logits_of, classifier, weights)
        yield name, partial(query, X)
        yield f"{name} gradient", partial(jax.grad(lambda x, query=query: jnp.sum(query(x))), X)
        if classifier is not defence:
            train = partial(logits_of, classifier, x=X, train=True, keys=KEYS)
            yield f"{name} training", partial(train, weights)
            yield f"{name} training gradient", partial(jax.grad(lambda v, train=train: jnp.sum(train(v))), weights)
    yield "penalised", lambda: penalised(defended()[1], X, train=True, keys=KEYS)
    yield "built anew", lambda: replace(defence.base, dynamics=Dynamics(Broyden(3)))(defended()[1], X)


class TestCallsOutsideJit:
    @pytest.mark.slow
    @pytest.mark.parametrize("entries", [layers, classifiers, oracles])
    def test_nothing_is_compiled_after_the_first_call(self, entries):
        again = {}
        for name, call in entries():
            jax.block_until_ready(call())
            COMPILATIONS.clear()
            for _ in range(20):
                jax.block_until_ready(call())
            again[name] = len(COMPILATIONS)
        assert len(again) >= 9 and {name: count for name, count in again.items() if count} == {}

    def test_a_first_call_is_counted(self):
        COMPILATIONS.clear()
        layer(f=lambda params, z, u: jnp.sin(z @ params + u))
        assert COMPILATIONS

    def test_cells_and_choices_are_compared_by_value(self):
        @dataclass(frozen=True)
        class Scaled:
            scale: float

            def __call__(self, params, z, u):
                return self.scale * cell(params, z, u)

        values = [layer(f=Scaled(scale)) for scale in (0.5, 0.5, 1.0)]
        np.testing.assert_array_equal(values[0], values[1])
        np.testing.assert_allclose(values[2], layer(), rtol=1e-6)
        assert not np.allclose(values[0], values[2])

    def test_a_cell_that_is_not_hashable_works(self):
        class Unhashable:
            __hash__ = None  # type: ignore[assignment]

            def __call__(self, params, z, u):
                return cell(params, z, u)

        np.testing.assert_allclose(layer(f=Unhashable()), layer(), rtol=1e-6)
        np.testing.assert_allclose(Phantom()(Unhashable(), P, U, U), Phantom()(cell, P, U, U), rtol=1e-6)

    def test_inside_jit_the_cell_is_traced_as_often_as_before_and_once_for_all_calls(self):
        traces = []

        def counted(params, z, u):
            traces.append(0)
            return cell(params, z, u)

        jitted = jax.jit(chex.assert_max_traces(lambda u: layer(u=u, f=counted), n=1))
        jitted(U)
        once = len(traces)
        for _ in range(3):
            jitted(2 * U)
        assert len(traces) == once <= 4  # the solver's start, its step, the estimator's step

    def test_the_program_inside_jit_has_no_calls_left(self):
        program = jax.jit(jax.grad(lambda p: jnp.sum(layer(p)))).lower(P).compile().as_text()
        assert "fusion(" in program and not re.search(r"= \S+ call\(", program)
