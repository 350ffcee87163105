"""A predictor's cost by a clock that is known, and its answers in several ways."""

import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from deq_jax import Explicit
from deq_jax.evaluation import probes
from tests.helpers.linear import DATA, Linear, trained

X = DATA.test.x[:20]


def test_seconds_are_those_between_two_looks_at_the_clock_per_image(monkeypatch):
    """It is looked at before and after each prediction: 1, 2, 3, ... seconds long."""
    moments = iter(itertools.accumulate(value for n in itertools.count(1) for value in (100, n)))
    monkeypatch.setattr(probes, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    found = probes.timed_answers(Explicit(Linear()), trained(), X, random=False, batch_size=4, seed=0)
    np.testing.assert_allclose(found["seconds"], np.arange(1, probes.TIMED + 1) / 4)
    assert found["evaluations"].shape == (4,) and np.isnan(found["evaluations"]).all()


def test_answers_are_in_the_order_of_the_images():
    found = probes.several_answers(Explicit(Linear()), trained(), X, random=False)
    expected = Explicit(Linear())(trained(), jnp.asarray(X[: probes.PROBED])).logits
    assert found.keys() == {"whole", "reverse", "alone", "other_key"}
    for logits in found.values():
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
