"""Files that are spoiled at random: whatever reads them, the only error is the one that becomes a line."""

import functools
import os
import pickle
import resource
import shutil
import socket
import sys
import tarfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from deq_jax import Broyden, Dynamics, Equilibrium, InputError, Standard, TrainConfig
from deq_jax.attacks import Linf
from deq_jax.data import Cifar, Digits, ImageFolder, Images, Npz
from deq_jax.evaluation import EvalConfig, Transfer, headline, with_transfers
from deq_jax.evaluation.terminal import accuracy_table, classes_table, states_table
from deq_jax.interop import from_torch, mdeq_shapes, read_state_dict, to_torch, torch_shapes, write_state_dict
from deq_jax.models import mdeq, pretrained
from deq_jax.models.pretrained import FOLDER
from deq_jax.reporting import contents, groups_of, read_evaluations
from deq_jax.reporting.protocol import protocol_text
from deq_jax.reporting.wording import quotes
from deq_jax.storage import environment, read_json, write_json
from deq_jax.storage.checkpoints import Checkpoint, Checkpoints
from deq_jax.storage.locks import sole_writer
from deq_jax.training import Workdir, read_metrics
from deq_jax.training.workdir import check_meta, environments_of
from tests.helpers.mutations import mutated_bytes, mutated_json, mutated_npz, mutated_safetensors

ARCHIVE = Path(__file__).parents[1] / "golden" / "workdir-0.1.tar.xz"  # a run and its evaluations
EVALUATION = Path("run/evaluation/test-eval_config")
MANY = int(os.environ.get("MUTATIONS", 10_000))
MDEQ = TrainConfig(
    Equilibrium(*mdeq(10, (8, 8), (2, 2), final_channels=8, expansion=1), Dynamics(Broyden(2))), Standard(), Digits()
)
MEMORY = 2**31  # bytes: far more than the files have, far less than they may promise


@dataclass(frozen=True)
class Reader:
    """What reads a file, how the file is spoiled, and how often among others."""

    file: str
    mutate: Callable[[bytes, np.random.Generator], bytes]
    read: Callable[[], object]
    weight: int = 4


def run_config():
    config = Workdir(Path("run")).config
    assert isinstance(config, TrainConfig)


def evaluation():
    (found,) = read_evaluations([EVALUATION])
    for table in (accuracy_table, classes_table, states_table):
        table(found.record)
    groups = groups_of([found])
    (group,) = groups
    tables = [contents.headline_table(groups), contents.cost_table(groups)]
    tables += [table("a", group) for table in (contents.accuracy_table, contents.classes_table, contents.flags_table)]
    return headline(found.record), protocol_text(found), quotes(groups), [table.csv() for table in tables]


def transferred():
    arrays = np.load("digits200.npz")
    x, y = (arrays["x_test"] / 255).astype(np.float32), arrays["y_test"]
    for path in (EVALUATION / "evaluation.npz", EVALUATION / "trials" / "apgd"):
        Transfer(str(path)).load(Images(x, y), x, Linf(0.1))


def suites():
    return with_transfers(EvalConfig(Linf(0.1), ()), [("a", EVALUATION)])


@functools.cache
def shapes_of_mdeq():
    return mdeq_shapes(MDEQ)


def state_dict(name):
    def read():
        shapes = shapes_of_mdeq()
        from_torch(read_state_dict(name, torch_shapes(shapes)).arrays, shapes)

    return read


def metrics():
    return [line for line in read_metrics(Path("run/metrics.jsonl")) if line["step"] <= 5]


def meta():
    check_meta(Checkpoint(Path("run/checkpoints/latest/9"), {}, read_json(Path("meta.json"))))


def lock():
    with sole_writer(Path("locked")):
        pass


def checkpoint():
    Checkpoints(Path("saved"), keep=1).read(lambda text: None)


def image():
    ImageFolder("images", test=0.3, validation=0.3, colours="rgb").load()


def cached():
    splits = ImageFolder("cached", test=0.3, validation=0.3, colours="rgb", cache="cache.npz").load()
    assert splits.train.x.shape[1:] == (8, 8, 3)


READERS = [
    Reader("digits200.npz", mutated_npz, lambda: Npz("digits200.npz").load()),
    Reader("cache.npz", mutated_npz, cached),
    Reader("images/dog/0.png", mutated_bytes, image),
    Reader("images/dog/0.gif", mutated_bytes, image),
    Reader("images/dog/0.tif", mutated_bytes, image),
    Reader("cifar/test_batch", mutated_bytes, lambda: Cifar("cifar").load()),
    Reader("cifar.tar.gz", mutated_bytes, lambda: Cifar("cifar.tar.gz").load()),
    Reader("mdeq.npz", mutated_npz, state_dict("mdeq.npz"), 2),
    Reader("mdeq.safetensors", mutated_safetensors, state_dict("mdeq.safetensors")),
    Reader("run/config.json", mutated_json, run_config, 8),
    Reader("run/environment.json", mutated_json, lambda: environments_of(Path("run"), 5)),
    Reader("run/metrics.jsonl", mutated_json, metrics),
    Reader("meta.json", mutated_json, meta),
    Reader("locked/lock.json", mutated_json, lock),
    Reader("saved/3/digests.json", mutated_json, checkpoint),
    Reader(f"{EVALUATION}/evaluation.json", mutated_json, evaluation, 8),
    Reader(f"{EVALUATION}/evaluation.npz", mutated_npz, evaluation),
    Reader(f"{EVALUATION}/evaluation.npz", mutated_npz, transferred),
    Reader(f"{EVALUATION}/trials/apgd/batch-0001.npz", mutated_npz, transferred),
    Reader(f"{EVALUATION}/manifest.json", mutated_json, suites, 8),
    Reader("trained/digits_pgd_at.json", mutated_json, lambda: pretrained("digits_pgd_at")),
    Reader("trained/digits_pgd_at.npz", mutated_npz, lambda: pretrained("digits_pgd_at"), 1),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """All files, as they are written."""
    place = tmp_path_factory.mktemp("mutations")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
    for top in ("images", "cached"):
        for name in ("cat", "dog"):
            (place / top / name).mkdir(parents=True)
            for ending in ("png", "gif", "tif"):
                Image.new("RGB", (8, 8)).save(place / top / name / f"0.{ending}")
    (place / "cifar").mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"labels": [1, 2, 3, 9], b"data": np.zeros((4, 3072), np.uint8)}
        (place / "cifar" / name).write_bytes(pickle.dumps(batch, 2))
    with tarfile.open(place / "cifar.tar.gz", "w:gz") as archive:
        archive.add(place / "cifar", "cifar")
    arrays = to_torch(jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes_of_mdeq()))
    write_state_dict(place / "mdeq.npz", arrays)
    write_state_dict(place / "mdeq.safetensors", arrays)
    write_json(place / "run" / "environment.json", [{"step": 0, **environment()}])
    write_json(
        place / "meta.json", {"config": {}, "best_accuracy": 0.5, "not_better": 1, "interval": {"loss": [3, 0.5]}}
    )
    (place / "locked").mkdir()
    write_json(place / "locked" / "lock.json", {"host": socket.gethostname(), "process": 3, "started": "today"})
    Checkpoints(place / "saved", keep=1).save(3, {"w": np.ones(3)}, {"a": 1})
    shutil.copytree(FOLDER, place / "trained")
    with chdir(place):
        cached()
    return place


def survey(count, seed):
    """Reads spoiled files, each of which is then as it was.

    Returns:
      How many were refused, by the reader's file; and what went wrong otherwise, by its place in the code.
    """
    rng, refused = np.random.default_rng(seed), Counter[str]()
    wrong: dict[str, tuple[str, bytes]] = {}
    good = {Path(reader.file): Path(reader.file).read_bytes() for reader in READERS}
    weights = np.array([reader.weight for reader in READERS])
    for reader in rng.choice(np.array(READERS, object), count, p=weights / weights.sum()):
        path = Path(reader.file)
        bad = reader.mutate(good[path], rng)
        path.write_bytes(bad)
        try:
            reader.read()
        except InputError as error:
            refused[reader.file] += 1
            assert "\n" not in str(error).strip(), reader.file
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            wrong[f"{where.filename}:{where.lineno}"] = f"{reader.file}: {error!r:.200}", bad[:2000]
        finally:
            path.write_bytes(good[path])
    return refused, wrong


@pytest.mark.parametrize("count", [300, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_a_spoiled_file_is_read_or_refused(count, place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "inside")
    monkeypatch.chdir(tmp_path / "inside")
    monkeypatch.setattr(sys.modules["deq_jax.models.pretrained"], "FOLDER", Path("trained"))
    before, memory = {*tmp_path.rglob("*")}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, wrong = survey(count, seed=count)
    assert not wrong, "\n".join(f"{where}: {what} for {bad!r}" for where, (what, bad) in wrong.items())
    assert {*tmp_path.rglob("*")} == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY / 1024
    assert len(refused) > len(READERS) - 5 and sum(refused.values()) > count / 2
