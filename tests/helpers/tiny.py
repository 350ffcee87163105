"""A configuration so small that it compiles and trains in seconds."""

from dataclasses import replace

from deq_jax import Broyden, Dynamics, Equilibrium, FinalState, PGDAdversarialTraining, Phantom, TrainConfig
from deq_jax.attacks import PGD, Linf, gaussian_start
from deq_jax.core import losses
from deq_jax.data import Digits
from deq_jax.models import SmallCell, SmallDecoder, SmallEncoder

ATTACK = PGD(Linf(0.1), steps=2, step_size=0.05, best_of=False)
TRADES_ATTACK = replace(ATTACK, loss=losses.kl, start=gaussian_start)
OVERRIDES = [  # of configs/digits_*.py: seconds to compile
    "classifier.encoder.channels=4",
    "classifier.encoder.strides=4",
    "classifier.cell.channels=4",
    "classifier.cell.expansion=1",
    "classifier.cell.groups=2",
    "classifier.dynamics.solver.steps=2",
    "classifier.dynamics.gradient.steps=1",
    "objective.attack.steps=1",
    "validation_attack.steps=1",
    "batch_size=16",
    "epochs=1",
    "pretrain_steps=0",
]


def assignments(*items):
    """Arguments of a command that set these fields."""
    return [argument for item in items for argument in ("--set", item)]


def classifier(readout=FinalState(), dropout=0.2):
    """A DEQ with 4 channels."""
    dynamics = Dynamics(Broyden(4), readout, Phantom(2, 0.5))
    return Equilibrium(SmallEncoder(4, dropout=dropout), SmallCell(4), SmallDecoder(10), dynamics)


def get_config(**changes):
    """PGD-AT of the tiny DEQ: 17 steps an epoch, two of which are pre-training."""
    fields = {
        "classifier": classifier(),
        "objective": PGDAdversarialTraining(ATTACK),
        "dataset": Digits(),
        "validation_attack": ATTACK,
        "batch_size": 64,
        "epochs": 1,
        "pretrain_steps": 2,
        "log_every": 1,
    }
    return TrainConfig(**{**fields, **changes})
