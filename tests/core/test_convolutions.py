"""Convolutions inside loops: in the order of axes for which XLA has a fast kernel, with the same values."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deq_jax.core.convolutions import fast_in_loops

FAST = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
X = jax.random.normal(jax.random.key(0), (2, 6, 6, 2))
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 2, 4)) / 4


def conv(x, kernel=KERNEL, strides=(2, 2), axes=("NHWC", "HWIO", "NHWC"), **options):
    return lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=axes, **options)


def gradient(x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(conv(x)) ** 2))(x)


def looped(x):
    """Its convolutions lie within a loop, a branch, a call and a part that is computed again."""
    step = jax.checkpoint(lambda x: jax.jit(gradient)(x))
    second = jax.grad(lambda x: jnp.sum(step(x)))
    return lax.fori_loop(0, 2, lambda _, x: lax.cond(jnp.sum(x) > 1e6, jnp.sin, second, x), x)


def orders(function, platform="cpu"):
    text = jax.jit(function).trace(X).lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text))


@pytest.mark.parametrize("function", [gradient, looped])
def test_on_the_cpu_all_are_in_the_fast_order_and_elsewhere_as_they_were(function):
    assert len(orders(function)) > 1
    assert orders(fast_in_loops(function)) == {FAST}
    assert orders(fast_in_loops(function), "cuda") == orders(function, "cuda")


def test_values_and_derivatives_are_the_same():
    def everything(x, fast=lambda function: function):
        def first(x):
            return conv(x, KERNEL.transpose(3, 2, 0, 1), (1, 2), ("NCHW", "OIHW", "NCHW"), rhs_dilation=(2, 1))

        def line(x):
            return jnp.sum(conv(x[0], KERNEL[0], (2,), ("NHC", "HIO", "HNC")) ** 2)

        def groups(kernel):
            return jnp.sum(conv(x, kernel, feature_group_count=2) ** 2)

        return {
            "loop": fast(looped)(x),
            "second derivative": jax.grad(lambda x: jnp.sum(fast(gradient)(x) ** 2))(x),
            "mapped": jax.vmap(fast(gradient))(x[:, None]),
            "channels first": fast(first)(x.transpose(0, 3, 1, 2)),
            "one dimension": fast(jax.grad(line))(x),
            "groups": fast(jax.grad(groups))(KERNEL[:, :, :1]),
        }

    given, fast = jax.jit(everything)(X), jax.jit(partial(everything, fast=fast_in_loops))(X)
    for name, values in given.items():
        np.testing.assert_allclose(fast[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_program_with_nothing_to_do_stays_as_it_is():
    def function(x):
        x = lax.platform_dependent(x, cpu=jnp.tanh, default=gradient)
        return lax.scan(lambda x, _: (jnp.tanh(conv(x, KERNEL[..., :2], (1, 1))), None), x, length=2)[0]

    assert str(jax.make_jaxpr(fast_in_loops(function))(X)) == str(jax.make_jaxpr(function)(X))
