"""evaluation.json: what is written is read again, older files too, and newer ones are refused."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from deq_jax import Explicit, InputError
from deq_jax.attacks import PGD, Linf, Noise
from deq_jax.data import Images
from deq_jax.evaluation import (
    EvalConfig,
    EvaluationFolder,
    EvaluationRecord,
    Provenance,
    Trial,
    headline,
    read_record,
    worst_case,
    write_evaluation,
)
from deq_jax.evaluation.terminal import accuracy_table, classes_table, states_table
from deq_jax.storage import to_tree, write_json
from tests.helpers import tiny
from tests.helpers.linear import DATA, Linear, trained

ARCHIVE = Path(__file__).parents[1] / "golden" / "workdir-0.1.tar.xz"
IMAGES = Images(DATA.test.x[:16], DATA.test.y[:16])
THREAT = Linf(0.05)
TRIALS = (Trial("uniform", Noise(THREAT)), Trial("pgd", PGD(THREAT, steps=2), suite="all"))
PROVENANCE = Provenance("runs/a", "best, step 3", "test", {"jax": "0.12"}, to_tree(tiny.get_config()), {"step": 0})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Two evaluations with their folders: with attacks, and without."""
    results = []
    for trials in (TRIALS, ()):
        out = tmp_path_factory.mktemp("out")
        config = EvalConfig(THREAT, trials, batch_size=16)
        results.append((worst_case(config, Explicit(Linear()), trained(), IMAGES, out), out))
    return results


@pytest.fixture(scope="module", params=[0, 1], ids=["attacked", "clean"])
def record(request, found):
    return EvaluationRecord.of(found[request.param][0], PROVENANCE)


def test_what_is_written_is_read(record):
    tree = json.loads(json.dumps(record.to_json()))
    assert tree["schema"] == 1
    again = EvaluationRecord.from_json(tree)
    assert again == record
    assert json.loads(json.dumps(again.to_json())) == tree


def test_a_record_of_no_workdir_has_no_provenance(found):
    record = EvaluationRecord.of(found[0][0])
    tree = record.to_json()
    assert "workdir" not in tree and "config" not in tree
    assert EvaluationRecord.from_json(json.loads(json.dumps(tree))) == record


def test_accuracies_of_the_classes_are_those_of_their_images(found):
    result, _ = found[0]
    record, labels = EvaluationRecord.of(result, class_names=("zero", "[red]", "two")), np.unique(result.y)
    assert [one.name for one in record.classes] == ["zero", "[red]", "two", *map(str, labels[3:])]
    right = {"clean": result.robust()["clean"].deployed, "attacked": result.robust()["union"].deployed}
    for one, label in zip(record.classes, labels, strict=True):
        own = result.y == label
        assert one.images == own.sum()
        for name, correct in right.items():
            assert getattr(one, name) == correct[own].mean()
    assert str(list(classes_table(record).columns[0].cells)[1]) == "[red]"
    assert {one.attacked for one in EvaluationRecord.of(found[1][0]).classes} == {None}


def test_numbers_are_those_of_the_result(found):
    result, out = found[0]
    record = EvaluationRecord.of(result, PROVENANCE)
    write_evaluation(out, record, result, IMAGES.x)
    assert read_record(EvaluationFolder(out).record) == record
    assert record.robust_accuracy == result.robust()["union"].deployed.mean()
    assert record.rows["deployed"].attacked.accuracy == record.robust_accuracy
    assert list(record.accuracy) == ["clean", "uniform", "pgd", "all", "union"]
    assert record.trials["uniform"].attacked == round(16 * record.accuracy["clean"]["deployed"])
    assert record.trials["pgd"].broken == np.sum(result.broken("pgd"))
    assert record.intervals.keys() == {"clean", "union"}
    assert record.plan.trials[1].suite == "all" and record.plan.epsilon == 0.05


def test_headline_and_tables_are_functions_of_what_was_read(record):
    again = EvaluationRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert headline(again) == headline(record)
    for table in (accuracy_table, classes_table, states_table):
        cells = [[list(column.cells) for column in table(one).columns] for one in (again, record)]
        assert cells[0] == cells[1]


def test_a_file_of_an_older_version_is_read(tmp_path):
    """It has no schema, no warnings, and no intervals; these follow from its accuracies."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = EvaluationFolder(tmp_path / "run" / "evaluation" / "test-eval_config")
    record = read_record(folder.record)
    assert (record.images, record.robust_accuracy, record.warnings) == (24, 0.0, ())
    assert record.intervals["union"][0] == 0.0 < record.intervals["union"][1] < 0.2
    assert record.adjoint_residual.mean is None and record.unsettled is None
    assert record.provenance.environment is None and record.provenance.run.seed == 0
    assert record.classes == ()
    assert len(record.plan.all_trials) == 12
    assert EvaluationRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert "robust accuracy: " in headline(record)


@pytest.mark.parametrize("schema", [2, "1", -1])
def test_another_schema_is_refused(schema, record, tmp_path):
    write_json(tmp_path / "a.json", record.to_json() | {"schema": schema})
    expected = (
        f"a.json: not an evaluation as this version writes it (ValueError: schema {schema!r}, expected at most 1)"
    )
    with pytest.raises(InputError, match=re.escape(expected)):
        read_record(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["images", "rows", "accuracy", "evaluation", "red_flags", "checkpoint"])
def test_what_is_missing_is_named(name, record, tmp_path):
    tree = record.to_json()
    del tree[name]
    write_json(tmp_path / "a.json", tree)
    with pytest.raises(InputError, match=rf"a.json: not an evaluation as .* \(KeyError: '{name}'\)"):
        read_record(tmp_path / "a.json")
