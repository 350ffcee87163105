"""Objectives, the training step, and the loop that logs, validates, saves and resumes."""

from deq_jax.core.types import Optimizer
from deq_jax.training.config import Phase, TrainConfig, threat_of, with_readout
from deq_jax.training.endings import Interrupted, NonFiniteLoss
from deq_jax.training.fitting import fit
from deq_jax.training.loop import Run
from deq_jax.training.metrics import read_metrics
from deq_jax.training.objectives import Objective, Outcome, PGDAdversarialTraining, Standard, Trades
from deq_jax.training.optimizers import AdamCosine, AdamW, Cosine, OneCycle, Piecewise, Schedule, Sgd, WeightAverage
from deq_jax.training.schedules import PenaltySchedule, RadiusSchedule
from deq_jax.training.step import (
    Batch,
    TrainState,
    initial_state,
    initial_variables,
    learning_rate,
    optimizer_of,
    train_step,
)
from deq_jax.training.workdir import LoadedRun, Origin, Workdir, load_run

__all__ = [
    "AdamCosine",
    "AdamW",
    "Batch",
    "Cosine",
    "Interrupted",
    "LoadedRun",
    "NonFiniteLoss",
    "Objective",
    "OneCycle",
    "Optimizer",
    "Origin",
    "Outcome",
    "PGDAdversarialTraining",
    "PenaltySchedule",
    "Phase",
    "Piecewise",
    "RadiusSchedule",
    "Run",
    "Schedule",
    "Sgd",
    "Standard",
    "Trades",
    "TrainConfig",
    "TrainState",
    "WeightAverage",
    "Workdir",
    "fit",
    "initial_state",
    "initial_variables",
    "learning_rate",
    "load_run",
    "optimizer_of",
    "read_metrics",
    "threat_of",
    "train_step",
    "with_readout",
]
