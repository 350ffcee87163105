"""What is drawn depends on the seed and the image alone, whatever kind of keys JAX makes by default."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError, Keys, RandomIntermediateState
from deq_jax.core import prng_key
from deq_jax.core.keys import flat_draws
from tests.helpers import tiny

PACKAGE = Path(__file__).parents[2] / "deq_jax"


class TestKeys:
    @pytest.fixture(params=["threefry2x32", "rbg", "unsafe_rbg"])
    def default(self, request):
        before = jax.config.jax_default_prng_impl
        jax.config.update("jax_default_prng_impl", request.param)
        yield request.param
        jax.config.update("jax_default_prng_impl", before)

    @pytest.mark.parametrize("seed", [0, 7, -1, 2**40, np.int64(7), np.uint8(7), np.array(7), jnp.array(7)], ids=repr)
    def test_seeds(self, default, seed):
        expected = jax.random.key(np.uint32(int(seed) % 2**32), impl="threefry2x32")
        for key in (prng_key(seed), Keys.of(seed, 2).shared, jax.jit(lambda: prng_key(seed))()):
            assert key.dtype == expected.dtype
            np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))

    @pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey, lambda s: np.asarray(jax.random.PRNGKey(s))])
    def test_keys_of_a_seed_are_those_of_threefry(self, default, make):
        for key in (prng_key(make(7)), Keys.of(make(7), 2).shared, jax.jit(prng_key)(make(7))):
            np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(prng_key(7)))

    def test_draws(self, default):
        def draw(images, shared):
            keys = Keys(shared, jnp.array(images, jnp.int32)).fold(3)
            return keys.draw(lambda key: jax.random.uniform(key, (2,)))

        expected = draw([0, 1, 2, 3], jax.random.key(0, impl="threefry2x32"))
        np.testing.assert_array_equal(draw([0, 1, 2, 3], jax.random.key(0)), expected)
        np.testing.assert_array_equal(draw([2], jax.random.key(0)), expected[2:3])
        split = jax.random.split(jax.random.key(0))[1]  # of a kind that need not be threefry's
        np.testing.assert_array_equal(draw([2], split), draw([0, 1, 2], split)[2:])

    @pytest.mark.parametrize("shape", [(), (5,), (3, 3, 4, 8), (0, 2), (2, 2, 3)], ids=str)
    @pytest.mark.parametrize("draw", [jax.random.bits, jax.random.normal, jax.random.uniform])
    def test_flat_draws_are_the_same_numbers(self, default, draw, shape):
        key = prng_key(7)
        for change in (lambda key: key, lambda key: jax.random.fold_in(key, 3), lambda key: jax.random.split(key)[1]):
            expected = draw(change(key), shape)
            np.testing.assert_array_equal(draw(change(flat_draws(key)), shape), expected)

    def test_batches_and_devices(self, default):
        model = tiny.classifier(RandomIntermediateState(per_sample=True, best_so_far=False))
        x = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 8, 8, 1)), jnp.float32)
        variables = model.init(jax.random.key(0), x)
        chex.assert_trees_all_equal(variables, model.init(jax.random.key(0, impl="threefry2x32"), x))

        def masks(x, images):
            return model._encode(variables, x, True, Keys(jax.random.key(1), images), None)[0].masks

        whole = masks(x, jnp.arange(4))
        np.testing.assert_array_equal(masks(x[2:3], jnp.array([2])), whole[2:3])
        parts = jax.pmap(masks)(x[:, None], jnp.arange(4)[:, None])
        np.testing.assert_array_equal(parts[:, 0], whole)

    @pytest.mark.parametrize(
        "key", [True, 0.5, None, "0", [0, 1], np.bool_(True), np.zeros(2), np.zeros((3, 2), np.uint32)], ids=repr
    )
    def test_anything_else_is_refused(self, key):
        with pytest.raises(InputError, match="key: expected one PRNG key or an integer seed, got"):
            Keys.of(key, 2)

    def test_several_keys_are_refused(self):
        with pytest.raises(InputError, match=r"key: expected one PRNG key .* of shape \(2,\)"):
            Keys.of(jax.random.split(jax.random.key(0)), 2)

    def test_the_package_makes_keys_in_one_place(self):
        makers = [
            path.name for path in PACKAGE.rglob("*.py") if re.search(r"random\.(key|PRNGKey)\(", path.read_text())
        ]
        assert makers == ["keys.py"]


def test_keys_of_other_images_are_refused():
    given = Keys.of(0, 3)
    assert Keys.of(given, 3) is given
    for size in (2, 4):
        with pytest.raises(InputError, match=rf"keys: expected Keys of {size} images, got images of shape \(3,\)"):
            Keys.of(given, size)
