"""A small convolutional DEQ for small images, and an explicit network of the same size."""

from __future__ import annotations

import flax.linen as nn

from deq_jax.core.errors import require
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array, Injection
from deq_jax.models.classifiers import Dynamics, Equilibrium, Explicit
from deq_jax.models.layers import BatchNorm, GroupNorm, conv_layer, dropout_mask
from deq_jax.models.penalty import JacobianRegularization


class SmallEncoder(nn.Module):
    """Image -> injection, and the dropout masks of this forward.

    Attributes:
      channels: number of channels of the state.
      strides: stride of the first convolution; it divides the resolution of the image.
      dropout: rate of the variational dropout inside the cell.

    Examples:
      >>> from deq_jax.models import SmallEncoder
      >>> SmallEncoder(channels=12, dropout=0.1).strides
      1
    """

    channels: int
    strides: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, keys: Keys | None = None, axis_name: str | None = None
    ) -> Injection:
        require(self.strides >= 1, f"SmallEncoder: strides must be >= 1, got {self.strides!r}")
        u = conv_layer(self.channels, strides=self.strides)(x)
        u = BatchNorm()(u, train, axis_name)
        if not train or self.dropout == 0 or keys is None:
            return Injection(u)
        return Injection(u, dropout_mask(keys, self.channels, self.dropout, u.dtype))


class SmallCell(nn.Module):
    """One residual block with group normalisation: the cell f(z; u).

    Attributes:
      channels: number of channels of the state.
      expansion: channels inside the block, as a multiple.
      groups: number of groups of the normalisations.

    Examples:
      >>> from deq_jax.models import SmallCell
      >>> SmallCell(channels=12).groups
      4
    """

    channels: int
    expansion: int = 2
    groups: int = 4

    @nn.compact
    def __call__(self, z: Array, u: Injection) -> Array:
        o = conv_layer(self.channels * self.expansion)(z)
        o = nn.relu(GroupNorm(self.groups)(o))
        o = conv_layer(self.channels)(o)
        if u.masks is not None:
            o = o * u.masks
        o = GroupNorm(self.groups)(o + u.features)
        return GroupNorm(self.groups)(nn.relu(o + z))


class SmallDecoder(nn.Module):
    """State -> logits [B, K]: a strided convolution to twice the channels, normalisation and a dense layer.

    Attributes:
      num_classes: K.

    Examples:
      >>> from deq_jax.models import SmallDecoder
      >>> SmallDecoder(num_classes=10).num_classes
      10
    """

    num_classes: int

    @nn.compact
    def __call__(self, z: Array, train: bool = False, axis_name: str | None = None) -> Array:
        y = conv_layer(2 * z.shape[-1], strides=2)(z)
        y = nn.relu(BatchNorm()(y, train, axis_name))
        return nn.Dense(self.num_classes)(y.reshape(y.shape[0], -1))


class SmallCNN(nn.Module):
    """The explicit baseline of the small DEQ: its encoder, `depth` blocks like its cell, its decoder.

    With `depth` = 1 it has exactly the DEQ's parameters.

    Attributes:
      num_classes: K.
      channels: number of channels between the blocks; divisible by `groups`.
      strides: stride of the first convolution.
      expansion: channels inside the blocks, as a multiple.
      groups: number of groups of the normalisations.
      depth: number of blocks.
      dropout: rate of the variational dropout inside the blocks.

    Examples:
      >>> from deq_jax.models import SmallCNN
      >>> SmallCNN(num_classes=10, channels=12, depth=3).expansion
      2
    """

    num_classes: int
    channels: int
    strides: int = 1
    expansion: int = 2
    groups: int = 4
    depth: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False, keys: Keys | None = None, axis_name: str | None = None) -> Array:
        u = SmallEncoder(self.channels, self.strides, self.dropout)(x, train, keys, axis_name)
        z = u.features
        for _ in range(self.depth):
            z = SmallCell(self.channels, self.expansion, self.groups)(z, u)
        return SmallDecoder(self.num_classes)(z, train, axis_name)


def small_deq(
    num_classes: int,
    channels: int,
    dynamics: Dynamics,
    *,
    strides: int = 1,
    expansion: int = 2,
    groups: int = 4,
    dropout: float = 0.0,
    jacobian: JacobianRegularization | None = None,
) -> Equilibrium:
    """A small convolutional DEQ for small images, such as 8 x 8 digits.

    Args:
      num_classes: K.
      channels: number of channels of the state; divisible by `groups`.
      dynamics: how the equilibrium is found, read out and differentiated.
      strides: stride of the first convolution; it divides the resolution of the image.
      expansion: channels inside the cell, as a multiple.
      groups: number of groups of the cell's normalisations.
      dropout: rate of the variational dropout inside the cell.
      jacobian: see `Equilibrium`.

    Examples:
      >>> import deq_jax as dj
      >>> dj.models.small_deq(num_classes=10, channels=12, dynamics=dj.Dynamics(dj.Broyden(8))).dynamics.solver.steps
      8
    """
    modules = (
        SmallEncoder(channels, strides, dropout),
        SmallCell(channels, expansion, groups),
        SmallDecoder(num_classes),
    )
    return Equilibrium(*modules, dynamics, jacobian)


def small_cnn(
    num_classes: int,
    channels: int,
    *,
    strides: int = 1,
    expansion: int = 2,
    groups: int = 4,
    depth: int = 1,
    dropout: float = 0.0,
) -> Explicit:
    """The explicit baseline of `small_deq`; with `depth` = 1 it has exactly the same parameters.

    Args:
      num_classes: K.
      channels: number of channels between the blocks; divisible by `groups`.
      strides, expansion, groups, dropout: as in `small_deq`.
      depth: number of blocks like the DEQ's cell.

    Examples:
      >>> from deq_jax.models import small_cnn
      >>> small_cnn(num_classes=10, channels=12, depth=3).module.depth
      3
    """
    return Explicit(SmallCNN(num_classes, channels, strides, expansion, groups, depth, dropout))
