"""ResNet-18 and wide ResNets: explicit baselines of the size of an MDEQ."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers

from deq_jax.core.keys import Keys
from deq_jax.core.types import Array
from deq_jax.models.layers import BatchNorm, conv_layer

he_normal = initializers.variance_scaling(2.0, "fan_out", "normal")


class ResNet18(nn.Module):
    """Residual network of four stages of two blocks, without the downsampling stem of its ImageNet form.

    Attributes:
      num_classes: K.

    References: He et al. 2016 (Deep residual learning); He et al. 2015 (initialisation).

    Examples:
      >>> from deq_jax import Explicit
      >>> from deq_jax.models import ResNet18
      >>> Explicit(ResNet18()).module.num_classes
      10
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool = False, keys: Keys | None = None, axis_name: str | None = None) -> Array:
        """Logits [B, K] of images [B, H, W, C] in [0, 1]; `keys` are not used: nothing in it is random."""
        y = conv_layer(64, kernel_init=he_normal)(x)
        y = nn.relu(BatchNorm()(y, train, axis_name))
        for features, strides in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
            y = ResNetBlock(features, strides)(y, train, axis_name)
        return nn.Dense(self.num_classes)(jnp.mean(y, axis=(1, 2)))


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a strided 1x1 convolution where the shape changes."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: Array, train: bool, axis_name: str | None) -> Array:
        y = conv_layer(self.features, strides=self.strides, kernel_init=he_normal)(x)
        y = nn.relu(BatchNorm()(y, train, axis_name))
        y = BatchNorm()(conv_layer(self.features, kernel_init=he_normal)(y), train, axis_name)
        if x.shape != y.shape:
            x = conv_layer(self.features, 1, self.strides, kernel_init=he_normal, name="shortcut_conv")(x)
            x = BatchNorm(name="shortcut_norm")(x, train, axis_name)
        return nn.relu(x + y)


class WideResNet(nn.Module):
    """Pre-activation residual network of three stages; depth 34 and width 10 by default, no dropout.

    Attributes:
      num_classes: K.
      blocks: per stage; the network has depth 6 * blocks + 4.
      width: the stages have 16, 32 and 64 times as many channels.

    References: Zagoruyko & Komodakis 2016.

    Examples:
      >>> from deq_jax.models import WideResNet
      >>> network = WideResNet(num_classes=10, blocks=5, width=10)
      >>> 6 * network.blocks + 4  # WRN-34-10
      34
    """

    num_classes: int = 10
    blocks: int = 5
    width: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool = False, keys: Keys | None = None, axis_name: str | None = None) -> Array:
        """Logits [B, K] of images [B, H, W, C] in [0, 1]; `keys` are not used: nothing in it is random."""
        y = conv_layer(16, kernel_init=he_normal)(x)
        for stage in range(3):
            for block in range(self.blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                y = WideBlock(16 * 2**stage * self.width, strides)(y, train, axis_name)
        y = nn.relu(BatchNorm()(y, train, axis_name))
        return nn.Dense(self.num_classes)(jnp.mean(y, axis=(1, 2)))


class WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions; the shortcut is a 1x1 one, pre-activated, where channels change."""

    features: int
    strides: int

    @nn.compact
    def __call__(self, x: Array, train: bool, axis_name: str | None) -> Array:
        y = nn.relu(BatchNorm()(x, train, axis_name))
        if x.shape[-1] != self.features:
            x = conv_layer(self.features, 1, self.strides, kernel_init=he_normal, name="shortcut_conv")(y)
        y = conv_layer(self.features, strides=self.strides, kernel_init=he_normal)(y)
        y = nn.relu(BatchNorm()(y, train, axis_name))
        return x + conv_layer(self.features, kernel_init=he_normal)(y)
