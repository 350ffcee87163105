"""Attacks on any JAX classifier: frozen objects called as ``attack(oracle, x, labels, key, start=None) -> x_adv``."""

from deq_jax.attacks.apgd import APGD
from deq_jax.attacks.auto import AutoAttack, Stage, auto_attack
from deq_jax.attacks.best import Best, InParts, is_fooled, until_fooled
from deq_jax.attacks.fab import FAB
from deq_jax.attacks.inputs import check_inputs
from deq_jax.attacks.noise import Noise
from deq_jax.attacks.oracles import Attack, Oracle, aimed_at, average, expectation, gradient_from, oracle_of
from deq_jax.attacks.pgd import PGD, Start, clean_start, gaussian_start, uniform_start
from deq_jax.attacks.spsa import SPSA
from deq_jax.attacks.square import Square
from deq_jax.attacks.targeted import Targeted
from deq_jax.attacks.threats import L2, Linf, Threat

__all__ = [
    "APGD",
    "FAB",
    "L2",
    "PGD",
    "SPSA",
    "Attack",
    "AutoAttack",
    "Best",
    "InParts",
    "Linf",
    "Noise",
    "Oracle",
    "Square",
    "Stage",
    "Start",
    "Targeted",
    "Threat",
    "aimed_at",
    "auto_attack",
    "average",
    "check_inputs",
    "clean_start",
    "expectation",
    "gaussian_start",
    "gradient_from",
    "is_fooled",
    "oracle_of",
    "uniform_start",
    "until_fooled",
]
