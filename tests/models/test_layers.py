"""Convolution gradients against XLA's own, normalisations against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deq_jax import InputError, Keys
from deq_jax.models import BatchNorm, GroupNorm, conv_layer, convolution, dropout_mask
from deq_jax.models.convolution import conv

# in, out, image height and width, kernel, stride, padding
CASES = [
    (3, 8, (6, 5), 3, 1, 1),
    (8, 3, (6, 5), 3, 1, 1),
    (4, 6, (8, 8), 3, 2, 1),
    (6, 4, (7, 9), 3, 2, 1),
    (5, 7, (4, 4), 1, 1, 0),
    (5, 7, (5, 5), 1, 2, 0),
    (7, 2, (9, 8), 5, 1, 0),
    (4, 4, (8, 6), 3, 2, 0),
]


def arrays(case, dtype=np.float64):
    channels, features, size, kernel, stride, edge = case
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, channels)), dtype)
    weights = jnp.asarray(rng.normal(size=(kernel, kernel, channels, features)), dtype)
    return x, weights, (stride, stride), ((edge, edge), (edge, edge))


def native(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("case", CASES, ids=str)
class TestConv:
    def test_value_and_gradients(self, x64, case):
        x, kernel, strides, padding = arrays(case)
        y, vjp = jax.vjp(lambda x, kernel: native(x, kernel, strides, padding), x, kernel)
        np.testing.assert_array_equal(conv(x, kernel, strides, padding), y)
        dy = jnp.asarray(np.random.default_rng(1).normal(size=y.shape))
        expected = vjp(dy)
        mine = jax.vjp(lambda x, kernel: conv(x, kernel, strides, padding), x, kernel)[1](dy)
        for path in (convolution.loop_conv_gradients, convolution.native_conv_gradients):
            for got, want in zip(path(strides, padding, x, kernel, dy), expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
        for got, want in zip(mine, expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)

    @pytest.mark.slow
    def test_second_derivatives_in_a_scan(self, x64, case):
        x, kernel, strides, padding = arrays(case)

        def penalty(function, x, kernel):
            """A squared vector-Jacobian product, as in Jacobian regularisation, summed in a loop."""

            def add(total, scale):
                y, vjp = jax.vjp(lambda x: jnp.sin(function(scale * x, kernel, strides, padding)), x)
                return total + jnp.sum(vjp(jnp.ones_like(y))[0] ** 2), None

            return lax.scan(add, 0.0, jnp.array([1.0, 0.5]))[0]

        got, want = (jax.grad(penalty, argnums=(1, 2))(function, x, kernel) for function in (conv, native))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_conv_under_vmap_and_in_float32():
    x, kernel, strides, padding = arrays(CASES[2], np.float32)

    def gradient(function):
        return jax.vmap(jax.grad(lambda x: jnp.sum(function(x[None], kernel, strides, padding) ** 2)))(x)

    np.testing.assert_allclose(gradient(conv), gradient(native), rtol=1e-4, atol=1e-4)
    assert conv(x, kernel, strides, padding).dtype == jnp.float32


def test_conv_layer_pads_like_pytorch_and_has_no_bias():
    x = jnp.ones((1, 8, 8, 3))
    layer = conv_layer(4, strides=2)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    assert set(variables["params"]) == {"kernel"}
    np.testing.assert_allclose(y, native(x, kernel, (2, 2), ((1, 1), (1, 1))), rtol=1e-6)


def test_conv_refuses_what_it_does_not_do():
    grouped = nn.Conv(4, (3, 3), feature_group_count=2, conv_general_dilated=convolution.conv_general_dilated)
    with pytest.raises(InputError, match="without dilation or groups"):
        grouped.init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))


@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_is_flax_group_norm(x64, affine):
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(2, 5, 4, 12)))
    mine = GroupNorm(4, affine)
    flax = nn.GroupNorm(4, epsilon=1e-5, use_fast_variance=False, use_bias=affine, use_scale=affine)
    params = {"params": {"scale": jnp.arange(1.0, 13), "bias": jnp.arange(12.0)}} if affine else {}

    def value(module):
        return lambda x: jnp.sum(jnp.sin(module.apply(params, x)))

    np.testing.assert_allclose(mine.apply(params, x), flax.apply(params, x), rtol=1e-10)
    np.testing.assert_allclose(jax.grad(value(mine))(x), jax.grad(value(flax))(x), rtol=1e-8, atol=1e-10)


def test_group_norm_needs_channels_that_divide():
    with pytest.raises(InputError, match="10 channels do not divide into 4 groups"):
        GroupNorm(4).init(jax.random.key(0), jnp.ones((1, 2, 2, 10)))


def test_batch_norm_uses_and_updates_statistics(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(6, 5, 4, 3)))
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)
    y, updated = norm.apply(variables, x, True, mutable=["batch_stats"])
    flat = np.asarray(x).reshape(-1, 3)
    np.testing.assert_allclose(y, (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-6)
    stats = {"params": variables["params"], "batch_stats": updated["batch_stats"]}
    running = updated["batch_stats"]
    expected = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    np.testing.assert_allclose(norm.apply(stats, x, False), expected, rtol=1e-6)


def test_batch_norm_is_synchronised_over_devices():
    x = jnp.asarray(np.random.default_rng(0).normal(2, 3, size=(16, 4, 4, 3)), jnp.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    whole, stats = norm.apply(variables, x, True, mutable=["batch_stats"])

    def on_device(x):
        return norm.apply(variables, x, True, "batch", mutable=["batch_stats"])

    parts, synced = jax.pmap(on_device, "batch")(x.reshape(8, 2, 4, 4, 3))
    np.testing.assert_allclose(parts.reshape(x.shape), whole, rtol=1e-4, atol=1e-5)
    for device in range(8):
        got = jax.tree.map(lambda leaf, device=device: leaf[device], synced)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, stats)


def test_dropout_masks_are_per_image_and_channel():
    masks = dropout_mask(Keys.of(jax.random.key(0), 400), 10, 0.25, jnp.float32)
    assert masks.shape == (400, 1, 1, 10)
    np.testing.assert_allclose(np.unique(masks), [0, 4 / 3], rtol=1e-6)
    assert abs(float(masks.mean()) - 1) < 0.05
    alone = dropout_mask(Keys(jax.random.key(0), jnp.array([7])), 10, 0.25, jnp.float32)
    np.testing.assert_array_equal(alone[0], masks[7])
