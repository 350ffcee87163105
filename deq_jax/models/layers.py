"""Layers that the models share: convolution, normalisation, variational dropout. Images are NHWC."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import lax

from deq_jax.core.errors import require
from deq_jax.core.keys import Keys
from deq_jax.core.types import Array
from deq_jax.models.convolution import conv_general_dilated

NORM_EPSILON = 1e-5

PARAM_DTYPE = jnp.float32  # under any default; `jax_enable_x64` changes it


def conv_layer(
    features: int,
    size: int = 3,
    strides: int = 1,
    *,
    use_bias: bool = False,
    kernel_init: initializers.Initializer = nn.linear.default_kernel_init,
    bias_init: initializers.Initializer = initializers.zeros,
    name: str | None = None,
) -> nn.Conv:
    """nn.Conv, size x size, padded by size // 2 on every side (as PyTorch does), without bias by default.

    Args:
      features: number of output channels.
      size: side of the kernel.
      strides: along height and width.
      use_bias: learn a bias.
      kernel_init, bias_init: initialisers of Flax.
      name: name of the module.

    Examples:
      >>> from deq_jax.models import conv_layer
      >>> conv_layer(16, size=3).padding
      ((1, 1), (1, 1))
    """
    edge = (size // 2, size // 2)
    return nn.Conv(
        features,
        (size, size),
        (strides, strides),
        (edge, edge),
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class GroupNorm(nn.Module):
    """Group normalisation over height, width and the channels of a group; variance in two passes.

    Sums run over the image first and over a group's channels after, which is several times faster on
    the CPU than a reduction over a regrouped image.

    Attributes:
      groups: must divide the channels.
      affine: learn a scale and a bias.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax.core import prng_key
      >>> from deq_jax.models import GroupNorm
      >>> variables = jax.eval_shape(lambda: GroupNorm(groups=4).init(prng_key(0), jnp.ones((2, 4, 4, 8))))
      >>> variables["params"]["scale"].shape
      (8,)
    """

    groups: int = 8
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C] -> the same shape."""
        channels = x.shape[-1]
        divides = channels % self.groups == 0
        require(divides, f"GroupNorm: {channels} channels do not divide into {self.groups} groups")

        def group_mean(x: Array) -> Array:
            means = jnp.mean(x, axis=(1, 2)).reshape(len(x), self.groups, channels // self.groups).mean(axis=-1)
            return jnp.repeat(means, channels // self.groups, axis=1)[:, None, None]

        dtype = x.dtype
        x = x.astype(jnp.promote_types(dtype, jnp.float32))  # statistics of half precision would be too coarse
        x = x - group_mean(x)
        gain = lax.rsqrt(group_mean(jnp.square(x)) + NORM_EPSILON)
        if self.affine:
            gain *= self.param("scale", initializers.ones, (channels,), PARAM_DTYPE)
            x = x * gain + self.param("bias", initializers.zeros, (channels,), PARAM_DTYPE)
        else:
            x = x * gain
        return x.astype(dtype)


class BatchNorm(nn.Module):
    """Batch normalisation, synchronised over the devices of a mapped axis.

    Running averages move by 0.1 a step and hold the unbiased variance, as in PyTorch.

    Attributes:
      affine: learn a scale and a bias.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax.core import prng_key
      >>> from deq_jax.models import BatchNorm
      >>> variables = jax.eval_shape(lambda: BatchNorm().init(prng_key(0), jnp.ones((2, 4, 4, 3)), train=False))
      >>> variables["batch_stats"]["mean"].shape
      (3,)
    """

    affine: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool, axis_name: str | None = None) -> Array:
        """Normalises over all axes but the last.

        Args:
          x: [B, ..., C].
          train: use the statistics of the batch and update the running ones.
          axis_name: mapped axis of the devices that share the batch.
        """
        like_features = x.shape[-1:], PARAM_DTYPE
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, *like_features)
        running_var = self.variable("batch_stats", "var", jnp.ones, *like_features)
        mean, var = running_mean.value, running_var.value
        if train:
            axes = tuple(range(x.ndim - 1))
            average: Callable[[Array], Array] = (
                (lambda value: lax.pmean(value, axis_name)) if axis_name else (lambda value: value)
            )
            mean = average(jnp.mean(x, axes))
            var = average(jnp.mean(jnp.square(x - mean), axes))
            if not self.is_initializing():
                count = x.size // x.shape[-1] * (lax.axis_size(axis_name) if axis_name else 1)
                unbiased = var * (count / max(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    moved = 0.9 * running.value + 0.1 * lax.stop_gradient(new)
                    running.value = moved.astype(running.value.dtype)
        y = (x - mean) * lax.rsqrt(var + NORM_EPSILON)
        if self.affine:
            y = y * self.param("scale", initializers.ones, *like_features)
            y = y + self.param("bias", initializers.zeros, *like_features)
        return y


def dropout_mask(keys: Keys, channels: int, rate: float, dtype: Any) -> Array:
    """One variational channel mask per image, [B, 1, 1, channels]: 0 or 1 / (1 - rate).

    Args:
      keys: one per image.
      channels: number of channels.
      rate: share of the channels that is dropped, in [0, 1).
      dtype: dtype of the mask.

    Examples:
      >>> import jax.numpy as jnp
      >>> from deq_jax import Keys
      >>> from deq_jax.models import dropout_mask
      >>> dropout_mask(Keys.of(0, batch_size=2), channels=3, rate=0.5, dtype=jnp.float32).shape
      (2, 1, 1, 3)
    """
    keep = keys.draw(lambda key: jax.random.bernoulli(key, 1 - rate, (1, 1, channels)))
    return keep.astype(dtype) / (1 - rate)


def dropout_by_image(keys: Keys | None) -> AbstractContextManager[Any]:
    """Within it, Flax's ``nn.Dropout`` draws the mask of each image [b, ...] of a batch by the image's number.

    So neither the batch nor the number of devices changes a mask. A mask that the batch shares stays as Flax draws it.

    Args:
      keys: keys of the batch; None if nothing is drawn.
    """
    if keys is None:
        return nullcontext()

    def draw(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        dropout = context.module
        if type(dropout) is not nn.Dropout or not args or len(args) > 2 or kwargs.get("rng") is not None:
            return call(*args, **kwargs)
        x, *rest = args
        shared = {axis % x.ndim for axis in dropout.broadcast_dims}
        if len(x) != len(keys.images) or 0 in shared or not dropout.has_rng(dropout.rng_collection):
            return call(*args, **kwargs)
        each = keys._replace(shared=dropout.make_rng(dropout.rng_collection)).each()
        alone, options = dropout.clone(parent=None), {name: kwargs[name] for name in kwargs if name != "rng"}
        return jax.vmap(lambda row, key: alone.apply({}, row[None], *rest, rng=key, **options)[0])(x, each)

    return nn.intercept_methods(draw)
