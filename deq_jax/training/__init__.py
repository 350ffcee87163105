"""Objectives, the training step, and the loop that logs, validates, saves and resumes."""

from deq_jax.training.config import AdamCosine, PenaltySchedule, Phase, TrainConfig, threat_of, with_readout
from deq_jax.training.loop import Interrupted, NonFiniteLoss, Run, fit
from deq_jax.training.metrics import read_metrics
from deq_jax.training.objectives import Objective, Outcome, PGDAdversarialTraining, Standard, Trades
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
    "Batch",
    "Interrupted",
    "LoadedRun",
    "NonFiniteLoss",
    "Objective",
    "Origin",
    "Outcome",
    "PGDAdversarialTraining",
    "PenaltySchedule",
    "Phase",
    "Run",
    "Standard",
    "Trades",
    "TrainConfig",
    "TrainState",
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
