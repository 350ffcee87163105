"""deq_jax: train, regularise and honestly attack deep equilibrium models in JAX and Flax.

The layer and its choices are here: ``import deq_jax as dj``, then ``dj.deq``, ``dj.Broyden(8)``, ``dj.Equilibrium``.
All else is in rooms, which load when they are first used: `dj.attacks`, `dj.models`, `dj.data`, `dj.defences`,
`dj.surrogates`, `dj.training`, `dj.evaluation`, `dj.reporting`, `dj.interop`; for contributors also `dj.core`,
`dj.parallel` and `dj.storage`.

A training run, an attack and an evaluation::

    import deq_jax as dj
    from deq_jax import attacks, surrogates

    ball = attacks.Linf(0.1)
    model = dj.models.small_deq(num_classes=10, channels=12, dynamics=dj.Dynamics(dj.Broyden(8)))
    config = dj.TrainConfig(model, dj.PGDAdversarialTraining(attacks.PGD(ball, steps=5)), dj.data.Digits(), epochs=6)
    run = dj.fit(config)                                        # in memory; workdir="runs/a" keeps, resumes and logs
    x, y = run.data.test.x[:120], run.data.test.y[:120]
    oracle = run.predictor.oracle(surrogates.Intermediate(4))   # gradients of z_4, success as deployed
    x_adv = attacks.PGD(ball, steps=20)(oracle, x, y, 0)
    print(run.predictor.accuracy(x_adv, y))                     # deployed; .measure(x_adv, y) for z_1 .. z_8
    result = dj.assess(run.predictor, (x, y), dj.evaluation.auto_attack_trials(ball))
    print(result.robust_accuracy, result.red_flags)             # a number never without its flags
"""

import importlib
from importlib.metadata import version
from typing import Any

from deq_jax import _interrupt as _interrupt
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
    "Predictor": "evaluation",
    "assess": "evaluation",
    "fit": "training",
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
    "Predictor",
    "RandomIntermediateState",
    "Standard",
    "Trades",
    "TrainConfig",
    "Unrolled",
    "__version__",
    "assess",
    "attacks",
    "core",
    "data",
    "defences",
    "deq",
    "evaluation",
    "fit",
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
    """The public names, without this file's own imports."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
