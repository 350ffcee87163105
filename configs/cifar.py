"""Shared by the CIFAR configs: the recipe of Yang et al. 2023, and its variants.

This is not a config itself. Start from cifar10_large_pgd_at.py; all others are variants of it.
"""

from dataclasses import replace

from flax import linen as nn

from deq_jax import (
    Broyden,
    Dynamics,
    Equilibrium,
    Explicit,
    Implicit,
    PGDAdversarialTraining,
    Phantom,
    Trades,
    TrainConfig,
)
from deq_jax.attacks import PGD, Linf, gaussian_start
from deq_jax.core import kl
from deq_jax.data import CropFlip, Tfds
from deq_jax.models import JacobianRegularization, Mdeq
from deq_jax.surrogates import ThroughSolver

EPSILON, STEP_SIZE = 8 / 255, 2 / 255
ATTACK = PGD(Linf(EPSILON), steps=10, step_size=STEP_SIZE, best_of=False)
DYNAMICS = Dynamics(Broyden(8), gradient=Phantom(steps=5, damping=0.5))


def recipe(dataset: str, modules: Mdeq) -> TrainConfig:
    """PGD adversarial training of an MDEQ: 220 epochs of batch 96, the first 16,000 steps clean and shallow."""
    return TrainConfig(
        classifier=Equilibrium(*modules, dynamics=DYNAMICS, jacobian=JacobianRegularization(weight=0.4)),
        objective=PGDAdversarialTraining(ATTACK),
        dataset=Tfds(dataset),
        validation_attack=replace(ATTACK, best_of=True),
        augmentation=CropFlip(4),
        batch_size=96,
        epochs=220,
        pretrain_steps=16_000,
    )


def with_trades(config: TrainConfig) -> TrainConfig:
    """The config with TRADES instead of PGD-AT."""
    return replace(config, objective=Trades(replace(ATTACK, loss=kl, start=gaussian_start), beta=6.0))


def with_modules(config: TrainConfig, modules: Mdeq) -> TrainConfig:
    """The config with another MDEQ."""
    encoder, cell, decoder = modules
    return replace(config, classifier=replace(config.classifier, encoder=encoder, cell=cell, decoder=decoder))


def with_exact_gradient(config: TrainConfig) -> TrainConfig:
    """The config with the implicit gradient: seven Broyden steps on the adjoint equation."""
    return replace(config, classifier=config.classifier.with_dynamics(gradient=Implicit(Broyden(7))))


def with_jacobian_weight(config: TrainConfig, weight: float) -> TrainConfig:
    """The config with another weight of the Jacobian penalty."""
    jacobian = replace(config.classifier.jacobian, weight=weight)
    return replace(config, classifier=replace(config.classifier, jacobian=jacobian))


def with_module(config: TrainConfig, module: nn.Module) -> TrainConfig:
    """The config with an explicit network, which needs no shallow pre-training."""
    return replace(config, classifier=Explicit(module), pretrain_steps=0)


def with_attack_through_solver(config: TrainConfig) -> TrainConfig:
    """The config with attacks that differentiate the solver's steps."""
    return replace(config, objective=replace(config.objective, surrogate=ThroughSolver()))
