"""MDEQ and the deep baselines: sizes, names, shapes, initialisation, equivariance to batching."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Broyden, Dynamics, Equilibrium, Explicit, InputError, Keys, Phantom
from deq_jax.core import Injection
from deq_jax.interop import from_torch, to_torch
from deq_jax.interop.mdeq_names import IGNORED
from deq_jax.models import ResNet18, WideResNet, mdeq, mdeq_large, mdeq_small, mdeq_xl
from tests.helpers.cases import mostly_slow

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGES = jnp.zeros((1, 32, 32, 3))
DYNAMICS = Dynamics(Broyden(2, tolerance=0.0), gradient=Phantom(1))
TINY = mdeq(10, (8, 16, 32, 64), (4, 8, 16, 32), final_channels=64, expansion=2)


def small(branches, dropout=0.5):
    """A classifier with few channels, for 16x16 images."""
    modules = mdeq(3, (8, 16, 24)[:branches], (2, 3, 4)[:branches], final_channels=5, expansion=1, dropout=dropout)
    return Equilibrium(*modules, DYNAMICS)


def shapes_of(classifier):
    return jax.eval_shape(classifier.init, jax.random.key(0), IMAGES)


def size(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (3, 16, 16, 3))


@pytest.fixture(scope="module", params=mostly_slow([1, 2, 3], 1))
def branched(request, images):
    """A classifier with that many branches, and its variables."""
    classifier = small(request.param)
    return classifier, jax.jit(classifier.init)(jax.random.key(0), images)


@pytest.mark.parametrize(
    "modules, parameters",
    [(TINY, 391_490), (mdeq_small(10), 402_170), (mdeq_large(10), 11_097_438), (mdeq_xl(10), 48_792_098)],
)
def test_mdeq_sizes(modules, parameters):
    assert size(shapes_of(Equilibrium(*modules, DYNAMICS))) == parameters


@pytest.mark.parametrize("module, parameters", [(ResNet18(10), 11_173_962), (WideResNet(10), 46_160_474)])
def test_baseline_sizes(module, parameters):
    assert size(shapes_of(Explicit(module))) == parameters


@pytest.mark.parametrize("modules, state_size", [(mdeq_small(), 28_672), (mdeq_large(), 61_440), (mdeq_xl(), 138_240)])
def test_state_sizes(modules, state_size):
    u, _ = jax.eval_shape(modules.encoder.init_with_output, jax.random.key(0), IMAGES)
    assert sum(leaf.size for leaf in u.features) == state_size


@pytest.mark.parametrize("name, modules", [("LARGE", mdeq_large(10)), ("XL", mdeq_xl(10))])
def test_torch_names_and_shapes(name, modules):
    entries = [line.split(" ", 2)[1:] for line in (GOLDEN / f"shapes_{name}.txt").read_text().splitlines()[1:]]
    table = {entry: tuple(int(n) for n in shape.strip("(), ").split(",") if n) for entry, shape in entries}
    zeros = {entry: np.broadcast_to(np.float32(0), shape) for entry, shape in table.items()}
    variables = from_torch(zeros, shapes_of(Equilibrium(*modules, DYNAMICS)))
    arrays = to_torch(variables)
    assert {entry: array.shape for entry, array in arrays.items()} == {
        entry: shape for entry, shape in table.items() if not entry.endswith(IGNORED)
    }


def random_variables(classifier):
    """Random numbers in the shapes of the classifier's variables."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), shapes_of(classifier))


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_torch_names_round_trip(branches):
    variables = random_variables(small(branches))
    arrays = to_torch(variables)
    assert len(arrays) == len(jax.tree.leaves(variables))
    returned = from_torch(arrays | {f"downsample.1.{IGNORED}": np.array(7)}, variables)
    assert jax.tree.structure(returned) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, returned, variables)
    again = to_torch(returned)
    assert all((again[name] == array).all() for name, array in arrays.items())


def test_torch_names_mismatch():
    variables = random_variables(small(2))
    arrays = to_torch(variables) | {"stray": np.zeros(2), "classifier.bias": np.zeros(4)}
    del arrays["downsample.0.weight"]
    expected = r"1 missing: downsample.0.weight; 1 unexpected: stray; 1 mis-shaped: classifier.bias \(4,\)"
    with pytest.raises(InputError, match=expected):
        from_torch(arrays, variables)
    with pytest.raises(InputError, match=r"missing: .* more; .*mis-shaped: .* instead of "):
        from_torch(arrays, shapes_of(Equilibrium(*TINY, DYNAMICS)))


def test_shapes_and_batch_independence(branched, images):
    classifier, variables = branched
    predict = jax.jit(classifier)
    prediction = predict(variables, images)
    assert prediction.logits.shape == (3, 3)
    branches = len(classifier.cell.channels)
    expected = [(3, 16 >> i, 16 >> i, channels) for i, channels in enumerate((8, 16, 24)[:branches])]
    assert [leaf.shape for leaf in prediction.solution.z] == expected
    others = predict(variables, images.at[1:].set(0))
    for a, b in zip(prediction.solution.z, others.solution.z, strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=2e-5)
        assert not np.allclose(a[1], b[1], atol=1e-2)
    np.testing.assert_allclose(prediction.logits[0], others.logits[0], atol=1e-5)


@pytest.mark.slow
def test_cell_jit_and_weight_norm():
    """Jit changes nothing; neither does the length of v, since the kernel is g v / ||v||; g scales it."""
    cell = small(2).cell
    z = tuple(jax.random.normal(jax.random.key(i), (2, 8 >> i, 8 >> i, 8 << i)) for i in range(2))
    u = Injection(z)
    variables = jax.jit(cell.init)(jax.random.key(0), z, u)
    apply = jax.jit(cell.apply)
    eager = cell.apply(variables, z, u)

    def scaled(entry, factor):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * factor if path[-1].key == entry else leaf, variables
        )

    for same in (apply(variables, z, u), apply(scaled("v", 3.0), z, u)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager, same)
    other = apply(scaled("g", 3.0), z, u)
    assert not any(np.allclose(a, b, atol=1e-3) for a, b in zip(eager, other, strict=True))


def test_training_uses_masks_and_updates_statistics(branched, images):
    classifier, variables = branched
    keys = Keys.of(jax.random.key(5), 3)
    own = {collection: parts["encoder"] for collection, parts in variables.items()}
    u, _ = classifier.encoder.apply(own, images, True, keys, None, mutable=["batch_stats"])
    assert [mask.shape for mask in u.masks] == [(3, 1, 1, leaf.shape[-1]) for leaf in u.features]
    assert {float(value) for mask in u.masks for value in np.unique(mask)} == {0.0, 2.0}
    z = jax.tree.map(jnp.ones_like, u.features)
    params = variables["params"]["cell"]
    masked, plain = (classifier.cell.apply({"params": params}, z, v) for v in (u, u._replace(masks=None)))
    assert all(not np.allclose(a, b) for a, b in zip(masked, plain, strict=True))
    prediction = jax.jit(classifier, static_argnames="train")(variables, images, train=True, keys=keys)
    before, after = (
        to_torch(variables | {"batch_stats": stats}) for stats in (variables["batch_stats"], prediction.batch_stats)
    )
    assert all((before[name] != after[name]).any() for name in before if "running_mean" in name)


def test_initialisation(branched):
    _, variables = branched
    arrays = to_torch(variables)
    for name, array in arrays.items():
        module, entry = name.rsplit(".", 1)
        if entry == "weight_g":
            v = arrays[f"{module}.weight_v"]
            np.testing.assert_allclose(array.ravel(), np.linalg.norm(v.reshape(len(v), -1), axis=1), rtol=1e-5)
        elif entry == "weight_v" or module == "classifier":
            bound = arrays[f"{module}.{entry}".replace("bias", "weight")][0].size ** -0.5
            assert bound * (1 - 6 / array.size) < np.abs(array).max() <= bound
            assert np.abs(np.mean(array)) < 5 * bound / np.sqrt(3 * array.size)
        elif arrays[f"{module}.weight" if entry in ("weight", "bias") else name].ndim == 4:  # convolutions
            assert np.std(array) == pytest.approx(0.01, rel=5 / np.sqrt(2 * array.size))
        else:
            assert (array == (1.0 if entry in ("weight", "running_var") else 0.0)).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("module", [WideResNet(3, blocks=1, width=1), ResNet18(3)], ids=["wide", "resnet18"])
def test_baselines_run(module, images):
    classifier = Explicit(module)
    variables = jax.jit(classifier.init)(jax.random.key(0), images)
    prediction = jax.jit(classifier, static_argnames="train")(variables, images, train=True)
    assert prediction.logits.shape == (3, 3) and np.isfinite(prediction.logits).all()
    changed = jax.tree.map(lambda a, b: (a != b).any(), variables["batch_stats"], prediction.batch_stats)
    assert all(jax.tree.leaves(changed))
    evaluated = jax.jit(classifier)(variables, images)
    np.testing.assert_allclose(evaluated.logits[:1], jax.jit(classifier)(variables, images[:1]).logits, atol=1e-4)


def test_errors():
    with pytest.raises(InputError, match="at least one branch"):
        mdeq(10, (), (), 8)
    with pytest.raises(InputError, match="one width per branch"):
        mdeq(10, (8, 16), (4,), 8)
    with pytest.raises(InputError, match="multiples of 8"):
        mdeq(10, (8, 12), (4, 4), 8)
    with pytest.raises(InputError, match="multiples of 4, got 30x32"):
        small(3).init(jax.random.key(0), jnp.zeros((1, 30, 32, 3)))
