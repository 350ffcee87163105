"""Trained networks that come with the package."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from deq_jax.core.errors import InputError, first_line, require
from deq_jax.core.gradients import Phantom
from deq_jax.core.solvers import Broyden
from deq_jax.models.base import Variables
from deq_jax.models.classifiers import Dynamics, Equilibrium
from deq_jax.models.small import small_deq

FOLDER = Path(__file__).with_name("trained")
BUILDERS = {"digits_pgd_at": lambda: small_deq(10, 12, Dynamics(Broyden(8), gradient=Phantom(steps=5, damping=0.5)))}


class Pretrained(NamedTuple):
    """A trained network.

    Attributes:
      classifier: the network.
      variables: its parameters and batch statistics.
      about: how it was trained, and its accuracy with and without an attack, as measured then.

    Examples:
      >>> from deq_jax.models import pretrained
      >>> sorted(pretrained("digits_pgd_at").about["robustness"])
      ['budget', 'clean_accuracy', 'epsilon', 'images', 'norm', 'red_flags', 'robust_accuracy']
    """

    classifier: Equilibrium
    variables: Variables
    about: dict[str, Any]


def pretrained(name: str) -> Pretrained:
    """A trained network that comes with the package, ready to be attacked.

    Args:
      name: ``digits_pgd_at``, a small DEQ for `Digits`, trained with PGD adversarial training at epsilon 0.1 in ℓ∞ by
        ``configs/digits_pgd_at.py``.

    Raises:
      InputError: there is no such network, or its file is damaged.

    Examples:
      >>> import deq_jax as dj
      >>> model = dj.models.pretrained("digits_pgd_at")
      >>> predictor = dj.Predictor(model.classifier, model.variables)
      >>> test = dj.data.Digits().load().test
      >>> bool(predictor.accuracy(test.x[:60], test.y[:60]) > 0.9)
      True
    """
    require(name in BUILDERS, f"pretrained: no network is called {name!r}; there is {', '.join(BUILDERS)}")
    path, about_path = FOLDER / f"{name}.npz", FOLDER / f"{name}.json"
    try:
        about, content = json.loads(about_path.read_text()), path.read_bytes()
        expected = about["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{about_path}: damaged ({first_line(error)}); install deq_jax again") from None
    digest = hashlib.sha256(content).hexdigest()
    require(digest == expected, f"{path}: damaged, its SHA-256 is {digest}, expected {expected}; install deq_jax again")
    with np.load(io.BytesIO(content)) as arrays:
        found = traverse_util.unflatten_dict(dict(arrays), sep="/")
    parts = found["params"]  # all of them have parameters; not all have batch statistics
    variables = {collection: {part: tree.get(part, {}) for part in parts} for collection, tree in found.items()}
    return Pretrained(BUILDERS[name](), variables, about)
