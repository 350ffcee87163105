"""Predictors that classify a raw state of the dynamics: early, last or ensemble."""

from __future__ import annotations

from dataclasses import replace

from deq_jax.core.gradients import AtState
from deq_jax.core.types import Readout
from deq_jax.defences.entropy import EntropyReduced
from deq_jax.models.base import Classifier
from deq_jax.models.classifiers import Equilibrium, require_deq


def deployed(classifier: Classifier, readout: Readout) -> Equilibrium | EntropyReduced:
    """The predictor that classifies a raw state: early (`IntermediateState`) or ensemble (`EnsembleState`).

    It decodes exactly that state. Its gradient comes from the classifier's estimator
    there. The undefended predictor is the classifier itself. With input entropy reduction it is a state of the
    regulated dynamics.

    Raises:
      InputError: the classifier is not a DEQ with a solver.
    """
    if isinstance(classifier, EntropyReduced):
        return replace(classifier, readout=readout)
    model, _ = require_deq(classifier)
    return model.with_dynamics(readout=readout, gradient=AtState(model.dynamics.gradient))
