"""Image files in a folder for each class."""

import os

import numpy as np
import pytest
from PIL import Image

from deq_jax import InputError
from deq_jax.core import WriteError
from deq_jax.data import ImageFolder

CLASSES = ("cat", "dog", "owl")


def save(path, value=0, size=(6, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(
        mode, size, value if mode in ("L", "P", "I;16") else (value,) * len(Image.new(mode, (1, 1)).getbands())
    ).save(path)


def make(top, parts=("train", "test"), count=5, **options):
    """A folder of images, each of one colour: ten times its class, and its number."""
    for part in parts:
        for label, name in enumerate(CLASSES):
            for i in range(count):
                save(top / part / name / f"{i}.png", 10 * label + i, **options)
    return top


def test_images_and_labels_of_a_folder_with_both_parts(tmp_path):
    splits = ImageFolder(str(make(tmp_path)), validation=0.2).load()
    assert [part.x.shape for part in splits] == [(12, 6, 6, 3), (3, 6, 6, 3), (15, 6, 6, 3)]
    for part in splits:
        assert part.x.dtype == np.uint8
        assert (part.x // 10 == part.y[:, None, None, None]).all()  # labels go along with the images
    train = np.concatenate([splits.train.x, splits.validation.x])[:, 0, 0, 0]
    assert sorted(train) == sorted(splits.test.x[:, 0, 0, 0]) == sorted(10 * c + i for c in range(3) for i in range(5))


def test_one_folder_is_split_alike_every_time(tmp_path):
    dataset = ImageFolder(str(make(tmp_path, parts=("",), count=10)), test=0.3, validation=1 / 3)
    first, second = dataset.load(), dataset.load()
    assert [len(part.y) for part in first] == [14, 7, 9]
    assert len({int(x) for part in first for x in part.x[:, 0, 0, 0]}) == 30
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.x, b.x)


def test_the_first_images_of_each_part_are_of_all_classes(tmp_path):
    dataset = ImageFolder(str(make(tmp_path, count=20)), validation=0.5)
    for part in dataset.load():
        assert len(np.unique(part.y[:12])) == len(CLASSES)
        assert (part.x[:, 0, 0, 0] // 10 >= part.y).all()  # labels go along with the images
    np.testing.assert_array_equal(dataset.load().test.x, dataset.load().test.x)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_test_images(tmp_path, name):
    assert len(ImageFolder(str(make(tmp_path, parts=("train", name)))).load().test.y) == 15


def test_class_names_are_in_the_order_of_the_labels(tmp_path):
    dataset = ImageFolder(str(make(tmp_path)))
    assert dataset.class_names == CLASSES
    test = dataset.load().test
    assert {CLASSES[label] for label in test.y[test.x[:, 0, 0, 0] >= 20]} == {"owl"}


def test_what_is_no_image_is_passed_over_and_links_are_followed(tmp_path):
    plain = ImageFolder(str(make(tmp_path / "plain"))).load()
    other = make(tmp_path / "other")
    (other / "train" / ".hidden").mkdir()
    save(other / "train" / "cat" / ".DS_Store.png")
    save(other / "train" / "cat" / ".thumbnails" / "0.png")
    (other / "train" / "cat" / "README.txt").write_text("cats")
    (other / "README.md").write_text("animals")
    (other / "train" / "dog").rename(tmp_path / "elsewhere")
    (other / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "4.png").rename(tmp_path / "moved.png")
    (tmp_path / "elsewhere" / "4.png").symlink_to(tmp_path / "moved.png")
    for a, b in zip(plain, ImageFolder(str(other)).load(), strict=True):
        np.testing.assert_array_equal(a.x, b.x)


def test_images_within_folders_of_a_class(tmp_path):
    top = make(tmp_path)
    save(top / "train" / "cat" / "images" / "5.png")
    assert len(ImageFolder(str(top), validation=0.5).load().train.y) == 8


def test_a_link_to_a_folder_above_repeats_no_image(tmp_path):
    top = make(tmp_path)
    (top / "train" / "cat" / "again").symlink_to(top / "train" / "cat")
    assert len(ImageFolder(str(top), validation=1 / 3).load().train.y) == 10


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    top = make(tmp_path)
    monkeypatch.setattr("pathlib.Path.iterdir", refuse)
    with pytest.raises(InputError, match=r"train: cannot be read \(Permission denied\)"):
        ImageFolder(str(top)).load()


def test_size_scales_and_crops_in_the_middle(tmp_path):
    top = make(tmp_path)
    Image.fromarray(np.tile(np.repeat([0, 100, 200], 6), (6, 1)).astype(np.uint8)).save(top / "test" / "cat" / "0.png")
    found = ImageFolder(str(top), size=6, colours="grey").load().test
    wide = found.x[np.flatnonzero((found.x == 100).all((1, 2, 3)))]
    assert wide.shape == (1, 6, 6, 1)


def test_colours_converts(tmp_path):
    top = make(tmp_path, mode="L")
    assert ImageFolder(str(top)).load().test.x.shape == (15, 6, 6, 1)
    assert ImageFolder(str(top), colours="rgb").load().test.x.shape == (15, 6, 6, 3)
    save(top / "test" / "cat" / "0.png", 7, mode="RGBA")
    assert ImageFolder(str(top), colours="grey").load().test.x.shape == (15, 6, 6, 1)


class TestCache:
    def test_it_is_read_in_the_place_of_the_files(self, tmp_path):
        dataset = ImageFolder(str(make(tmp_path / "a")), cache=str(tmp_path / "cache.npz"))
        first = dataset.load()
        path = tmp_path / "a" / "train" / "cat" / "0.png"
        status = path.stat()
        path.write_bytes(b"?" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        for a, b in zip(first, dataset.load(), strict=True):
            np.testing.assert_array_equal(a.x, b.x)

    @pytest.mark.parametrize("change", ["file", "name", "size"])
    def test_it_is_made_again_when_something_changed(self, tmp_path, change):
        top, cache = make(tmp_path / "a"), str(tmp_path / "cache.npz")
        ImageFolder(str(top), cache=cache).load()
        if change == "file":
            save(top / "test" / "cat" / "0.png", 255)
        if change == "name":
            (top / "test" / "cat" / "0.png").rename(top / "test" / "cat" / "9.png")
        size = 4 if change == "size" else None
        cached, fresh = (ImageFolder(str(top), cache=c, size=size).load().test for c in (cache, None))
        np.testing.assert_array_equal(cached.x, fresh.x)

    def test_another_file_is_not_written_over(self, tmp_path):
        np.savez(tmp_path / "mine.npz", x=np.ones(3))
        content = (tmp_path / "mine.npz").read_bytes()
        with pytest.raises(InputError, match="is not a cache of ImageFolder"):
            ImageFolder(str(make(tmp_path / "a")), cache=str(tmp_path / "mine.npz")).load()
        assert (tmp_path / "mine.npz").read_bytes() == content

    def test_where_it_cannot_be_written(self, tmp_path):
        with pytest.raises(WriteError, match=r"cache\.npz: cannot be written \(No such file or directory\)"):
            ImageFolder(str(make(tmp_path)), cache=str(tmp_path / "none" / "cache.npz")).load()


def damaged(top):
    path = top / "test" / "owl" / "3.png"
    path.write_bytes(path.read_bytes()[:40])


def no_image(top):
    (top / "test" / "owl" / "3.png").write_text("owl")


def remove(path):
    for below in path.rglob("*"):
        if below.is_file():
            below.unlink()
    for below in [*sorted(path.rglob("*"), reverse=True), path]:
        below.rmdir()


def both(act):
    return lambda top: [act(top / part) for part in ("train", "test")]


def without_images(top):
    remove(top / "test" / "dog")
    (top / "test" / "dog").mkdir()


def another(name="owl/3.png", **options):
    return lambda top: save(top / "test" / name, **options)


MISTAKES = {
    "no folder": (remove, "no such folder of images"),
    "a file": (lambda top: (remove(top), top.write_text("x")), "no such folder of images"),
    "nothing in it": (both(remove), "expected a folder for each class, found none"),
    "one class": (both(lambda part: [remove(part / name) for name in CLASSES[1:]]), "found only cat"),
    "no classes in train": (lambda top: [remove(top / "train" / name) for name in CLASSES], "found none"),
    "train alone": (lambda top: remove(top / "test"), "has train, but none of test, val"),
    "test alone": (lambda top: remove(top / "train"), "but no folder train beside it"),
    "two test folders": (lambda top: make(top, parts=("val",)), "found test and val"),
    "a class that only train has": (lambda top: remove(top / "test" / "dog"), "only in train: dog; only in test: none"),
    "a class that only test has": (another("yak/0.png"), "only in test: yak"),
    "an empty class": (without_images, "dog: the class has no images"),
    "a damaged image": (damaged, "3.png: cannot be read as an image"),
    "text called png": (no_image, "3.png: cannot be read as an image"),
    "sizes that differ": (another(size=(6, 8)), r"has 6 x 8 pixels.*size=32"),
    "grey among colour": (another(mode="L"), 'is grey, and .* is colour; .*colours="rgb"'),
    "transparency": (another(mode="RGBA"), 'found RGBA; .*colours="rgb"'),
    "sixteen bits": (another(mode="I;16"), "found I;16"),
    "a link to nowhere": (lambda top: (top / "test/owl/9.png").symlink_to("nowhere"), "9.png: cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(tmp_path, mistake):
    top = make(tmp_path / "images")
    spoil, message = MISTAKES[mistake]
    spoil(top)
    with pytest.raises(InputError, match=message) as refused:
        ImageFolder(str(top)).load()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0.0}, "validation must be a share"),
        ({"test": 1.0}, "test must be a share"),
        ({"size": 0}, "size must be a positive number"),
        ({"size": 3.5}, "size must be a positive number"),
        ({"size": True}, "size must be a positive number"),
        ({"colours": "bgr"}, "colours must be 'rgb', 'grey' or None"),
    ],
)
def test_settings_that_are_none(settings, message):
    with pytest.raises(InputError, match=message):
        ImageFolder("images", **settings)
