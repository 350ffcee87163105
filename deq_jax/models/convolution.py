"""Convolution with gradients that are fast inside loops on the CPU.

There XLA recognises the gradients of a convolution as convolutions only at the top level of a program; inside a
loop, where every solver and attack step lives, they fall onto a naive kernel that is 10 to 100 times slower.
`conv_general_dilated` has gradients that are fast there; on GPU and TPU it uses XLA's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.core.errors import require
from deq_jax.core.types import Array

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

Strides = tuple[int, int]

Padding = tuple[tuple[int, int], tuple[int, int]]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    """2D convolution with gradients that are fast inside loops on the CPU.

    Args:
      x: [B, H, W, I].
      kernel: [h, w, I, O].
      strides: along H and W.
      padding: (before, after) along H and W.

    Returns:
      [B, H', W', O].
    """
    return _native_conv(x, kernel, strides, padding)


def _native_conv(x: Array, kernel: Array, strides: Strides, padding: Padding) -> Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def _conv_forward(x: Array, kernel: Array, strides: Strides, padding: Padding) -> tuple[Array, tuple[Array, Array]]:
    return _native_conv(x, kernel, strides, padding), (x, kernel)


def _conv_backward(strides: Strides, padding: Padding, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    gradients: tuple[Array, Array] = lax.platform_dependent(
        *saved,
        dy,
        cpu=partial(loop_conv_gradients, strides, padding),
        default=partial(native_conv_gradients, strides, padding),
    )
    return gradients


conv.defvjp(_conv_forward, _conv_backward)


def native_conv_gradients(
    strides: Strides, padding: Padding, x: Array, kernel: Array, dy: Array
) -> tuple[Array, Array]:
    """(dx, dkernel) as XLA derives them."""
    vjp = jax.vjp(lambda x, kernel: _native_conv(x, kernel, strides, padding), x, kernel)[1]
    dx, dkernel = vjp(dy)
    return dx, dkernel


def loop_conv_gradients(strides: Strides, padding: Padding, x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
    """(dx, dkernel) as a forward convolution and as matrix products, which are fast inside loops."""
    return _input_gradient(strides, padding, x, kernel, dy), _kernel_gradient(strides, padding, x, kernel, dy)


def _input_gradient(strides: Strides, padding: Padding, x: Array, kernel: Array, dy: Array) -> Array:
    """Convolution of the (zero-stuffed) cotangent with the flipped kernel, its in and out axes swapped."""
    flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
    edges = [(0, 0, 0)]
    for axis in range(2):
        size, before = kernel.shape[axis], padding[axis][0]
        stuffed = (dy.shape[axis + 1] - 1) * strides[axis] + 1
        low = size - 1 - before
        edges.append((low, x.shape[axis + 1] - stuffed - low + size - 1, strides[axis] - 1))
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), [*edges, (0, 0, 0)])
    return conv(dy, flipped, (1, 1), ((0, 0), (0, 0)))


def _kernel_gradient(strides: Strides, padding: Padding, x: Array, kernel: Array, dy: Array) -> Array:
    height, width, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    if channels > features and strides == (1, 1) and height * width > 1:
        # A convolution that contracts over the batch: [I, H, W, B] * [H', W', B, O] -> [I, h, w, O].
        rows, columns = dy.shape[1] + height - 1, dy.shape[2] + width - 1
        images = x[:, :rows, :columns].transpose(3, 1, 2, 0)
        return conv(images, dy.transpose(1, 2, 0, 3), (1, 1), ((0, 0), (0, 0))).transpose(1, 2, 0, 3)
    patches = [
        x[
            :,
            i : i + strides[0] * (dy.shape[1] - 1) + 1 : strides[0],
            j : j + strides[1] * (dy.shape[2] - 1) + 1 : strides[1],
        ]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(patches, axis=-1).reshape(-1, height * width * channels)
    return (patches.T @ dy.reshape(-1, features)).reshape(kernel.shape)


def conv_general_dilated(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> Array:
    """Convolution behind the signature that ``nn.Conv(conv_general_dilated=...)`` calls; plain 2D NHWC only.

    Args:
      x: [B, H, W, I].
      kernel: [h, w, I, O].
      strides: along H and W.
      padding: "SAME", "VALID", or (before, after) along H and W.
      lhs_dilation, rhs_dilation, feature_group_count: must mean no dilation and no groups.
      dimension_numbers, precision: not used.

    Returns:
      [B, H', W', O].

    Raises:
      InputError: the convolution is dilated, grouped or not 2D.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from deq_jax.models import conv_general_dilated
      >>> x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
      >>> jax.eval_shape(lambda x, kernel: conv_general_dilated(x, kernel, (2, 2), "SAME"), x, kernel).shape
      (2, 4, 4, 4)
    """
    plain = x.ndim == 4 and feature_group_count == 1 and {*(lhs_dilation or ()), *(rhs_dilation or ())} <= {1}
    found = f"{lhs_dilation=}, {rhs_dilation=}, {feature_group_count=} of {x.ndim - 2}D images"
    require(plain, f"conv_general_dilated: expected a 2D convolution without dilation or groups, got {found}")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    padding = tuple((int(before), int(after)) for before, after in padding)
    return conv(x, kernel, tuple(strides), padding)
