"""The box [0, 1] in which all images lie."""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.core.errors import require
from deq_jax.core.types import AnyArray

BOX_TOLERANCE = 1e-6  # beyond 0 and 1, for rounding


def clip_to_box(x: AnyArray, where: str) -> AnyArray:
    """Images in [0, 1]: rounding errors are clipped, values farther outside are refused.

    Undoing a normalisation in float32 gives pixels such as -3e-8 or 1.0000001; images in other units are farther out.

    Args:
      x: images, floating, any shape, numpy or jax. Traced images are clipped without a check of their values.
      where: begins the message of an error.

    Returns:
      An array of the same kind, shape and dtype; x itself where nothing was outside.

    Raises:
      InputError: x is not floating, or has values beyond [-1e-6, 1 + 1e-6] or NaN.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.core import clip_to_box
      >>> clip_to_box(np.array([-1e-7, 0.5]), "mine.npz").tolist()
      [0.0, 0.5]
    """
    xp: ModuleType = jnp if isinstance(x, jax.Array) else np
    x = xp.asarray(x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)  # bfloat16 is none of numpy's
    require(floating, f"{where}: images must be floating in [0, 1], found {x.dtype}")
    if isinstance(x, jax.core.Tracer):
        return jnp.clip(x, 0, 1)
    if x.size == 0:
        return x
    low, high = (np.asarray(end)[()] for end in (x.min(), x.max()))
    inside = -BOX_TOLERANCE <= low <= high <= 1 + BOX_TOLERANCE  # false for NaN
    require(bool(inside), f"{where}: images must lie in [0, 1], found [{low!s}, {high!s}]")
    return x if low >= 0 and high <= 1 else xp.clip(x, 0, 1)
