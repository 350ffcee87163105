"""Explicit twins of a DEQ: its own modules without a solver."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from deq_jax.core.errors import InputError, require
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array, Injection, PyTree
from deq_jax.models.classifiers import Equilibrium, Explicit


class WeightTied(nn.Module):
    """A network of a DEQ's modules: the cell is applied `depth` times, from the features of the injection.

    A DEQ starts from 0. There one application of the cell would see nothing of the image but the injection.

    Attributes:
      encoder, cell, decoder: as in `Equilibrium`.
      depth: number of applications of the cell, at least 1; they share its parameters.

    References: Bai et al. 2019, section 3 (weight-tied networks).

    Examples:
      >>> from deq_jax.models import SmallCell, SmallDecoder, SmallEncoder, WeightTied
      >>> WeightTied(SmallEncoder(4), SmallCell(4), SmallDecoder(10), depth=8).depth
      8
    """

    encoder: nn.Module
    cell: nn.Module
    decoder: nn.Module
    depth: int = 1

    def __call__(self, x: Array, train: bool = False, keys: Keys | None = None, axis_name: str | None = None) -> Array:
        """Logits [B, K] of images [B, H, W, C] in [0, 1]."""
        require(self.depth >= 1, f"WeightTied: depth must be >= 1, got {self.depth!r}")

        def step(cell: nn.Module, z: PyTree, u: Injection) -> tuple[PyTree, None]:
            return cell(z, u), None

        u = self.encoder(x, train, keys, axis_name)
        shared: dict[Any, bool] = {"params": False}
        tied = nn.scan(step, variable_broadcast="params", split_rngs=shared, in_axes=nn.broadcast, length=self.depth)
        z, _ = tied(self.cell, u.features, u)
        logits: Array = self.decoder(z, train, axis_name)
        return logits


def explicit_twin(classifier: Equilibrium, depth: int = 1) -> Explicit:
    """The explicit network of a DEQ's own modules, with exactly its parameters; see `WeightTied`.

    With `depth` as large as the number of cell evaluations of the DEQ it also does as much computation. It computes in
    the precision of its parameters and has no Jacobian penalty.

    Args:
      classifier: a DEQ.
      depth: number of applications of the cell.

    Raises:
      InputError: the classifier is not an `Equilibrium`.

    Examples:
      >>> from deq_jax import Broyden, Dynamics, Equilibrium
      >>> from deq_jax.models import explicit_twin, mdeq_small
      >>> deq = Equilibrium(*mdeq_small(), dynamics=Dynamics(Broyden(6)))
      >>> explicit_twin(deq, depth=6).module.cell == deq.cell
      True
    """
    if not isinstance(classifier, Equilibrium):
        raise InputError(f"explicit_twin: expected an Equilibrium, got {type(classifier).__name__}")
    return Explicit(WeightTied(classifier.encoder, classifier.cell, classifier.decoder, depth))
