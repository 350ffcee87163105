"""The box of images: rounding at its edges is clipped, other units are refused with digits that show why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError
from deq_jax.core import clip_to_box


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, jnp.bfloat16], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_what_lies_inside_is_returned_itself(kind, xp):
    x = xp.asarray(np.array([0, 0.5, 1]).astype(kind))
    assert clip_to_box(x, "here") is x
    assert clip_to_box(x[:0], "here").shape == (0,)


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_rounding_is_clipped(xp):
    x = xp.asarray(np.float32([-1e-6, -2.98e-8, 0.25, 1.0000001, 1.000001]))
    clipped = clip_to_box(x, "here")
    assert isinstance(clipped, np.ndarray) == (xp is np)
    np.testing.assert_array_equal(clipped, np.float32([0, 0, 0.25, 1, 1]), strict=xp is np)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([-2.98e-5, 1], "[-2.98e-05, 1.0]"),
        ([0, 1.000002], "[0.0, 1.000002]"),
        ([0, 255], "[0.0, 255.0]"),
        ([-2.25, 2.75], "[-2.25, 2.75]"),
        ([0.5, np.nan], "[nan, nan]"),
        ([0.5, np.inf], "[0.5, inf]"),
    ],
)
@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_other_units_are_refused(xp, values, found):
    with pytest.raises(InputError) as raised:
        clip_to_box(xp.asarray(np.float32(values)), "here")
    assert str(raised.value) == f"here: images must lie in [0, 1], found {found}"


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.bool_, np.complex64, object])
def test_what_is_not_floating_is_refused(kind):
    with pytest.raises(InputError, match=rf"here: images must be floating in \[0, 1\], found {np.dtype(kind)}"):
        clip_to_box(np.zeros(3, kind), "here")


def test_traced_images_are_clipped_without_a_check():
    clipped = jax.jit(lambda x: clip_to_box(x, "here"))(jnp.array([-3.0, 0.5, 2.0, jnp.nan]))
    np.testing.assert_array_equal(clipped, [0, 0.5, 1, np.nan])
