"""CIFAR from the archives and folders that people have."""

import os
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from deq_jax import InputError
from deq_jax.data import Cifar, class_names

TEN = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUNDRED = tuple(f"class_{i:02}" for i in range(100))
RECORDS = np.random.default_rng(0).integers(0, 256, (24, 3072), np.uint8)  # four for each of six files


def pickled(value):
    return pickle.dumps(value, protocol=2)  # as in the archives


def python_ten(top):
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        value = {
            b"batch_label": b"a",
            b"labels": [i, 1, 2, 9],
            b"data": RECORDS[4 * i : 4 * i + 4],
            b"filenames": [b"a.png"] * 4,
        }
        (top / name).write_bytes(pickled(value))
    (top / "batches.meta").write_bytes(pickled({b"num_vis": 3072, b"label_names": [name.encode() for name in TEN]}))
    return "cifar-10-batches-py", TEN


def binary_ten(top):
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        labels = np.array([[i], [1], [2], [9]], np.uint8)
        (top / name).write_bytes(np.hstack([labels, RECORDS[4 * i : 4 * i + 4]]).tobytes())
    (top / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    return "cifar-10-batches-bin", TEN


def python_hundred(top):
    for name, first, last in (("train", 0, 20), ("test", 20, 24)):
        labels = list(range(first, last))
        value = {b"fine_labels": labels, b"coarse_labels": [0] * len(labels), b"data": RECORDS[first:last]}
        (top / name).write_bytes(pickled(value))
    meta = {b"fine_label_names": [name.encode() for name in HUNDRED], b"coarse_label_names": [b"all"]}
    (top / "meta").write_bytes(pickled(meta))
    return "cifar-100-python", HUNDRED


def binary_hundred(top):
    for name, first, last in (("train.bin", 0, 20), ("test.bin", 20, 24)):
        labels = np.stack([np.zeros(last - first), np.arange(first, last)], 1).astype(np.uint8)
        (top / name).write_bytes(np.hstack([labels, RECORDS[first:last]]).tobytes())
    (top / "fine_label_names.txt").write_text("\n".join(HUNDRED))
    return "cifar-100-binary", HUNDRED


KINDS = [python_ten, binary_ten, python_hundred, binary_hundred]


def make(top, kind, packed):
    top.mkdir()
    name, _ = kind(top)
    if not packed:
        return str(top)
    archive = top.parent / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(top, arcname=name)
    return str(archive)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_form_has_the_same_images(tmp_path, kind, packed):
    dataset = Cifar(make(tmp_path / "files", kind, packed), validation=0.25)
    splits = dataset.load()
    assert [part.x.shape for part in splits] == [(15, 32, 32, 3), (5, 32, 32, 3), (4, 32, 32, 3)]
    np.testing.assert_array_equal(splits.test.x, RECORDS[20:].reshape(4, 3, 32, 32).transpose(0, 2, 3, 1))
    hundred = kind in (python_hundred, binary_hundred)
    assert splits.test.y.tolist() == ([20, 21, 22, 23] if hundred else [5, 1, 2, 9])
    train = {x.tobytes(): int(y) for part in splits[:2] for x, y in zip(part.x, part.y, strict=True)}
    for i, record in enumerate(RECORDS[:20]):  # each keeps its label
        expected = i if hundred else [i // 4, 1, 2, 9][i % 4]
        assert train[record.reshape(3, 32, 32).transpose(1, 2, 0).tobytes()] == expected
    assert dataset.class_names == (HUNDRED if hundred else TEN)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def replace(name, content):
    return lambda top: (top / name).write_bytes(content)


def copied(top):
    (top / "copy").mkdir()
    (top / "copy" / "test_batch").write_bytes((top / "test_batch").read_bytes())


MISTAKES = {
    "missing file": (python_ten, lambda top: (top / "data_batch_3").unlink(), "incomplete, data_batch_3 missing"),
    "no file": (python_ten, lambda top: [path.unlink() for path in top.iterdir()], "expected the files of CIFAR"),
    "cut short": (binary_ten, replace("test_batch.bin", b"\0" * 3000), "test_batch.bin is damaged: 3000 bytes"),
    "empty": (binary_ten, replace("test_batch.bin", b""), "test_batch.bin is damaged: 0 bytes"),
    "damaged pickle": (python_ten, replace("test_batch", b"\x80\x02}q"), "test_batch cannot be read as plain data"),
    "hostile pickle": (python_ten, replace("test_batch", pickled(Hostile())), "test_batch cannot be .* not plain data"),
    "no dict": (python_ten, replace("test_batch", pickled([1])), "test_batch: expected a dict, found a list"),
    "no data": (python_ten, replace("test_batch", pickled({b"labels": [1]})), "expected data of shape"),
    "no labels": (python_ten, replace("test_batch", pickled({b"data": RECORDS})), "expected labels, a list"),
    "two kinds": (python_ten, python_hundred, "holds more than one version of CIFAR; name one of them"),
    "two copies": (python_ten, copied, "holds test_batch twice; name one of its folders"),
    "other count": (python_ten, replace("test_batch", pickled({b"data": RECORDS, b"labels": [1]})), "one label per"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    kind, spoil, message = MISTAKES[mistake]
    path = make(tmp_path / "files", kind, packed=False)
    spoil(tmp_path / "files")
    with pytest.raises(InputError, match=message) as refused:
        Cifar(path).load()
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "hostile").exists()


def test_a_pickle_cannot_ask_for_memory(tmp_path):
    path = make(tmp_path / "files", python_ten, packed=False)
    file = tmp_path / "files" / "test_batch"
    number = b"r" + (2**27).to_bytes(4, "little")  # of a value that is kept for later
    file.write_bytes(file.read_bytes().replace(b"}q\x00", b"}" + number, 1))
    tracemalloc.start()
    Cifar(path).load()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number in file.read_bytes() and peak < 2**26


def test_paths_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such archive or folder"):
        Cifar(str(tmp_path / "cifar-10-python.tar.gz")).load()
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b no archive")
    with pytest.raises(InputError, match=r"a\.tar\.gz: cannot be read"):
        Cifar(str(tmp_path / "a.tar.gz")).load()
    python_ten(tmp_path)
    whole = make(tmp_path / "files", python_ten, packed=True)
    with open(whole, "r+b") as file:
        file.truncate(20_000)
    with pytest.raises(InputError, match=r"cannot be read|incomplete"):
        Cifar(whole).load()


def test_names_that_are_missing(tmp_path):
    path = make(tmp_path / "files", python_ten, packed=False)
    (tmp_path / "files" / "batches.meta").unlink()
    assert len(Cifar(path).load().test.y) == 4 and class_names(Cifar(path)) == ()
    with pytest.raises(InputError, match=r"no batches\.meta, which names the classes"):
        _ = Cifar(path).class_names


def test_a_folder_of_image_files(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(TEN):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (label, label, label)).save(tmp_path / part / name / f"{i}.png")
    dataset = Cifar(str(tmp_path), validation=0.25)
    splits = dataset.load()
    assert [part.x.shape for part in splits] == [(30, 32, 32, 3), (10, 32, 32, 3), (20, 32, 32, 3)]
    assert all((part.x == part.y[:, None, None, None]).all() for part in splits)
    assert dataset.class_names == class_names(dataset) == TEN
