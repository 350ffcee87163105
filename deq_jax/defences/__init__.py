"""Defences around a trained classifier: input entropy reduction, and raw states."""

from deq_jax.defences.carries import Carry, FullCarry, ReferenceCarry
from deq_jax.defences.entropy import (
    Direction,
    EntropyGradient,
    EntropyReduced,
    Purified,
    RandomDirection,
    reduce_entropy,
    sign,
)
from deq_jax.defences.states import deployed

__all__ = [
    "Carry",
    "Direction",
    "EntropyGradient",
    "EntropyReduced",
    "FullCarry",
    "Purified",
    "RandomDirection",
    "ReferenceCarry",
    "deployed",
    "reduce_entropy",
    "sign",
]
