"""deq_jax: train, regularise and honestly attack deep equilibrium models in JAX and Flax.

The layer and its choices are here: ``import deq_jax as dj``, then ``dj.deq``, ``dj.Broyden(8)``, ``dj.Equilibrium``.
All else is in rooms, which load when they are first used: `dj.attacks`, `dj.models`, `dj.data`, `dj.defences`,
`dj.surrogates`, `dj.training`, `dj.evaluation`, `dj.reporting`, `dj.interop`; for contributors also `dj.core`,
`dj.parallel` and `dj.storage`.
"""

import importlib
from importlib.metadata import version
from typing import Any

from deq_jax.core import (
    Anderson,
    Backprop,
    Broyden,
    EnsembleState,
    FinalState,
    FixedPoint,
    Implicit,
    InputError,
    IntermediateState,
    Keys,
    LastState,
    Neumann,
    Phantom,
    RandomIntermediateState,
    Unrolled,
    deq,
    solve,
)
from deq_jax.models import Dynamics, Equilibrium, Explicit

__version__ = version("deq_jax")

_ROOMS = (
    "attacks",
    "core",
    "data",
    "defences",
    "evaluation",
    "interop",
    "models",
    "parallel",
    "reporting",
    "storage",
    "surrogates",
    "training",
)
_ROOM_OF = {
    "EntropyReduced": "defences",
    "PGDAdversarialTraining": "training",
    "Standard": "training",
    "TrainConfig": "training",
    "Trades": "training",
}

__all__ = [
    "Anderson",
    "Backprop",
    "Broyden",
    "Dynamics",
    "EnsembleState",
    "EntropyReduced",
    "Equilibrium",
    "Explicit",
    "FinalState",
    "FixedPoint",
    "Implicit",
    "InputError",
    "IntermediateState",
    "Keys",
    "LastState",
    "Neumann",
    "PGDAdversarialTraining",
    "Phantom",
    "RandomIntermediateState",
    "Standard",
    "Trades",
    "TrainConfig",
    "Unrolled",
    "__version__",
    "attacks",
    "core",
    "data",
    "defences",
    "deq",
    "evaluation",
    "interop",
    "models",
    "parallel",
    "reporting",
    "solve",
    "storage",
    "surrogates",
    "training",
]


def __getattr__(name: str) -> Any:
    """Rooms, and names from rooms that take time to load, at their first use (PEP 562)."""
    if name in _ROOMS:
        return importlib.import_module(f"deq_jax.{name}")
    if name in _ROOM_OF:
        return getattr(importlib.import_module(f"deq_jax.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module 'deq_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
