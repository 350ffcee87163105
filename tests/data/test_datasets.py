"""Datasets, batches and augmentation."""

import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import InputError, Keys
from deq_jax.data import (
    Cifar,
    CropFlip,
    Digits,
    ImageFolder,
    Images,
    Npz,
    Splits,
    Tfds,
    batch_indices,
    class_names,
    evaluation_batches,
    hold_out,
    to_unit,
)
from deq_jax.data.datasets import load_splits


def numbered(size, shape=(2, 2, 1)):
    """Images that tell their number."""
    x = np.arange(size, dtype=np.float32).reshape(-1, 1, 1, 1) / size * np.ones(shape, np.float32)
    return Images(x, np.arange(size, dtype=np.int32))


@dataclass(frozen=True)
class Scaled:
    """Numbered images in three splits, times a factor."""

    factor: float

    def load(self):
        part = numbered(4)
        part = part._replace(x=self.factor * part.x, y=part.y.astype(np.int64))
        return Splits(part, part, part) if self.factor else part


def test_what_a_dataset_of_ones_own_loads_is_checked():
    splits = load_splits(Scaled(1.0))
    assert {part.y.dtype for part in splits} == {np.dtype(np.int32)}
    with pytest.raises(InputError, match=r"Scaled.load: train: images must lie in \[0, 1\], found"):
        load_splits(Scaled(255.0))
    with pytest.raises(InputError, match=r"Scaled.load: expected Splits\(train, validation, test\) of Images, got"):
        load_splits(Scaled(0.0))


class TestDigits:
    def test_split_sizes_and_types(self):
        splits = Digits().load()
        assert [part.x.shape for part in splits] == [(n, 8, 8, 1) for n in (1149, 288, 360)]
        assert [part.y.shape for part in splits] == [(1149,), (288,), (360,)]
        assert all(part.x.dtype == np.float32 and part.y.dtype == np.int32 for part in splits)
        assert all(part.x.min() == 0 and part.x.max() == 1 for part in splits)
        assert all(set(part.y) == set(range(10)) for part in splits)

    def test_splits_are_disjoint_and_complete(self):
        images = [image.tobytes() for part in Digits().load() for image in part.x]
        assert len(set(images)) == len(images) == 1797

    def test_splits_are_fixed(self):
        first, second = Digits().load(), Digits().load()
        jax.tree.map(np.testing.assert_array_equal, first, second)
        assert [part.y[:8].tolist() for part in first] == FIRST_LABELS

    def test_are_those_of_scikit_learn(self):
        datasets = pytest.importorskip("sklearn.datasets")
        expected = datasets.load_digits()
        parts = Digits().load()
        assert labelled(np.concatenate([part.x[..., 0] for part in parts]) * 16, [y for p in parts for y in p.y]) == (
            labelled(expected.images, expected.target)
        )


FIRST_LABELS = [[6, 0, 9, 6, 3, 6, 9, 6], [5, 8, 5, 8, 6, 9, 2, 7], [6, 6, 6, 2, 5, 6, 6, 2]]


def labelled(images, labels):
    return sorted((image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_hold_out_takes_the_same_images_every_time():
    data = numbered(100)
    rest, held = hold_out(data, 30)
    assert (len(rest.y), len(held.y)) == (70, 30)
    assert set(rest.y) | set(held.y) == set(range(100))
    np.testing.assert_array_equal(hold_out(data, 30)[1].y, held.y)
    np.testing.assert_array_equal(held.x[:, 0, 0, 0], np.float32(held.y) / np.float32(100))  # labels go along


class TestBatches:
    def epoch(self, number, seed=0, size=10, batch_size=3):
        steps = size // batch_size
        return [batch_indices(size, batch_size, seed, number * steps + i).tolist() for i in range(steps)]

    def test_every_image_at_most_once_an_epoch(self):
        for number in range(5):
            batches = self.epoch(number)
            assert [len(batch) for batch in batches] == [3, 3, 3]
            assert len({i for batch in batches for i in batch} & set(range(10))) == 9

    def test_all_images_once_where_batches_divide_them(self):
        assert sorted(i for batch in self.epoch(2, size=12) for i in batch) == list(range(12))

    def test_order_is_a_function_of_seed_and_step_alone(self):
        assert self.epoch(3) == self.epoch(3)
        late_first = batch_indices(10, 3, 0, 11), batch_indices(10, 3, 0, 0)
        np.testing.assert_array_equal(late_first[0], self.epoch(3)[2])
        np.testing.assert_array_equal(late_first[1], self.epoch(0)[0])

    def test_order_differs_between_epochs_and_seeds(self):
        orders = [self.epoch(number, seed) for number in range(3) for seed in range(3)]
        assert len({str(order) for order in orders}) == 9

    @pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
    def test_evaluation_sees_every_image_once(self, size, batch_size):
        data = numbered(size)
        batches = evaluation_batches(data, batch_size)
        assert {len(leaf) for batch in batches for leaf in batch} == {batch_size}
        seen = np.concatenate([batch.number[~batch.is_padding] for batch in batches])
        np.testing.assert_array_equal(seen, np.arange(size))
        for batch in batches:
            np.testing.assert_array_equal(batch.y, data.y[batch.number])
            np.testing.assert_array_equal(batch.x, data.x[batch.number])


def test_to_unit():
    np.testing.assert_allclose(to_unit(jnp.array([0, 51, 255], jnp.uint8)), np.float32([0, 0.2, 1]), rtol=1e-6)
    np.testing.assert_array_equal(to_unit(jnp.array([0, 0.25, 1], jnp.float16)), np.float32([0, 0.25, 1]))
    assert to_unit(jnp.array([1], jnp.uint8)).dtype == to_unit(jnp.array([1.0], jnp.float16)).dtype == jnp.float32


def npz(folder, **changes):
    """An npz file of 20 + 6 grey images of 5x4 pixels in 3 classes, with some arrays replaced or (None) left out."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, size in (("train", 20), ("test", 6)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (size, 5, 4, 1), np.uint8)
        arrays[f"y_{part}"] = np.arange(size) % 3
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(folder / "images.npz", **arrays)
    return str(folder / "images.npz"), arrays


MESSAGES = {
    "npy": "expected arrays .*; missing x_train",
    "folder": r"cannot be read \(Is a directory\)",
    "absent": r"images\.npz: no such npz file",
}


class TestNpz:
    @pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64], ids=lambda kind: kind.__name__)
    @pytest.mark.parametrize("is_grey", [False, True], ids=["HWC", "HW"])
    def test_round_trip(self, tmp_path, kind, is_grey):
        def converted(size, channels):
            x = np.random.default_rng(size).integers(0, 256, (size, 5, 4, channels))
            x = x[..., 0] if is_grey else x
            return x.astype(np.uint8) if kind is np.uint8 else (x / 255).astype(kind)

        path, arrays = npz(tmp_path, x_train=converted(20, 3), x_test=converted(6, 3))
        splits = Npz(path, validation=0.25).load()
        shape = (5, 4, 1) if is_grey else (5, 4, 3)
        assert [part.x.shape for part in splits] == [(15, *shape), (5, *shape), (6, *shape)]
        assert {part.x.dtype for part in splits} == {np.dtype(np.uint8 if kind is np.uint8 else np.float32)}
        assert {part.y.dtype for part in splits} == {np.dtype(np.int32)}
        expected = arrays["x_test"].astype(splits.test.x.dtype)
        np.testing.assert_array_equal(splits.test.x.reshape(expected.shape), expected)
        np.testing.assert_array_equal(splits.test.y, arrays["y_test"])
        given = zip(arrays["x_train"].astype(expected.dtype), arrays["y_train"], strict=True)
        kept = [(x.tobytes(), y) for part in splits[:2] for x, y in zip(*part, strict=True)]
        assert sorted(kept) == sorted((x.tobytes(), y) for x, y in given)

    def test_holds_out_at_least_one_image(self, tmp_path):
        assert len(Npz(npz(tmp_path)[0], validation=0.001).load().validation.y) == 1

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"y_test": None}, ["expected arrays x_train, y_train, x_test, y_test", "missing y_test"]),
            ({"x_train": np.zeros((20, 5))}, ["train", "[N, H, W, C]", "(20, 5)"]),
            (
                {"x_test": np.zeros((6, 5, 5, 1))},
                ["expected images of one shape, x_train has (5, 4, 1), x_test (5, 5, 1)"],
            ),
            ({"y_train": np.zeros(19, int)}, ["train", "20 images", "(19,)"]),
            ({"y_train": np.zeros((20, 3), int)}, ["one label per image", "(20, 3)"]),
            ({"y_test": np.zeros(6)}, ["test", "integers", "float64"]),
            ({"y_test": np.array([0, 1, 2, -1, 0, 0])}, ["test", "from 0", "-1 to 2"]),
            ({"y_test": np.array([0, 1, 2, 2**32, 0, 0])}, ["test", "from 0", "0 to 4294967296"]),
            ({"x_train": np.full((20, 5, 4, 1), 1.5)}, ["train", "[0, 1]", "[1.5, 1.5]"]),
            ({"x_train": np.full((20, 5, 4, 1), -0.5)}, ["train", "[0, 1]", "[-0.5, -0.5]"]),
            ({"x_train": np.full((20, 5, 4, 1), np.nan)}, ["train", "[0, 1]", "[nan, nan]"]),
            ({"x_train": np.zeros((20, 5, 4, 1), int)}, ["train", "uint8 or floating", "int64"]),
            ({"x_test": np.zeros((0, 5, 4, 1)), "y_test": np.zeros(0, int)}, ["test", "no images"]),
            ({"x_test": np.zeros((6, 5, 0, 1))}, ["test", "images without pixels", "(6, 5, 0, 1)"]),
            ({"x_train": np.array([{}] * 20)}, ["cannot be read"]),  # would need pickle
            ({"y_train": np.array([None] * 20)}, ["cannot be read"]),
            ({"y_train": np.zeros((20, 1), int)}, ["one label per image", "(20, 1)"]),
            ({"y_train": np.full(20, "cat")}, ["train", "labels must be integers", "<U3"]),
            ({"y_train": np.ones(20, bool)}, ["train", "labels must be integers", "bool"]),
            ({"x_train": np.full((20, 5, 4, 1), np.inf)}, ["train", "[0, 1]", "[inf, inf]"]),
            ({"x_train": np.full((20, 5, 4, 1), 255.0)}, ["train", "[0, 1]", "[255.0, 255.0]"]),
            ({"x_train": np.full((20, 5, 4, 1), -2.98e-5, np.float32)}, ["[0, 1]", "[-2.98e-05, -2.98e-05]"]),
            ({"x_train": np.full((20, 5, 4, 1), np.float32(1.000002))}, ["[0, 1]", "[1.000002, 1.000002]"]),
            ({"x_train": np.zeros((20, 5, 4, 1), np.uint16)}, ["train", "uint8 or floating", "uint16"]),
            ({"x_train": np.zeros((20, 5, 4, 1), bool)}, ["train", "uint8 or floating", "bool"]),
            ({"x_train": np.zeros((20, 5, 4, 1), np.complex64)}, ["train", "uint8 or floating", "complex64"]),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_refuses(self, tmp_path, changes, words):
        path, _ = npz(tmp_path, **changes)
        with pytest.raises(InputError) as raised:
            Npz(path).load()
        assert [word for word in [path, *words] if word not in str(raised.value)] == []

    @pytest.mark.parametrize("kind", [np.float32, np.float64], ids=lambda kind: kind.__name__)
    def test_rounding_at_the_edges_of_the_box_is_clipped(self, tmp_path, kind):
        """Undoing a normalisation in float32 leaves a pixel at -2.98e-8."""
        x = np.full((6, 5, 4, 1), 0.5, kind)
        x[0, 0, 0], x[1, 0, 0] = (np.float32(0) - 0.4465) / 0.2010 * 0.2010 + 0.4465 - 2.98e-8, 1.0000001
        path, _ = npz(tmp_path, x_test=x)
        found = Npz(path).load().test.x
        assert found.dtype == np.float32 and (found[0, 0, 0, 0], found[1, 0, 0, 0]) == (0, 1)
        np.testing.assert_array_equal(found.ravel()[1:20], x.ravel()[1:20].astype(np.float32))

    @pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (1, 28, 28), (3, 32, 48), (3, 2, 5)], ids=str)
    @pytest.mark.parametrize("kind", [np.uint8, np.float32], ids=lambda kind: kind.__name__)
    def test_channels_first_are_refused_or_transposed(self, tmp_path, shape, kind):
        x = np.random.default_rng(0).integers(0, 2, (26, *shape)).astype(kind)
        path, _ = npz(tmp_path, x_train=x[:20], x_test=x[20:])
        with pytest.raises(InputError) as raised:
            Npz(path).load()
        words = f"{path}: train", "looks like [N, C, H, W]", str((20, *shape)), 'channels="first"', 'channels="last"'
        assert [word for word in words if word not in str(raised.value)] == []
        np.testing.assert_array_equal(Npz(path, channels="first").load().test.x, x[20:].transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(Npz(path, channels="last").load().test.x, x[20:])

    @pytest.mark.parametrize(
        "shape", [(3, 3, 3), (3, 8, 1), (1, 28, 3), (3, 32, 4), (8, 8, 8), (3, 1, 64), (3, 8)], ids=str
    )
    def test_channels_last_are_not_suspected(self, tmp_path, shape):
        x = np.zeros((26, *shape), np.uint8)
        path, _ = npz(tmp_path, x_train=x[:20], x_test=x[20:])
        assert Npz(path).load().test.x.shape[:3] == (6, *shape[:2])

    def test_channels_is_first_or_last(self):
        with pytest.raises(InputError, match="channels must be 'last', 'first' or None, got 'NCHW'"):
            Npz("images.npz", channels="NCHW")

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "deflated", "text", "empty", "npy", "absent", "folder"])
    def test_refuses_damaged_files(self, tmp_path, damage):
        path, arrays = npz(tmp_path)
        good = Path(path).read_bytes()
        middle = good.index(arrays["x_train"].tobytes()) + 100
        with BytesIO() as buffer:
            np.savez_compressed(buffer, **arrays)
            deflated = buffer.getvalue()
        content = {
            "truncated": good[: len(good) // 2],
            "flipped": good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :],
            "deflated": deflated[:60] + b"\xff" * 40 + deflated[100:],
            "text": b"not an archive",
            "empty": b"",
        }
        if damage in content:
            Path(path).write_bytes(content[damage])
        elif damage == "npy":
            with open(path, "wb") as file:
                np.save(file, arrays["x_train"])
        else:
            Path(path).unlink()
            if damage == "folder":
                Path(path).mkdir()
        with pytest.raises(InputError, match=MESSAGES.get(damage, "cannot be read as an npz file")):
            Npz(path).load()


@pytest.mark.parametrize("dataset", [Cifar, ImageFolder, Npz])
def test_a_path_that_a_config_leaves_open_must_be_set(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{dataset.__name__}: path is not set; name the files, as in --set dataset"):
        dataset("").load()


@pytest.mark.parametrize("dataset", [Npz, Tfds])
@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_share_is_checked(dataset, share):
    with pytest.raises(InputError, match=rf"{dataset.__name__}: validation .*\(0, 1\), got {share}"):
        dataset("mnist", validation=share)


class TestCropFlip:
    """Of images whose pixels all differ, so that a crop tells where it was taken."""

    padding = 2
    x = np.arange(1, 1 + 40 * 6 * 5 * 2, dtype=np.float32).reshape(40, 6, 5, 2)

    def augmented(self, key=0, rows=slice(None), padding=padding):
        keys = Keys(jax.random.key(key), jnp.arange(len(self.x), dtype=jnp.int32)[rows])
        return np.asarray(jax.jit(CropFlip(padding))(self.x[rows], keys))

    def test_gives_crops_of_the_padded_image_possibly_flipped(self):
        seen = set()
        for image, result in zip(self.x, self.augmented(), strict=True):
            padded = np.pad(image, ((self.padding,) * 2, (self.padding,) * 2, (0, 0)))
            crops = {
                (top, left, flip): padded[top : top + 6, left : left + 5][:, :: -1 if flip else 1]
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
            }
            found = [place for place, crop in crops.items() if np.array_equal(crop, result)]
            assert len(found) == 1
            seen |= set(found)
        tops, lefts, flips = (set(values) for values in zip(*seen, strict=True))
        assert (tops, lefts, flips) == (set(range(5)), set(range(5)), {False, True})

    def test_without_padding_only_flips(self):
        for image, result in zip(self.x, self.augmented(padding=0), strict=True):
            assert np.array_equal(result, image) or np.array_equal(result, image[:, ::-1])

    def test_same_keys_same_result(self):
        np.testing.assert_array_equal(self.augmented(), self.augmented())
        assert not np.array_equal(self.augmented(key=0), self.augmented(key=1))

    def test_does_not_depend_on_the_rest_of_the_batch(self):
        np.testing.assert_array_equal(self.augmented(rows=slice(7, 12)), self.augmented()[7:12])

    def test_compiled_or_not(self):
        keys = Keys.of(jax.random.key(0), len(self.x))
        np.testing.assert_array_equal(CropFlip(self.padding)(jnp.asarray(self.x), keys), self.augmented())


@pytest.fixture(scope="module")
def tfds():
    import tensorflow_datasets  # noqa: PLC0415 (seconds to import)

    return tensorflow_datasets


class TestTfds:
    @pytest.mark.parametrize(
        ("name", "shape", "classes"),
        [
            ("cifar10", (32, 32, 3), 10),
            ("cifar100", (32, 32, 3), 100),
            ("svhn_cropped", (32, 32, 3), 10),
            ("mnist", (28, 28, 1), 10),
            ("fashion_mnist", (28, 28, 1), 10),
        ],
    )
    def test_reads_images_and_labels_without_tensorflow(self, tfds, name, shape, classes):
        had_tensorflow = "tensorflow" in sys.modules
        with tfds.testing.mock_data(num_examples=20):
            splits = Tfds(name, validation=0.25).load()
        assert [part.x.shape for part in splits] == [(15, *shape), (5, *shape), (20, *shape)]
        assert all(part.x.dtype == np.uint8 and part.y.dtype == np.int32 for part in splits)
        assert all(part.y.min() >= 0 and part.y.max() < classes for part in splits)
        assert had_tensorflow or "tensorflow" not in sys.modules

    def test_tells_how_to_prepare(self, tmp_path):
        folder = str(tmp_path / "nothing here")
        with pytest.raises(InputError) as raised:
            Tfds("cifar10", data_dir=folder).load()
        message = str(raised.value)
        assert "Tfds: cifar10" in message
        assert (
            'pip install tensorflow importlib_resources && python -c "import tensorflow_datasets as tfds; ' in message
        )
        assert f"tfds.builder('cifar10', file_format='array_record', data_dir={folder!r}).download_and_prepare()\"" in (
            message
        )

    @pytest.mark.parametrize("name", ["no_such_dataset", "cifar-10", ""])
    def test_refuses_unknown_names(self, name):
        with pytest.raises(InputError, match=f"no usable dataset named '{name}'"):
            Tfds(name).load()

    @pytest.mark.parametrize("name", ["penguins", "cats_vs_dogs"])  # no images; images of many sizes
    def test_refuses_what_cannot_be_stacked(self, tfds, name):
        expected = f"Tfds {name} train: expected examples with an image, all of one size, and a label"
        with tfds.testing.mock_data(num_examples=2), pytest.raises(InputError, match=expected):
            Tfds(name).load()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # tensorflow's own
@pytest.mark.parametrize("has_test", [True, False], ids=["two-splits", "one-split"])
def test_tfds_reads_what_was_prepared_on_disk(tmp_path, tfds, has_test):
    pytest.importorskip("tensorflow")
    x, y = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), np.uint8), np.arange(30) % 4

    class Patches(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc, name-defined]
        """Random images; made here, read back by their name and folder."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(6, 5, 3)), "label": tfds.features.ClassLabel(num_classes=4)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            parts = {"train": range(20), "test": range(20, 30)} if has_test else {"train": range(20)}
            return {part: self._generate_examples(numbers) for part, numbers in parts.items()}

        def _generate_examples(self, numbers):
            for i in numbers:
                yield i, {"image": x[i], "label": int(y[i])}

    dataset = Tfds("patches", validation=0.25, data_dir=str(tmp_path))
    with pytest.raises(InputError, match="no usable dataset named 'patches', data_dir="):
        dataset.load()
    Patches(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    if not has_test:
        with pytest.raises(InputError, match="Tfds patches: expected a split test, found train"):
            dataset.load()
        return
    splits = dataset.load()
    assert [len(part.y) for part in splits] == [15, 5, 10]
    read = [(image.tobytes(), label) for part in splits for image, label in zip(*part, strict=True)]
    assert sorted(read) == sorted((image.tobytes(), label) for image, label in zip(x, y, strict=True))


@dataclass(frozen=True)
class Named:
    class_names: Any


def test_class_names_are_strings():
    assert class_names(Named(["cat", "dog"])) == ("cat", "dog")
    for names, words in ((None, "None"), ((1, 2), "a tuple of 1, 2"), (str.upper, "a method_descriptor")):
        with pytest.raises(InputError, match=rf"Named.class_names: expected a tuple of the names, got {words}"):
            class_names(Named(names))
