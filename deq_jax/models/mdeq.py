"""The multiscale deep equilibrium model (MDEQ): a state of several resolutions, fused in every step.

Branch i of the state has ``channels[i]`` channels at 1 / 2^i of the image's resolution. `mdeq_large` is of the
size of a ResNet-18, `mdeq_xl` the size of a WRN-34-10; `mdeq_small` is for small machines.

References: Bai et al. 2020 (Multiscale deep equilibrium models); Salimans & Kingma 2016 (weight normalisation).
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax.typing import DTypeLike

from deq_jax.core.errors import require
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array, Injection
from deq_jax.models.convolution import conv
from deq_jax.models.layers import PARAM_DTYPE, BatchNorm, GroupNorm, conv_layer, dropout_mask

HEAD_EXPANSION = 4

State = tuple[Array, ...]
"""Branches ``[B, H / 2^i, W / 2^i, channels[i]]``, finest first."""

_uniform = initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))

_normal = initializers.normal(0.01)


def _uniform_bias(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, *, fan_in: int) -> Array:
    return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)


class Mdeq(NamedTuple):
    """The three modules of a DEQ classifier: ``Equilibrium(*mdeq(...), dynamics=...)``.

    Examples:
      >>> from deq_jax import Broyden, Dynamics, Equilibrium
      >>> from deq_jax.models import mdeq_large
      >>> encoder, cell, decoder = mdeq_large()
      >>> Equilibrium(encoder, cell, decoder, Dynamics(Broyden(8))).cell.channels
      (32, 64, 128, 256)
    """

    encoder: nn.Module
    cell: nn.Module
    decoder: nn.Module


def mdeq(
    num_classes: int,
    channels: tuple[int, ...],
    head_channels: tuple[int, ...],
    final_channels: int,
    expansion: int = 5,
    dropout: float = 0.22,
) -> Mdeq:
    """MDEQ with any number of branches.

    Args:
      num_classes: K.
      channels: number in each branch, finest first; multiples of 8.
      head_channels: width of each branch's bottleneck in the head.
      final_channels: number of features that are averaged and classified.
      expansion: channels inside the cell's blocks, as a multiple.
      dropout: rate of the variational dropout inside the cell.

    Raises:
      InputError: no branch, or not one head width per branch, or a rate outside [0, 1).

    Examples:
      >>> from deq_jax.models import mdeq
      >>> modules = mdeq(num_classes=10, channels=(8, 16), head_channels=(4, 8), final_channels=32)
      >>> modules.cell.channels
      (8, 16)
    """
    require(len(channels) > 0, f"mdeq: channels: expected a number for each of at least one branch, got {channels!r}")
    one_each = len(head_channels) == len(channels)
    require(one_each, f"mdeq: head_channels needs one width per branch ({len(channels)}), got {head_channels}")
    divisible = all(width % MdeqCell.groups == 0 for width in channels)
    require(divisible, f"mdeq: channels must be multiples of {MdeqCell.groups}, got {channels}")
    require(0 <= dropout < 1, f"mdeq: dropout must be in [0, 1), got {dropout}")
    channels, head_channels = tuple(channels), tuple(head_channels)
    encoder = MdeqEncoder(channels, dropout)
    return Mdeq(encoder, MdeqCell(channels, expansion), MdeqDecoder(num_classes, head_channels, final_channels))


def mdeq_small(num_classes: int = 10, dropout: float = 0.0) -> Mdeq:
    """MDEQ with three narrow branches for small machines: 402,170 parameters with 10 classes.

    The state has 28,672 entries per 32x32 image.

    Examples:
      >>> from deq_jax.models import mdeq_small
      >>> mdeq_small(num_classes=10).cell.channels
      (16, 32, 64)
    """
    return mdeq(num_classes, (16, 32, 64), (8, 16, 32), 256, expansion=2, dropout=dropout)


def mdeq_large(num_classes: int = 10, dropout: float = 0.22) -> Mdeq:
    """MDEQ-LARGE: 11,097,438 parameters with 10 classes; 61,440 state entries per 32x32 image.

    Examples:
      >>> from deq_jax import Broyden, Dynamics, Equilibrium
      >>> from deq_jax.models import mdeq_large
      >>> model = Equilibrium(*mdeq_large(num_classes=100), dynamics=Dynamics(Broyden(8)))
      >>> model.decoder.num_classes
      100
    """
    return mdeq(num_classes, (32, 64, 128, 256), (14, 28, 56, 112), 1680, dropout=dropout)


def mdeq_xl(num_classes: int = 10, dropout: float = 0.22) -> Mdeq:
    """MDEQ-XL: 48,792,098 parameters with 10 classes; 138,240 state entries per 32x32 image.

    Examples:
      >>> from deq_jax.models import mdeq_xl
      >>> mdeq_xl(num_classes=10).cell.channels
      (72, 144, 288, 576)
    """
    return mdeq(num_classes, (72, 144, 288, 576), (20, 40, 80, 160), 1800, dropout=dropout)


class MdeqEncoder(nn.Module):
    """Image -> injection into the finest branch (zero for the others), and the dropout masks.

    Attributes:
      channels: number in each branch, finest first.
      dropout: rate of the variational dropout inside the cell.

    Examples:
      >>> from deq_jax.models import MdeqEncoder
      >>> MdeqEncoder(channels=(8, 16)).dropout
      0.22
    """

    channels: tuple[int, ...]
    dropout: float = 0.22

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, keys: Keys | None = None, axis_name: str | None = None
    ) -> Injection:
        """The injection of images, and in training their dropout masks; see `Equilibrium`.

        Args:
          x: [B, H, W, 3]; H and W divisible by 2^(branches - 1).

        Raises:
          InputError: an image that cannot be halved once per branch.
        """
        batch, height, width, _ = x.shape
        coarsest = 2 ** (len(self.channels) - 1)
        divisible = height % coarsest == 0 and width % coarsest == 0
        require(divisible, f"MDEQ: image height and width must be multiples of {coarsest}, got {height}x{width}")
        u = x
        for k in range(2):
            u = _conv(self.channels[0], name=f"stem_conv{k}")(u)
            u = nn.relu(BatchNorm(name=f"stem_norm{k}")(u, train, axis_name))
        if len(self.channels) > 2:
            u = _conv(self.channels[0], 1, name="injection_conv")(u)
            u = nn.relu(BatchNorm(name="injection_norm")(u, train, axis_name))
        others = [
            jnp.zeros((batch, height >> i, width >> i, channels), u.dtype)
            for i, channels in enumerate(self.channels)
            if i > 0
        ]
        if not train or self.dropout == 0 or keys is None:
            return Injection((u, *others))
        return Injection((u, *others), self._masks(keys, u.dtype))

    def _masks(self, keys: Keys, dtype: DTypeLike) -> State:
        masks = dropout_mask(keys, sum(self.channels), self.dropout, dtype)
        return tuple(jnp.split(masks, list(accumulate(self.channels))[:-1], axis=-1))


class MdeqCell(nn.Module):
    """One application of f(z; u): a residual block per branch, then every branch sums all of them.

    Attributes:
      channels: number in each branch, finest first; multiples of `groups`.
      expansion: channels inside the blocks, as a multiple.
      groups: number of groups of the normalisations.

    References: Bai et al. 2020, section 3.

    Examples:
      >>> from deq_jax.models import MdeqCell
      >>> MdeqCell(channels=(8, 16)).expansion
      5
    """

    channels: tuple[int, ...]
    expansion: int = 5
    groups: int = 8

    @nn.compact
    def __call__(self, z: State, u: Injection) -> State:
        """f(z; u).

        Args:
          z: state.
          u: injection, its features and masks (or None) one per branch.
        """
        masks = u.masks or (None,) * len(self.channels)
        branches = [
            MdeqBlock(channels, self.expansion, self.groups, name=f"block{i}")(z[i], u.features[i], masks[i])
            for i, channels in enumerate(self.channels)
        ]
        return tuple(self._fuse(i, branches) for i in range(len(branches)))

    def _fuse(self, i: int, branches: list[Array]) -> Array:
        """Branch i of the new state."""
        channels = self.channels[i]
        total = branches[i]
        for j, branch in enumerate(branches):
            if j > i:
                total += Upsample(channels, 2 ** (j - i), self.groups, name=f"fuse{j}_to_{i}")(branch)
            elif j < i:
                total += Downsample(channels, i - j, self.groups, name=f"fuse{j}_to_{i}")(branch)
        y = WeightNormConv(channels, 1, name=f"post_fuse{i}")(nn.relu(total))
        return GroupNorm(self.groups // 2, affine=False)(y)


class MdeqBlock(nn.Module):
    """Residual block of one branch, with injection and variational dropout."""

    channels: int
    expansion: int
    groups: int

    @nn.compact
    def __call__(self, z: Array, u: Array, mask: Array | None) -> Array:
        o = WeightNormConv(self.channels * self.expansion, 3, name="conv1")(z)
        o = nn.relu(GroupNorm(self.groups, name="norm1")(o))
        o = WeightNormConv(self.channels, 3, name="conv2")(o)
        if mask is not None:
            o = o * mask
        o = GroupNorm(self.groups, name="norm2")(o + u)
        return GroupNorm(self.groups, name="norm3")(nn.relu(o + z))


class Upsample(nn.Module):
    """Coarse to fine: 1x1 convolution, normalisation, nearest neighbours."""

    channels: int
    factor: int
    groups: int

    @nn.compact
    def __call__(self, z: Array) -> Array:
        y = GroupNorm(self.groups, name="norm")(_conv(self.channels, 1, name="conv")(z))
        batch, height, width, channels = y.shape
        y = jnp.broadcast_to(
            y[:, :, None, :, None], (batch, height, self.factor, width, self.factor, channels)
        )  # a broadcast: its gradient is a sum, not a scatter
        return y.reshape(batch, height * self.factor, width * self.factor, channels)


class Downsample(nn.Module):
    """Fine to coarse: `halvings` strided 3x3 convolutions, only the last one changing the channels."""

    channels: int
    halvings: int
    groups: int

    @nn.compact
    def __call__(self, z: Array) -> Array:
        y = z
        for k in range(self.halvings):
            last = k == self.halvings - 1
            y = _conv(self.channels if last else z.shape[-1], strides=2, name=f"conv{k}")(y)
            y = GroupNorm(self.groups, name=f"norm{k}")(y)
            y = y if last else nn.relu(y)
        return y


class WeightNormConv(nn.Module):
    """Convolution, size x size, with the kernel ``g v / ||v||``; no bias."""

    features: int
    size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        v = self.param("v", _uniform, (self.size, self.size, x.shape[-1], self.features), PARAM_DTYPE)
        g = self.param("g", lambda key: _norm(v))
        edge = (self.size // 2, self.size // 2)
        kernel = v * (g / _norm(v)).astype(v.dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel)  # as nn.Conv does
        return conv(x, kernel, (1, 1), (edge, edge))


def _norm(v: Array) -> Array:
    """Over all axes of v [h, w, I, O] but the output channel, [O]; at least in single precision."""
    v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return jnp.sqrt(jnp.sum(jnp.square(v), axis=(0, 1, 2)))


class MdeqDecoder(nn.Module):
    """State -> logits [B, K]: a bottleneck per branch, summed from fine to coarse, averaged over the image.

    Attributes:
      num_classes: K.
      head_channels: width of each branch's bottleneck.
      final_channels: number of features that are averaged and classified.

    Examples:
      >>> from deq_jax.models import MdeqDecoder
      >>> MdeqDecoder(num_classes=10, head_channels=(4, 8), final_channels=32).num_classes
      10
    """

    num_classes: int
    head_channels: tuple[int, ...]
    final_channels: int

    @nn.compact
    def __call__(self, z: State, train: bool = False, axis_name: str | None = None) -> Array:
        """Logits [B, K] of a state."""
        heads = [
            Bottleneck(channels, name=f"head{i}")(branch, train, axis_name)
            for i, (channels, branch) in enumerate(zip(self.head_channels, z, strict=True))
        ]
        y = heads[0]
        for i, head in enumerate(heads[1:]):
            y = _conv(head.shape[-1], strides=2, use_bias=True, name=f"merge_conv{i}")(y)
            y = head + nn.relu(BatchNorm(name=f"merge_norm{i}")(y, train, axis_name))
        y = _conv(self.final_channels, 1, use_bias=True, name="final_conv")(y)
        y = nn.relu(BatchNorm(name="final_norm")(y, train, axis_name))
        y = jnp.mean(y, axis=(1, 2))
        bias_init = partial(_uniform_bias, fan_in=y.shape[-1])
        return nn.Dense(self.num_classes, kernel_init=_uniform, bias_init=bias_init, name="classifier")(y)


class Bottleneck(nn.Module):
    """Residual bottleneck 1x1, 3x3, 1x1 of the head; its output has 4 x `channels`."""

    channels: int

    @nn.compact
    def __call__(self, z: Array, train: bool, axis_name: str | None) -> Array:
        features = self.channels * HEAD_EXPANSION
        y = z
        for k, (width, size) in enumerate(((self.channels, 1), (self.channels, 3), (features, 1)), start=1):
            y = _conv(width, size, name=f"conv{k}")(y)
            y = BatchNorm(affine=False, name=f"norm{k}")(y, train, axis_name)
            y = y if k == 3 else nn.relu(y)
        shortcut = _conv(features, 1, name="shortcut_conv")(z)
        return nn.relu(y + BatchNorm(name="shortcut_norm")(shortcut, train, axis_name))


def _conv(features: int, size: int = 3, strides: int = 1, use_bias: bool = False, *, name: str) -> nn.Conv:
    """A convolution without weight norm: kernel and bias start normal with standard deviation 0.01."""
    return conv_layer(features, size, strides, use_bias=use_bias, kernel_init=_normal, bias_init=_normal, name=name)
