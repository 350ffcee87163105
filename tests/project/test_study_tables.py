"""Studies and benchmarks: what their tables say, and that their pages show their numbers."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    accelerator,
    auto_attack,
    devices,
    digits,
    entropy_reduction,
    outer_loop,
    parity,
    peers,
    photographs,
    readme,
    scale,
    speed,
    start,
    through,
)
from benchmarks.pages import made, stamp, with_parts
from benchmarks.study import Entry, Study, run, tables
from deq_jax import Backprop, InputError, RandomIntermediateState, TrainConfig
from deq_jax.attacks import PGD, Linf
from deq_jax.evaluation import (
    Attempt,
    Cost,
    EvalConfig,
    EvaluationRecord,
    Probe,
    Provenance,
    Row,
    Rows,
    Trial,
    WorstCase,
    write_evaluation,
)
from deq_jax.storage import environment, load_config, make_folder, read_json, set_fields, to_tree, write_json
from deq_jax.surrogates import ThroughSolver
from deq_jax.training import Workdir

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
RESULTS = Path(__file__).parents[2] / "docs" / "results"
ROW = {
    "training": "PGD-AT",
    "seeds": [0, 1],
    "clean": {"value": 99.44, "interval": [98.0, 99.9]},
    "robust": {"value": 76.67, "interval": None},
    "of_seeds": [0.75, 0.7833],
    "residual": 0.0542,
    "flags": {"no plateau": 1},
}
PAIR = {
    "first": "a",
    "second": "b",
    "clean": {"value": -0.56, "interval": [-1.6, 0.5]},
    "robust": {"value": 7.5, "interval": [4.2, 10.8]},
}


STATE = {
    "training": "PGD-AT",
    "state": "z_3",
    "clean accuracy": 55.0,
    "attacked accuracy": 28.0,
    "clean entropy": 1.2,
    "attacked entropy": 1.34,
    "clean residual": 0.25,
}
CURVE = {"training": "PGD-AT", "accuracy": [0.4, 0.55], "adversarial_accuracy": [0.2, 0.281]}


def test_a_training_a_difference_and_a_state_are_rows():
    attacks = [{"training": "PGD-AT", "attack": "pgd-10.Intermediate-1", "of": 6, "accuracy": 80.83}]
    text = tables({"rows": [ROW], "differences": [PAIR], "states": [STATE], "curves": [CURVE], "attacks": attacks})
    assert "| PGD-AT | pgd-10.Intermediate-1, strongest of 6 | 80.8 |" in text
    assert "| PGD-AT | 40.0 / 20.0 | 55.0 / 28.1 |" in text
    assert "| PGD-AT | z_3 | 55.0 | 28.0 | 1.20 | 1.34 | 0.25 |" in text
    assert "| PGD-AT | 99.4 [98.0, 99.9] | 76.7 | 75.0, 78.3 | 0.054 | no plateau 1/2 |" in text
    assert "| a, minus b | −0.6 [−1.6, +0.5] | +7.5 [+4.2, +10.8] |" in text


def test_tables_go_between_the_marks_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    text = with_parts(page, {"tables": "new"})
    assert text == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(InputError, match="has no lines"):
        with_parts(page, {"tables": "new"})


def whole(tables):
    """The parts of a page with one part of tables."""
    return lambda numbers: {"tables": tables(numbers)}


PARTS = {
    "budgets": whole(tables),
    "through": whole(tables),
    "photographs": lambda numbers: {
        "tables": tables(numbers),
        "seed 1": tables(read_json(RESULTS / "photographs-1.json")),
    },
    "accelerator": whole(accelerator.tables),
    "devices": whole(devices.tables),
    "digits": whole(tables),
    "entropy-reduction": whole(tables),
    "scale": whole(scale.tables),
    "outer-loop": whole(outer_loop.tables),
    "agreement": whole(parity.tables),
    "auto-attack": lambda numbers: {"table": auto_attack.table(numbers)},
    "speed-and-memory": speed.tables,
    "peers": lambda numbers: {"table": peers.table(numbers)},
}


@pytest.mark.parametrize("name", PARTS)
def test_the_page_shows_its_numbers_and_its_stamp(name):
    page = RESULTS / f"{name}.md"
    numbers = read_json(page.with_suffix(".json"))
    assert with_parts(page, {"stamp": stamp(numbers["made"])} | PARTS[name](numbers)) == page.read_text()


def test_readme_shows_the_numbers_of_the_digits():
    assert readme.readme() == (RESULTS.parents[1] / "README.md").read_text()


def test_a_stamp_has_code_versions_and_machine_as_far_as_they_were_recorded():
    cpu = {"work": "measured", "date": "2026-11-27", "processor": "EPYC", "processors": 2}
    cpu |= {"platform": {"platform": "cpu", "device_kind": "cpu", "devices": 1}}
    cpu |= {"code": {"revision": "0123456789", "unchanged": False}, "versions": {"python": "3.12.1", "jax": "0.12.0"}}
    gpu = {"work": "trained", "platform": {"platform": "gpu", "device_kind": "H100", "devices": 8}}
    text = " ".join(stamp([gpu, cpu]).replace("\n>", "").split())
    assert text == (
        "> **Stamp.** Trained by a commit that was not recorded, 8 x H100. "
        "Measured on 2026-11-27 by commit 0123456 with changes, Python 3.12.1, jax 0.12.0, 2 CPU cores (EPYC)."
    )
    assert "a commit that was not recorded" not in stamp([made()]) and "CPU cores" in stamp([made()])


def test_a_command_is_a_row_with_its_programs_and_both_starts():
    cold = {"seconds": 35.5, "programs": 87, "compiling": 20.25, "hits": 0}
    warm = {"seconds": 12.5, "programs": 87, "compiling": 0.5, "hits": 7}
    text = start.table([{"command": "evaluate", "cold": cold, "warm": warm}])
    assert text.splitlines()[2] == "| evaluate | 87 | 7 | 20.2 | 35.5 | 12.5 |"


def repeated(rows):
    """A measurement that finds these rows, with the number of repetitions as their ratio."""
    return lambda repeats: [row | {"ratio": repeats} for row in rows]


def test_parts_that_were_measured_again_have_a_stamp_of_their_own(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in ["stamp", *speed.PARTS]))
    days = iter(["2026-01-01", "2026-01-01", "2026-02-02"])
    monkeypatch.setattr(speed, "made", lambda: {"work": "measured", "date": next(days), "command": {}})
    rows = {
        "solvers": [{"what": "Broyden", "against": "9 cells", "ratio": 1.25, "smallest": 1.2, "largest": 1.3}],
        "memory": [{"config": "a", "setting": "b", "batch_size": 4, "step": 3.0, "state": 1.0}],
    }
    for name, found in rows.items():
        monkeypatch.setitem(speed.PARTS, name, speed.PARTS[name]._replace(rows=repeated(found)))
    speed.main(["--page", str(page), "--only", "solvers", "memory"])
    assert "| Broyden | 9 cells | 5.00 (1.20 to 1.30) |" in page.read_text()
    assert "| `a` | b | 4 | 3.00 | 1.00 | 512.0 |" in page.read_text()
    assert "> **Stamp.** Measured on 2026-01-01 by" in page.read_text()
    speed.main(["--page", str(page), "--only", "memory", "--repeats", "2"])
    assert "Solvers measured on 2026-01-01 by" in page.read_text()
    assert "Memory measured on 2026-02-02 by" in page.read_text()


@pytest.mark.parametrize("study", [through.STUDY, photographs.STUDY, digits.STUDY, entropy_reduction.STUDY])
def test_each_entry_has_a_folder_of_its_own_and_others_that_are_named_exist(study):
    ways = {(entry.slug, entry.evaluation) for entry in study.entries.values()}
    assert len(ways) == len(study.entries)
    named = {name for pair in study.pairs for name in pair} | {*study.states, *study.curves, *study.attacks}
    assert named <= study.entries.keys()


def test_the_networks_of_the_study_differ_in_what_their_configs_say():
    names = ["", "_through", "_backprop", "_random", "_through_random"]
    configs = [load_config(f"configs/digits_pgd_at{name}.py", TrainConfig) for name in names]
    plain, *_ = configs
    found = [(one.objective.surrogate, one.classifier.dynamics.gradient) for one in configs]
    through, gradient = ThroughSolver(), plain.classifier.dynamics.gradient
    others = [(through, gradient), (None, Backprop(gradient)), (None, gradient), (through, gradient)]
    assert found == [(None, gradient), *others]
    readouts = [type(one.classifier.dynamics.readout) is RandomIntermediateState for one in configs]
    assert readouts == [False, False, False, True, True]
    assert all(one.optimizer == plain.optimizer and one.epochs == plain.epochs for one in configs)


@pytest.mark.parametrize("study", [photographs.STUDY, digits.STUDY, entropy_reduction.STUDY])
def test_images_are_transferred_from_entries_that_come_before(study):
    names = list(study.entries)
    sources = [(name, other) for name in names for other in study.entries[name].transfers.values()]
    assert sources and all(names.index(other) < names.index(name) for name, other in sources)


IMAGES = 40
WRONG = {"PGD-AT": 8, "PGD-AT, through the solver": 4, "PGD-AT, through 4 solver steps": 6}  # under attack
THROUGH, PLAIN, FEWER = "PGD-AT, through the solver", "PGD-AT", "PGD-AT, through 4 solver steps"


def row_of(wrong):
    is_wrong = np.arange(IMAGES) < wrong
    margin, residual = np.where(is_wrong, 1.0, -1.0), np.full(IMAGES, 0.25)
    return Rows(None, None, Row(is_wrong.astype(int), margin, np.zeros(IMAGES), residual))


def evaluated(workdir, wrong, train_config):
    """Writes an evaluation in which two clean images are wrong, and so many under attack."""
    nothing, x, logits = np.zeros(IMAGES), np.zeros((IMAGES, 2, 2, 1)), np.eye(IMAGES, 10)
    attacked, everywhere = row_of(wrong), np.ones(IMAGES, bool)
    result = WorstCase(
        config=EvalConfig(Linf(0.1), (Trial("pgd", PGD(Linf(0.1))),), skip_broken=False),
        y=np.zeros(IMAGES, int),
        clean=row_of(2),
        zero_gradient=~everywhere,
        spectral_radius=nothing,
        probe=Probe(logits, logits, logits, logits),
        cost=Cost(np.array([15.0]), np.array([0.5])),
        attempts={"pgd": Attempt(x.copy, attacked, everywhere, everywhere, 0.5)},
        x_adv=x,
        worst=attacked,
    )
    provenance = Provenance(str(workdir), "best, step 17", "test", {}, to_tree(train_config))
    out = workdir / "evaluation" / "test-quick"
    out.mkdir(parents=True)
    write_evaluation(out, EvaluationRecord.of(result, provenance), result, x)


@pytest.mark.slow
def test_the_command_trains_evaluates_and_writes_the_page(tmp_path, monkeypatch):
    configs = {}

    def train(arguments):
        """Loads the config as the command does."""
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        changes = [value for name, value in zip(arguments[::2], arguments[1::2], strict=True) if name == "--set"]
        configs[options["--workdir"]] = set_fields(load_config(options["--config"], TrainConfig), changes)
        workdir = Workdir(make_folder(Path(options["--workdir"])))
        write_json(workdir.environment, [{"step": 0, **environment()}])

    def evaluate(arguments):
        assert arguments[0::2] == ["--workdir", "--budget"] and arguments[3] == "quick"
        name = next(
            name for name in WRONG if Path(arguments[1]).name.rpartition("-")[0] == through.STUDY.entries[name].slug
        )
        evaluated(Path(arguments[1]), WRONG[name], configs[arguments[1]])

    monkeypatch.setattr("deq_jax.train.main", train)
    monkeypatch.setattr("deq_jax.evaluate.main", evaluate)
    page = tmp_path / "page.md"
    page.write_text(f"<!-- stamp -->\n<!-- end of stamp -->\n{BEGIN}\n{END}\n")
    run(through.STUDY, "", ["--seeds", "2", "--only", *WRONG, "--out", str(tmp_path / "runs"), "--page", str(page)])
    numbers = read_json(page.with_suffix(".json"))
    assert page.read_text() == with_parts(page, {"tables": tables(numbers)})
    works = [record["work"] for record in numbers["made"]]
    assert works == ["trained", "evaluated", "tabulated"] and stamp(numbers["made"]) in page.read_text()
    found = {row["training"]: row for row in numbers["rows"]}
    assert {name: row["robust"]["value"] for name, row in found.items()} == {PLAIN: 80, THROUGH: 90, FEWER: 85}
    assert all(row["clean"]["value"] == 95 and row["residual"] == 0.25 for row in found.values())
    differences = {(row["first"], row["second"]): row["robust"]["value"] for row in numbers["differences"]}
    assert differences == {(THROUGH, PLAIN): 10, (FEWER, THROUGH): -5}
    solvers = {Path(name).name: config.classifier.dynamics.solver.steps for name, config in configs.items()}
    assert solvers["digits_pgd_at_through-steps-4-1"] == 4 and solvers["digits_pgd_at_through-1"] == 8
    assert {config.seed for config in configs.values()} == {0, 1}


def test_a_costly_defended_entry_meets_the_images_of_others_with_its_own_attacks_and_seeds(tmp_path, monkeypatch):
    calls: list[list[str]] = []
    monkeypatch.setattr("deq_jax.train.main", lambda arguments: None)
    monkeypatch.setattr("deq_jax.evaluate.main", calls.append)
    monkeypatch.setattr("benchmarks.study.numbers_of", lambda study, folders, budget: folders)
    monkeypatch.setattr("benchmarks.study.write_json", lambda path, numbers: None)
    monkeypatch.setattr("benchmarks.study.tables", str)
    own = ("--config", "configs/eval_entropy_quick.py")
    entries = {"a": Entry("digits_pgd_at"), "b": Entry("digits_pgd_at", (), own, {"reference": "a"}, seeds=1)}
    study = Study(entries, [])
    command = ["--out", str(tmp_path), "--seeds", "2", "--first-seed", "4", "--images", "6", "--batch-size", "3"]
    run(study, "", command)
    where = ["--workdir", str(tmp_path / "digits_pgd_at-4")]
    sizes = ["--images", "6", "--batch-size", "3"]
    of_a = tmp_path / "digits_pgd_at-4" / "evaluation" / "test-quick-images-6"
    assert calls[0] == [*where, "--budget", "quick", *sizes]
    assert calls[1] == [*where, *sizes, *own, "--transfer", f"reference={of_a}"]
    assert len(calls) == 3 and calls[2][1].endswith("digits_pgd_at-5")


def test_a_page_without_marks_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "page.md").write_text("no marks")
    with pytest.raises(SystemExit) as left:
        run(through.STUDY, "", ["--out", str(tmp_path / "runs"), "--page", str(tmp_path / "page.md")])
    assert left.value.code == 2 and "has no lines" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_full_budget_found_no_image_more_than_the_quick_one():
    """A finding of the page, in its numbers."""
    each = {row["training"]: row["of_seeds"] for row in read_json(RESULTS / "budgets.json")["rows"]}
    names = [name.removesuffix(", quick") for name in each if name.endswith(", quick")]
    assert len(names) == 4 and all(each[f"{name}, quick"] == each[f"{name}, full"] for name in names)
