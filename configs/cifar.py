"""Shared by the CIFAR configs: the recipe of Yang et al. 2023, one for small machines, and their variants.

This is not a config itself. Start from cifar10_large_pgd_at.py, or for small machines from cifar10_small_pgd_at.py; all
others are variants of these two.
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
from deq_jax.data import CropFlip, Dataset, Tfds
from deq_jax.models import JacobianRegularization, Mdeq, explicit_twin, mdeq_small, require_deq
from deq_jax.surrogates import ThroughSolver
from deq_jax.training import AdamW, Cosine, RadiusSchedule

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


def small_recipe(dataset: Dataset, num_classes: int) -> TrainConfig:
    """PGD adversarial training of the small MDEQ on 32x32 images: a short attack. Its radius grows at first."""
    dynamics = Dynamics(Broyden(6), gradient=Phantom(steps=3, damping=0.5))
    return TrainConfig(
        classifier=Equilibrium(*mdeq_small(num_classes), dynamics=dynamics),
        objective=PGDAdversarialTraining(replace(ATTACK, steps=2, step_size=6 / 255)),
        dataset=dataset,
        validation_attack=replace(ATTACK, best_of=True),
        optimizer=AdamW(2e-3, weight_decay=1e-2, clip=1.0, rates=Cosine(warmup=0.05)),
        radius=RadiusSchedule(rise=0.4),
        augmentation=CropFlip(4),
        batch_size=256,
        epochs=8,
        log_every=20,
        validation_images=1000,
    )


def with_trades(config: TrainConfig) -> TrainConfig:
    """The config with TRADES instead of PGD-AT."""
    attack = replace(config.objective.attack, loss=kl, start=gaussian_start)
    return replace(config, objective=Trades(attack, beta=6.0))


def with_twin(config: TrainConfig, depth: int = 1) -> TrainConfig:
    """The config with the explicit twin of its DEQ."""
    return replace(config, classifier=explicit_twin(config.classifier, depth), pretrain_steps=0)


def cell_evaluations(classifier: Equilibrium) -> int:
    """Number of times that a DEQ's forward pass applies its cell, where no image stops early."""
    _, solver = require_deq(classifier, "cell_evaluations")
    return 1 + solver.steps + int(classifier.dynamics.gradient.applications)


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
