"""The folder of a run: where its files are, and what is read of them."""

import tarfile
from pathlib import Path

import pytest

from deq_jax import InputError, evaluate
from deq_jax.data import Npz
from deq_jax.evaluation import EvalConfig, read_record
from deq_jax.training import Workdir, load_run, read_metrics, threat_of

ARCHIVE = Path(__file__).parents[1] / "golden" / "workdir-0.1.tar.xz"


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return Workdir(Path("run"))


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
