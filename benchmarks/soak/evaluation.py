"""The evaluation of the fault campaign: two trials, in batches of eight images."""

from __future__ import annotations

from benchmarks.soak import tiny
from deq_jax import TrainConfig
from deq_jax.attacks import Noise
from deq_jax.evaluation import EvalConfig, Trial
from deq_jax.training import threat_of

__all__ = ["tiny"]  # its setting of the compilation cache


def get_config(train: TrainConfig) -> EvalConfig:
    """Nine batches of 24 images in all: clean, and of both trials."""
    threat = threat_of(train)
    trials = Trial("noise", Noise(threat)), Trial("further-noise", Noise(threat))
    return EvalConfig(threat, trials, batch_size=8, skip_broken=False)
