"""The folder of a run: where its files are, and what is read of them."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from deq_jax import InputError, evaluate
from deq_jax.core import WriteError
from deq_jax.data import Npz
from deq_jax.evaluation import EvalConfig, read_record
from deq_jax.training import TrainState, Workdir, load_run, read_metrics, threat_of
from deq_jax.training.keeping import Disk
from deq_jax.training.metrics import MetricsLog

ARCHIVE = Path(__file__).parents[1] / "golden" / "workdir-0.1.tar.xz"


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Workdir(Path("run"))


@pytest.mark.slow
def test_all_of_a_run_is_where_it_says(workdir):
    assert workdir.holds_a_run and workdir.config == load_run("run").config
    assert (workdir.best.latest_step(), workdir.latest.latest_step()) == (3, 9)
    assert workdir.trained("latest").latest_step() == 9
    assert read_metrics(workdir.metrics)[-1]["step"] == 9
    assert read_record(workdir.evaluation("test-eval_config").record).images == 24
    assert workdir.evaluation("half").manifest.is_file() and not workdir.evaluation("half").record.exists()


def test_what_is_not_there_is_named(workdir, tmp_path):
    nothing = Workdir(tmp_path)
    assert not nothing.holds_a_run
    for read in (lambda: nothing.config, lambda: nothing.trained("best")):
        with pytest.raises(InputError, match=r"not the workdir of a run \(no config.json\)"):
            read()
    with pytest.raises(InputError, match="checkpoint must be best or latest, got 'newest'"):
        workdir.trained("newest")
    workdir.config_file.write_text("[]")
    with pytest.raises(InputError, match=r"config.json: expected a TrainConfig"):
        _ = workdir.config


def test_an_evaluation_loads_the_dataset_once(workdir, monkeypatch, tmp_path):
    loads, load = [], Npz.load

    def counted(dataset):
        loads.append(dataset)
        return load(dataset)

    class Begun(Exception):
        pass

    def begin(*_, **__):
        raise Begun

    monkeypatch.setattr(Npz, "load", counted)
    monkeypatch.setattr(evaluate, "worst_case", begin)
    with pytest.raises(Begun):
        evaluate.evaluate(workdir.path, lambda train: EvalConfig(threat_of(train), ()), tmp_path / "out")
    assert len(loads) == 1


def state_after(step):
    return TrainState(np.int32(step), {"w": np.full(3, step, np.float32)}, {}, ())


def meta_of(accuracy):
    return {"config": {}, "origin": None, "best_accuracy": accuracy}


def damage(checkpoint):
    file = next(checkpoint.glob("state/ocdbt.process_0/d/*"))
    file.write_bytes(bytes(len(file.read_bytes())))


@pytest.fixture
def kept(tmp_path):
    """The workdir of a run with checkpoints after steps 1 and 2, the second of which is the best."""
    (tmp_path / "run").mkdir()
    disk = Disk(tmp_path / "run", print)
    assert disk.restore(state_after(0), "abc") is None
    disk.open(state_after(0), meta_of(-1.0), is_new=True, has_ended=False)
    for step in (1, 2):
        disk.log(step, step, "train", {"loss": 0.5 * step})
        disk.save_best(step, state_after(step), meta_of(step / 10))
        disk.save(step, state_after(step), meta_of(step / 10))
    disk.close()
    return disk.workdir


def resumed(workdir, *, has_ended=False):
    """The step from which a run goes on, its highest accuracy, what is said, and how it keeps what follows."""
    said: list[str] = []
    disk = Disk(workdir.path, said.append)
    found = disk.restore(state_after(0), "abc")
    assert found is not None
    state, meta = found
    disk.open(state, meta, is_new=False, has_ended=has_ended)
    disk.close()
    return int(state.step), meta["best_accuracy"], said, disk


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(kept):
    damage(kept.latest.folder / "2")
    step, accuracy, said, disk = resumed(kept)
    assert (step, accuracy) == (1, 0.1)
    assert len(said) == 1 and said[0].startswith(f"note: checkpoint {kept.latest.folder / '2'} is damaged (state/")
    assert said[0].endswith("); step 1 is used; the damaged one is set aside")
    assert {path.name for path in kept.latest.folder.iterdir()} == {"1", "2.damaged-1"}
    disk.save(2, state_after(2), meta_of(0.2))
    assert resumed(kept)[:3] == (2, 0.2, [])


def test_the_next_validation_gives_the_best_one_where_it_is_damaged(kept):
    damage(kept.best.folder / "2")
    step, accuracy, said, disk = resumed(kept)
    assert (step, accuracy) == (2, -1.0)
    assert len(said) == 1 and "best/2 is damaged (" in said[0] and "the next validation gives the best one" in said[0]
    assert {path.name for path in kept.best.folder.iterdir()} == {"2.damaged-1"}
    disk.save_best(2, state_after(2), meta_of(0.2))
    assert disk.best({"params": {"w": np.zeros(3, np.float32)}})["params"]["w"].tolist() == [2, 2, 2]


def test_the_best_one_of_a_run_that_has_ended_is_refused_where_it_is_damaged(kept):
    damage(kept.best.folder / "2")
    *_, said, disk = resumed(kept, has_ended=True)
    with pytest.raises(InputError, match=r"best/2 is damaged \(.*\); there is no earlier one"):
        disk.best({"params": {"w": np.zeros(3, np.float32)}})
    assert said == [] and [path.name for path in kept.best.folder.iterdir()] == ["2"]


CHANGES = {
    "a line is missing": ("metrics", lambda text: text.splitlines(keepends=True)[0]),
    "the end is cut off": ("metrics", lambda text: text[:-5]),
    "nothing is left": ("metrics", lambda text: ""),
    "a number has changed": ("metrics", lambda text: text.replace("0.5", "0.7")),
    "a setting has changed": ("environment", lambda text: text.replace("float32", "float64")),
    "no record is left": ("environment", lambda text: "[]"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_records_that_have_changed_since_the_checkpoint_are_refused(change, kept):
    name, changed = CHANGES[change]
    path = getattr(kept, name)
    good = path.read_text()
    path.write_text(changed(good))
    with pytest.raises(InputError, match=rf"{path.name} has changed since step 2, whose checkpoint .*; restore it, or"):
        resumed(kept)
    path.unlink()
    assert resumed(kept)[0] == 2  # without the earlier records
    path.write_text(good)
    assert resumed(kept)[0] == 2


def test_records_after_the_checkpoint_do_not_count(kept):
    with kept.metrics.open("a") as file:
        file.write('{"step": 3, "split": "train", "loss": 0.1}\n{"step": 4')
    assert resumed(kept)[0] == 2
    damage(kept.latest.folder / "2")
    assert resumed(kept)[0] == 1
    assert [line["step"] for line in read_metrics(kept.metrics)] == [1]


def test_metrics_on_a_full_disk(kept):
    """The line that could not be written is not read again, and those before it are."""
    log = MetricsLog(kept.metrics, kept.events, step=0)
    log.append({"step": 1, "split": "train", "loss": 0.5})
    log._file.close()
    with Path("/dev/full").open("w") as log._file:
        with pytest.raises(WriteError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
            log.append({"step": 2, "split": "train", "loss": 0.25})
        with pytest.raises(WriteError):
            log.close()
    assert [line["step"] for line in read_metrics(kept.metrics)] == [1]
