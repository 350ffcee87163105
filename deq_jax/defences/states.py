"""Predictors that classify a raw state of the dynamics: early, last or ensemble."""

from __future__ import annotations

from dataclasses import replace

from deq_jax.core.gradients import at_state
from deq_jax.core.types import Readout
from deq_jax.defences.entropy import EntropyReduced
from deq_jax.models.base import Classifier
from deq_jax.models.classifiers import Equilibrium, require_deq


def deployed(classifier: Classifier, readout: Readout) -> Equilibrium | EntropyReduced:
    """The predictor that classifies a raw state: early (`IntermediateState`) or ensemble (`EnsembleState`).

    It decodes exactly that state. Its gradient comes from the classifier's estimator there. The undefended predictor is
    the classifier itself. With input entropy reduction it is a state of the regulated dynamics.

    Raises:
      InputError: the classifier is not a DEQ with a solver.

    Examples:
      >>> from deq_jax import Broyden, Dynamics, Equilibrium, IntermediateState
      >>> from deq_jax.defences import deployed
      >>> from deq_jax.models import SmallCell, SmallDecoder, SmallEncoder
      >>> model = Equilibrium(SmallEncoder(4), SmallCell(4), SmallDecoder(10), Dynamics(Broyden(8)))
      >>> deployed(model, IntermediateState(3)).dynamics.gradient
      AtState(gradient=Phantom(steps=5, damping=0.5))
    """
    if isinstance(classifier, EntropyReduced):
        return replace(classifier, readout=readout)
    model, _ = require_deq(classifier, "deployed")
    return model.with_dynamics(readout=readout, gradient=at_state(model.dynamics.gradient))
