"""What a classifier's modules may be, and how their own randomness, statistics and parameters are kept."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Broyden, Dynamics, Equilibrium, Explicit, InputError, Keys, Predictor
from deq_jax.core import Injection, prng_key
from deq_jax.models import BatchNorm, ResNet18, SmallCNN, WideResNet, explicit_twin, mdeq
from deq_jax.training import initial_state, initial_variables
from tests.helpers import dense, tiny

SOLVER = Broyden(3, tolerance=0)
X = jnp.linspace(0, 1, 2 * 16).reshape(2, 4, 4, 1)
KEYS = Keys.of(0, 2)
BASE = dense.defence_of(SOLVER, every=3).base


class CellWith(nn.Module):
    """A cell with something that cells cannot have."""

    extra: str

    @nn.compact
    def __call__(self, z, u):
        z = nn.Dense(z.shape[-1])(z) + u.features
        if self.extra == "BatchNorm":
            return nn.BatchNorm(use_running_average=False)(z)
        if self.extra == "running BatchNorm":
            return nn.BatchNorm(use_running_average=True)(z)
        if self.extra == "Dropout":
            return nn.Dropout(0.5, deterministic=False)(z)
        self.variable("cache", "count", lambda: jnp.zeros(()))
        return z


class WithCache(nn.Module):
    """A network that has a collection of its own."""

    @nn.compact
    def __call__(self, x, *_):
        self.variable("cache", "count", lambda: jnp.zeros(()))
        return nn.Dense(dense.WIDTH)(x.reshape(len(x), -1))


class EncoderWithCache(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, keys=None, axis_name=None):
        return Injection(WithCache()(x))


class TestModules:
    @pytest.mark.parametrize("extra", ["BatchNorm", "running BatchNorm", "Dropout", "cache"])
    def test_a_cell_has_parameters_only(self, extra):
        model = replace(BASE, cell=CellWith(extra))
        message = {"Dropout": "CellWith: a cell draws nothing at random: dropout belongs in Injection.masks"}
        default = "CellWith: has variables of the kind (batch_stats|cache), but a cell has parameters only: GroupNorm"
        with pytest.raises(InputError, match=message.get(extra, default)):
            model.init(0, X)

    def test_others_have_batch_statistics_as_well_and_nothing_else(self):

        cases = [Explicit(WithCache()), replace(BASE, encoder=EncoderWithCache()), replace(BASE, decoder=WithCache())]
        for classifier in cases:
            with pytest.raises(InputError, match="of the kind cache, but a classifier has params and batch_stats only"):
                classifier.init(0, X)


class TestTrainingMode:
    """`initial_state` looks at it, so that no training starts that cannot make a step; there are 8 devices here."""

    @staticmethod
    def start(module):
        config = tiny.get_config(classifier=Explicit(module), pretrain_steps=0)
        return initial_state(config, config.optimizer.transformation(1), config.dataset.load())

    @pytest.mark.parametrize("norm", ["none", "all"])
    def test_layers_of_flax_are_accepted(self, norm):
        assert jax.tree.leaves(self.start(dense.Net(norm, classes=10)).params)

    def test_to_be_evaluated_a_network_needs_no_training_mode(self):
        config = tiny.get_config(classifier=Explicit(dense.Net("own", classes=10)), pretrain_steps=0)
        assert jax.tree.leaves(initial_variables(config, config.dataset.load()))

    def test_batch_statistics_are_those_of_all_devices(self):
        with pytest.raises(InputError, match="batch statistics are each of the 8 devices' own; average them over axis"):
            self.start(dense.Net("own", classes=10))

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda x, train, keys, axis_name: train and Keys.of(keys), "in training mode: .* missing 1 required"),
            (lambda x, train, keys, axis_name: train and x @ jnp.ones(3), "in training mode: "),
            (
                lambda x, train, keys, axis_name: train and jax.lax.pmean(x, "other"),
                "mode: .*axis name: other",
            ),
        ],
        ids=["signature", "shape", "axis"],
    )
    def test_mistakes_are_one_line(self, change, message):
        class Mistaken(nn.Module):
            @nn.compact
            def __call__(self, x, train=False, keys=None, axis_name=None):
                change(x, train, keys, axis_name)
                return nn.Dense(10)(x.reshape(len(x), -1))

        with pytest.raises(InputError, match=message) as caught:
            self.start(Mistaken())
        assert "\n" not in str(caught.value)

    def test_dropout_without_its_collection_is_one_line(self):
        with pytest.raises(InputError, match='Dropout_0 needs PRNG for "noise"; a module draws from'):
            self.start(dense.Net(collection="noise", classes=10))


class Plain(nn.Module):
    """As Flax's examples have it."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x.reshape(len(x), -1))


class InTraining(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(4)(x.reshape(len(x), -1)) * (2.0 if train else 1.0)


def test_a_module_may_leave_out_arguments_and_batch_stats():
    variables = Plain().init(jax.random.key(0), X)
    expected = Plain().apply(variables, X)
    assert set(variables) == {"params"}
    assert jnp.array_equal(Explicit(Plain())(variables, X).logits, expected)
    assert Explicit(Plain())(variables, X[:0]).logits.shape == (0, 4)
    assert jnp.array_equal(Explicit(InTraining())(variables, X, train=True).logits, 2 * expected)
    with pytest.raises(InputError, match=r"Explicit\(Plain\(...\)\) makes a classifier of a Flax module"):
        Predictor(Plain(), variables)


def test_a_module_that_is_called_otherwise_is_refused_in_one_line():
    class Mode(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Dense(4)(x.reshape(len(x), -1))

    class Renamed(nn.Module):
        @nn.compact
        def __call__(self, x, training, rngs, axis):  # only the order counts
            return nn.Dense(4)(x.reshape(len(x), -1))

    variables = Explicit(Plain()).init(0, X)
    words = r"Mode: expected a module called as \(x, train, keys, axis_name\), too many positional arguments"
    with pytest.raises(InputError, match=words):
        Explicit(Mode())(variables, X)
    decoder = replace(BASE, decoder=Mode())
    with pytest.raises(InputError, match=r"Mode: expected a module called as \(z, train, axis_name\), "):
        decoder({name: {**part, "decoder": {}} for name, part in BASE.init(0, X).items()}, X)
    assert Explicit(Renamed())(variables, X).logits.shape == (len(X), 4)


class TestDropoutOfFlax:
    NET = Explicit(dense.Net())

    def logits(self, x, keys, net=NET, train=True):
        return net(net.init(0, X), x, train=train, keys=keys).logits

    def test_drops_in_training_alone_and_by_the_keys(self):
        trained = self.logits(X, KEYS)
        np.testing.assert_array_equal(trained, self.logits(X, KEYS))
        for other in (self.logits(X, KEYS.fold(1)), self.logits(X, KEYS, train=False)):
            assert not np.allclose(trained, other)
        np.testing.assert_array_equal(self.logits(X, KEYS, train=False), self.logits(X, None, train=False))

    def test_masks_do_not_depend_on_the_batch_or_the_devices(self):
        x = jnp.concatenate([X, X, X, X])
        whole = self.logits(x, Keys.of(3, 8))
        alone = self.logits(x[5:6], Keys(prng_key(3), jnp.array([5])))
        np.testing.assert_allclose(alone[0], whole[5], rtol=1e-5, atol=1e-6)
        assert not np.allclose(whole[1], whole[3])  # the same image, drawn for on its own
        devices = jax.pmap(lambda x, number: self.logits(x, Keys(prng_key(3), number)))
        parts = devices(x.reshape(4, 2, *x.shape[1:]), jnp.arange(8).reshape(4, 2))
        np.testing.assert_allclose(parts.reshape(8, -1), whole, rtol=1e-5, atol=1e-6)

    def test_entries_are_dropped_at_the_rate(self):
        class Drop(nn.Module):
            @nn.compact
            def __call__(self, x, train=False, keys=None, axis_name=None):
                return nn.Dropout(0.25, broadcast_dims=(1,))(x[..., 0], deterministic=not train)

        net = Explicit(Drop())
        kept = net(net.init(0, X), jnp.ones((200, 4, 4, 1)), train=True, keys=Keys.of(0, 200)).logits
        np.testing.assert_allclose(np.unique(kept), [0, 4 / 3], rtol=1e-6)
        assert abs(float(kept.mean()) - 1) < 0.1
        np.testing.assert_array_equal(kept[:, :1] + 0 * kept, kept)  # one mask for all rows of an image

    @pytest.mark.slow
    def test_in_encoder_and_decoder_of_an_equilibrium(self):
        class Encoder(nn.Module):
            @nn.compact
            def __call__(self, x, train=False, keys=None, axis_name=None):
                return dense.Encoder()(nn.Dropout(0.5, deterministic=not train)(x), train, keys, axis_name)

        class Decoder(nn.Module):
            @nn.compact
            def __call__(self, z, train=False, axis_name=None):
                return dense.Decoder()(nn.Dropout(0.5, deterministic=not train)(z), train, axis_name)

        for model in (replace(BASE, encoder=Encoder()), replace(BASE, decoder=Decoder())):
            whole, clean = (self.logits(X, KEYS, model, train) for train in (True, False))
            assert not np.allclose(whole, clean)
            alone = self.logits(X[1:], Keys(KEYS.shared, KEYS.images[1:]), model)
            np.testing.assert_allclose(alone[0], whole[1], rtol=1e-4, atol=1e-5)

    def test_without_keys_or_of_another_collection_it_is_one_line(self):
        for net, keys in ((self.NET, None), (Explicit(dense.Net(collection="noise")), KEYS)):
            with pytest.raises(InputError, match=r"Dropout_0 needs PRNG for .*; a module draws from the collection"):
                self.logits(X, keys, net)


MODELS = {
    "small": tiny.classifier(),
    "cnn": Explicit(SmallCNN(10, 4)),
    "twin": explicit_twin(tiny.classifier(), depth=2),
    "mdeq": Equilibrium(*mdeq(3, (8, 8), (2, 2), 8), Dynamics(SOLVER)),
    "resnet": Explicit(ResNet18()),
    "wide": Explicit(WideResNet(blocks=1, width=1)),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_variables_are_in_single_precision_whatever_the_default(x64, model):
    variables = jax.eval_shape(model.init, prng_key(0), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_statistics_keep_their_precision(x64):
    norm = BatchNorm()
    x = jnp.ones((2, 3))
    assert x.dtype == jnp.float64
    updated = norm.apply(norm.init(prng_key(0), x, False), x, True, mutable=["batch_stats"])[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
