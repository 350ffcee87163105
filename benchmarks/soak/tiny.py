"""The run of the fault campaign: a linear classifier of a few digits, with a checkpoint after every other step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from deq_jax import Standard, TrainConfig
from deq_jax.attacks import Linf, Noise
from deq_jax.data import Digits, Images, Splits
from deq_jax.models import Explicit

# Compiling takes most of the time: also the smallest programs are kept for the next process.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Linear(nn.Module):
    """Logits are linear in the pixels; the weights begin at 0."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, keys: Any = None, axis_name: str | None = None) -> jax.Array:
        return nn.Dense(10, kernel_init=nn.initializers.zeros)(x.reshape(len(x), -1))


@dataclass(frozen=True)
class FewDigits:
    """The first digits of each split."""

    def load(self) -> Splits:
        whole = Digits().load()
        sizes = {"train": 64, "validation": 16, "test": 24}
        return Splits(**{name: Images(*(part[:size] for part in getattr(whole, name))) for name, size in sizes.items()})


def get_config() -> TrainConfig:
    """Twelve steps, three validations, and seven checkpoints or more."""
    return TrainConfig(
        Explicit(Linear()),
        Standard(),
        FewDigits(),
        validation_attack=Noise(Linf(0.1)),
        batch_size=16,
        epochs=3,
        checkpoint_every=2,
        log_every=1,
    )
