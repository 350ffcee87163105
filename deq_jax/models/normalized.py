"""Classifiers with normalised inputs: a mean and a deviation per channel, as most published networks need it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp

from deq_jax.core.errors import require
from deq_jax.core.types import Array
from deq_jax.models.classifiers import Equilibrium, Explicit

Network = TypeVar("Network", Equilibrium, Explicit)


def normalized(classifier: Network, mean: Sequence[float], std: Sequence[float]) -> Network:
    """The classifier with a network that sees (x - mean) / std, while its own images x stay in [0, 1].

    Attacks, defences and solvers see the whole as one classifier of images in [0, 1], differentiable through the
    normalisation. It has the same variables as the classifier, so converted checkpoints fit.

    Args:
      classifier: `Equilibrium` (the encoder is wrapped) or `Explicit` (the module is wrapped).
      mean: one for each channel, of images in [0, 1]; for instance 0.4914, 0.4822, 0.4465.
      std: one for each channel, of the same images; positive.

    Raises:
      InputError: mean and std do not fit each other or images in [0, 1], or the classifier is normalised already.

    Examples:
      >>> from deq_jax import Explicit
      >>> from deq_jax.models import ResNet18, normalized
      >>> network = normalized(Explicit(ResNet18(10)), (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
      >>> network.module.mean
      (0.4914, 0.4822, 0.4465)
    """
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    fit = 0 < len(mean) == len(std)
    require(fit, f"normalized: expected a mean and a std for each channel, got {len(mean)} and {len(std)}")
    inside = all(0 <= value <= 1 for value in mean)
    require(inside, f"normalized: mean must lie in [0, 1], as the images do, got {mean}")
    positive = all(value > 0 and math.isfinite(value) for value in std)
    require(positive, f"normalized: std must be positive, got {std}")
    known = isinstance(classifier, Equilibrium | Explicit)
    require(known, f"normalized: expected an Equilibrium or Explicit, got {type(classifier).__name__}")
    part = "encoder" if isinstance(classifier, Equilibrium) else "module"
    module = getattr(classifier, part)
    require(
        not isinstance(module, Normalized),
        "normalized: expected a classifier without normalisation, got one that has it already",
    )
    changes: dict[str, Any] = {part: Normalized(module, mean, std)}
    return replace(classifier, **changes)


class Normalized(nn.Module):
    """A module that is given (x - mean) / std for its images x; its variables are the module's own.

    Attributes:
      module: an encoder, or an explicit network: ``(x, ...) -> output``.
      mean, std: one for each channel.

    Examples:
      >>> from deq_jax.models import Normalized, SmallEncoder
      >>> Normalized(SmallEncoder(4), mean=(0.5,), std=(0.25,)).module.channels
      4
    """

    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    def __call__(self, x: Array, *arguments: Any) -> Any:
        """The module's output for images x [B, H, W, C] in [0, 1]."""
        channels = len(self.mean)
        require(x.shape[-1] == channels, f"Normalized: expected images of {channels} channels, got {x.shape[-1]}")
        mean, std = (jnp.asarray(values, x.dtype) for values in (self.mean, self.std))
        return self.module((x - mean) / std, *arguments)
