"""The report: its numbers against hand-computed ones, its page as HTML, its files, and what a user may get wrong."""

import base64
import csv
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pytest

from deq_jax import EnsembleState, evaluate, report, train
from deq_jax.attacks import APGD, PGD, Linf
from deq_jax.defences import deployed
from deq_jax.evaluation import (
    Attempt,
    Cost,
    EvalConfig,
    EvaluationRecord,
    Outcomes,
    Probe,
    Provenance,
    Transfer,
    Trial,
    WorstCase,
    summary,
    write_evaluation,
)
from deq_jax.evaluation.rows import from_columns
from deq_jax.reporting import (
    Estimate,
    Group,
    Report,
    Table,
    groups_of,
    read_evaluations,
    render,
    report_files,
    unfinished,
)
from deq_jax.reporting.comparisons import (
    defence_pairs,
    labels,
    radius_curves,
    training_pairs,
    undefended,
    undefended_trainings,
)
from deq_jax.reporting.contents import accuracy_table, headline_table, pair_table
from deq_jax.reporting.groups import robust
from deq_jax.reporting.protocol import protocol_text
from deq_jax.reporting.tables import Cell, Column, Field, filled, sectioned, text_cell
from deq_jax.reporting.wording import DEFENCE, TRAINING, quotes, sentences
from deq_jax.storage import brief, number, to_tree
from deq_jax.surrogates import ThroughSolver
from tests.helpers import tiny
from tests.helpers.tiny import OVERRIDES, assignments

IMAGES = 40
Y = np.arange(IMAGES) % 10
LOGITS = np.eye(16, 10)
NAMES = "cat", "<b>dog</b>", "'\"&"


def measured(wrong, rng):
    """Of three raw states, their mean and the deployed predictor, which errs on the first `wrong` images."""
    is_wrong = np.concatenate([rng.random((IMAGES, 4)) < 0.3, (np.arange(IMAGES) < wrong)[:, None]], axis=1)
    margin, residual = np.where(is_wrong, 1.0, -1.0), rng.uniform(0.01, 0.5, (IMAGES, 5))
    residual[:, 3] = np.nan
    entropy = rng.uniform(0, 2, (IMAGES, 5))
    label = (Y[:, None] + is_wrong) % 10
    return from_columns({"label": label, "margin": margin, "entropy": entropy, "residual": residual})


def config_of(epsilon, defence, seed):
    """An undefended predictor under two attacks, or a defended one under those and what was made before."""
    threat = Linf(epsilon)
    trials = (
        Trial("apgd", APGD(threat, steps=5), suite="AutoAttack"),
        Trial("pgd", PGD(threat)),
    )
    config = EvalConfig(threat, trials, batch_size=16, skip_broken=False)
    if defence == "none":
        return config
    before = Trial("reference.pgd", Transfer(f"runs/tiny-{seed}"), suite="reference")
    predictor = deployed(tiny.classifier(), EnsembleState())
    return replace(config, trials=(*trials, before), predictor=predictor, defence=defence)


def found(config, seed, wrong, *, masked=False):
    """What an evaluation finds whose trials fool the deployed predictor on so many images, clean ones first."""
    rng = np.random.default_rng(seed)
    parts = {name: measured(count, rng) for name, count in wrong.items()}
    clean, x_adv, everywhere = parts.pop("clean"), np.zeros((IMAGES, 2, 2, 1)), np.ones(IMAGES, bool)
    attempts = {name: Attempt(x_adv.copy, part, everywhere, everywhere, 0.5) for name, part in parts.items()}
    worst = max(attempts.values(), key=lambda one: one.measured.deployed.margin.sum()).measured if attempts else clean
    defended = config.predictor is not None
    cost = Cost(np.full(4, 21.0 if defended else 7.0), np.full(3, 0.004 if defended else 0.001))
    probe = Probe(LOGITS, LOGITS, LOGITS, LOGITS)
    return WorstCase(
        config, Y, clean, np.full(IMAGES, masked), np.full(IMAGES, 0.9), probe, cost, attempts, x_adv, worst
    )


def write(folder, config, seed, wrong, *, train=None, workdir="runs/tiny", **options):
    """What `evaluate` writes."""
    train = tiny.get_config(seed=seed) if train is None else replace(train, seed=seed)
    versions = {"deq_jax": "0.1.0", "jax": "0.10"}
    provenance = Provenance(f"{workdir}-{seed}", "best, step 17", "test", versions, to_tree(train))
    result = found(config, seed, wrong, **options)
    folder.mkdir(parents=True, exist_ok=True)
    write_evaluation(folder, EvaluationRecord.of(result, provenance, NAMES), result, result.x_adv)
    return folder


def write_study(folder):
    """Two trainings of two seeds, three evaluations of the first; returns the runs."""
    for seed in (0, 1):
        plain, longer = folder / f"tiny-{seed}", folder / f"longer-{seed}"
        undefended = {"clean": 2, "apgd": 8 + 4 * seed, "pgd": 10 + 4 * seed}
        defended = {"clean": 2, "apgd": 11 + 4 * seed, "pgd": 13 + 4 * seed, "reference.pgd": 6 + 4 * seed}
        half = {"clean": 2, "apgd": 4, "pgd": 5 + seed}
        write(plain / "evaluation" / "a", config_of(0.1, "none", seed), seed, undefended)
        write(plain / "evaluation" / "b", config_of(0.1, "ensemble state", seed), seed, defended)
        write(plain / "evaluation" / "c", config_of(0.05, "none", seed), seed, half)
        other = {"train": tiny.get_config(epochs=2), "workdir": "runs/longer", "masked": True}
        write(
            longer / "evaluation" / "a", config_of(0.1, "none", seed), seed, {"clean": 1, "apgd": 3, "pgd": 3}, **other
        )
    return [folder / f"{name}-{seed}" for name in ("tiny", "longer") for seed in (0, 1)]


def halve(folder):
    """As if only the first half of the images had been evaluated."""
    with np.load(folder / "evaluation.npz") as file:
        arrays = {name: part[: IMAGES // 2] for name, part in file.items() if name not in ("rows", "correct")}
        correct = file["correct"][:, : IMAGES // 2]
        np.savez(folder / "evaluation.npz", **arrays, rows=file["rows"], correct=correct)
    path = folder / "evaluation.json"
    content = json.loads(path.read_text())
    for name, row in zip(content["accuracy"], correct, strict=True):
        content["accuracy"][name]["deployed"] = float(row.mean())
    clean, attacked = (from_columns(arrays, prefix) for prefix in ("clean_", "attacked_"))
    rows = {name: asdict(row) for name, row in summary(Outcomes(arrays["y"], clean, attacked, None)).items()}
    path.write_text(json.dumps(content | {"images": IMAGES // 2, "rows": rows}))


class Page(HTMLParser):
    """Tags with their attributes, the rows of each table by its name, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.text, self.row, self.rows, self.cell = [], {}, [], None, None, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self.name] = [[cell.strip() for cell in row] for row in self.rows if len(row) > 1]
            self.rows = None

    def handle_data(self, data):
        self.text.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
        elif self.rows is not None and data.endswith(".csv"):
            self.name = data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def groups(runs):
    return groups_of(read_evaluations(runs))


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory):
    """The report by the command line."""
    folder = tmp_path_factory.mktemp("report") / "new"
    report.main([*map(str, runs), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def page(out):
    return Page((out / "index.html").read_text())


def rows_of(table):
    return [[str(cell) for cell in row] for rows in table.sections.values() for row in rows]


class TestGroups:
    def test_an_evaluation_that_is_given_twice_counts_once(self, runs):
        assert read_evaluations([*runs, runs[0], runs[0] / "evaluation" / "a"]) == read_evaluations(runs)

    def test_seeds_are_put_together_and_undefended_predictors_come_first(self, groups):
        names = [(group.training, group.defence, group.setting.epsilon, len(group.evaluations)) for group in groups]
        assert names == [
            ("tiny", "none", 0.1, 2),
            ("tiny", "ensemble state", 0.1, 2),
            ("longer", "none", 0.1, 2),
            ("tiny", "none", 0.05, 2),
        ]

    def test_pairs(self, groups):
        plain, defended, longer, _ = groups
        assert [(pair.first, pair.second) for pair in defence_pairs(groups)] == [(defended, plain)]
        assert [(pair.first, pair.second) for pair in training_pairs(groups)] == [(longer, plain)]

    def test_a_defence_is_compared_with_the_evaluation_that_has_most_attacks_in_common(self, groups, runs, tmp_path):
        other = replace(config_of(0.1, "none", 0), trials=(Trial("noise", PGD(Linf(0.1), steps=1, step_size=0.1)),))
        folder = write(tmp_path / "noise", other, 0, {"clean": 2, "noise": 3})
        more = groups_of(read_evaluations([folder, *runs]))
        assert [group.defence for group in more[:3]] == ["none", "none", "ensemble state"]
        assert undefended(more[2], more) == groups[0]

    @pytest.mark.slow
    def test_different_trainings_and_predictors_are_not_called_the_same(self, tmp_path):
        wrong = {"clean": 2, "apgd": 3, "pgd": 4}
        for name, epochs in (("x", 1), ("y", 2)):
            config = config_of(0.1, "none", 0)
            write(tmp_path / name, config, 0, wrong, train=tiny.get_config(epochs=epochs))
            defended = replace(config, predictor=tiny.classifier(dropout=0.1 * epochs), defence="other")
            write(tmp_path / f"{name}-1", defended, 0, wrong)
        groups = groups_of(read_evaluations([tmp_path / name for name in ("x", "y", "x-1", "y-1")]))
        assert [group.training for group in groups] == ["tiny", "tiny", "tiny", "tiny #2"]
        assert [group.defence for group in groups] == ["none", "other", "other #2", "none"]

    @pytest.mark.slow
    def test_groups_that_differ_in_the_settings_of_an_attack_alone_have_labels_of_their_own(self, tmp_path):
        for name, steps in (("x", 10), ("y", 20)):
            config = replace(
                config_of(0.1, "none", 0), trials=(Trial("pgd", PGD(Linf(0.1), steps=steps, step_size=0.1)),)
            )
            write(tmp_path / name, config, 0, {"clean": 2, "pgd": 3})
        groups = groups_of(read_evaluations([tmp_path / name for name in ("x", "y")]))
        assert labels(groups) == ["none: pgd", "none: pgd #2"]

    @pytest.mark.slow
    def test_evaluations_of_other_images_are_not_put_together(self, tmp_path):
        wrong = {"clean": 2, "apgd": 3, "pgd": 4}
        write(tmp_path / "all", config_of(0.1, "none", 0), 0, wrong)
        write(tmp_path / "some", config_of(0.1, "ensemble state", 0), 0, wrong | {"reference.pgd": 5})
        halve(tmp_path / "some")
        groups = groups_of(read_evaluations([tmp_path / "all", tmp_path / "some"]))
        images = [f"{count} images of Digits, test split, best checkpoint, Linf ε = 0.1" for count in (40, 20)]
        assert list(headline_table(groups).sections) == images
        assert defence_pairs(groups) == []

    def test_transfers_from_any_folder_are_the_same_attack(self, groups):
        paths = [one.record.plan.trials[2].attack["path"] for one in groups[1].evaluations]
        assert paths == ["runs/tiny-0", "runs/tiny-1"]

    def test_attacks_in_a_few_words(self, groups):
        assert [group.trials for group in groups[:2]] == [
            "AutoAttack, pgd (2 trials)",
            "AutoAttack, pgd, reference (3 trials)",
        ]

    @pytest.mark.slow
    def test_curves_need_two_radii_and_take_the_stronger_evaluation(self, groups, runs, tmp_path):
        ((training, _), curves), *others = radius_curves(groups).items()
        assert (training, others, [curve.label for curve in curves]) == ("tiny", [], ["none"])
        assert curves[0].groups == (groups[3], groups[0])
        trials = config_of(0.05, "none", 0).trials
        longer = replace(
            config_of(0.05, "none", 0), trials=(trials[0], Trial("pgd", PGD(Linf(0.05), steps=99, step_size=0.01)))
        )
        folders = [write(tmp_path / str(seed), longer, seed, {"clean": 2, "apgd": 4, "pgd": 9}) for seed in (0, 1)]
        (curves,) = radius_curves(groups_of(read_evaluations([*folders, *runs]))).values()
        assert [group.values(robust)[0].mean() for group in curves[0].groups] == [77.5, 75.0]

    @pytest.mark.slow
    def test_of_an_undefended_training_most_seeds_count_and_then_most_attacks(self, groups, runs, tmp_path):
        """Whatever their order."""
        config = config_of(0.1, "none", 0)
        more = replace(config, trials=(*config.trials, Trial("more", PGD(Linf(0.1), steps=1, step_size=0.1))))
        less = replace(config, trials=config.trials[:1])
        write(tmp_path / "more", more, 0, {"clean": 2, "apgd": 3, "pgd": 3, "more": 3})
        for seed in (0, 1):
            write(tmp_path / f"less-{seed}", less, seed, {"clean": 2, "apgd": 3})
        folders = [tmp_path / "more", tmp_path / "less-0", tmp_path / "less-1"]
        for order in ([*folders, *runs], [*runs, *folders]):
            (found, *_) = undefended_trainings(groups_of(read_evaluations(order)))
            assert found["tiny"] == groups[0] and found["longer"] == groups[2]


def accuracy(*wrong):
    """Of seeds that err on the first so many of the 40 images, as it is written."""
    return written(Estimate.of_accuracies([outcomes(count) for count in wrong]))


def outcomes(wrong):
    return np.where(np.arange(IMAGES) < wrong, 0.0, 100.0)


def written(estimate, form="{:.2f}"):
    low, high = estimate.interval
    return f"{form.format(estimate.value)} [{low:.2f}, {high:.2f}]"


def points(*images, apart=0):
    """Of seeds that gain so many images, or lose them, beginning so many images after those of the seed before."""
    gained = [np.roll(np.sign(n) * (100 - outcomes(abs(n))), seed * apart) for seed, n in enumerate(images)]
    return written(Estimate.of_differences(gained), "{:+.2f}")


class TestNumbers:
    """Of 40 images an image is 2.5 points."""

    def test_headline(self, groups):
        rows = {(row[0], row[1], row[4], row[5]): row for row in rows_of(headline_table(groups))}
        assert list(rows) == [
            ("tiny", "none", accuracy(10, 14), accuracy(10, 14)),
            ("tiny", "ensemble state", accuracy(6, 10), accuracy(13, 17)),
            ("longer", "none", accuracy(3, 3), accuracy(3, 3)),
            ("tiny", "none", accuracy(5, 6), accuracy(5, 6)),
        ]
        assert [row[2:4] for row in rows.values()] == [["2", accuracy(2, 2)]] * 2 + [
            ["2", accuracy(1, 1)],
            ["2", accuracy(2, 2)],
        ]
        assert accuracy(3, 3) == "92.50 [79.61, 98.43]"  # Clopper and Pearson's interval of 37 of 40

    def test_seeds_that_agree_are_said_to(self, groups, out):
        rows = [row for rows in headline_table(groups).sections.values() for row in rows]
        said = [[cell.note for cell in row[3:6]] for row in rows]
        agree = "no spread between seeds"
        assert said == [[agree, "", ""], [agree, "", ""], [agree, agree, agree], [agree, "", ""]]
        last = (out / "headline.csv").read_text().splitlines()[3]
        assert f"reference protocol: not trustworthy; reference protocol: {agree}; adaptive worst case: " in last

    def test_a_raised_flag_takes_the_trust_away(self, groups):
        rows = [row for rows in headline_table(groups).sections.values() for row in rows]
        assert [row[5].warning for row in rows] == ["", "", "not trustworthy", ""]
        flags = [str(row[6]) for row in rows]
        assert flags[2].startswith("NOT TRUSTWORTHY, an upper bound only: zero gradients (2 of 2); not checked: ")
        assert flags[0].startswith("none raised; not checked: black box beats white box, ")

    def test_defences_are_compared_seed_by_seed(self, groups):
        """-3 images for each seed, others than for the other; that is little of 40 images. Reference: +4."""
        row = rows_of(pair_table("defences", "", defence_pairs(groups), DEFENCE))[0]
        title = "tiny: ensemble state against none"
        none = "no difference shown"
        assert row == [
            title,
            "2",
            points(0, 0),
            points(4, 4, apart=4),
            none,
            points(-3, -3, apart=4),
            none,
            "none raised",
        ]

    def test_trainings_are_compared_seed_by_seed(self, groups):
        """17.5 and 27.5 points: the seeds' half-width is 12.706 times 5. Without a defence there is one protocol."""
        table = pair_table("trainings", "", training_pairs(groups), TRAINING)
        assert [column.name for column in table.columns[2:5]] == ["clean", "worst case", "verdict"]
        row = rows_of(table)[0]
        assert row[0] == "longer against tiny"
        assert row[3:] == [points(7, 11), "no difference shown", "longer: zero gradients (2 of 2)"]
        assert points(7, 11) == "+22.50 [-42.63, 87.19]"

    def test_sentences(self, groups):
        (text,) = [sentences(pair, DEFENCE) for pair in defence_pairs(groups)]
        lost = Estimate.of_differences([outcomes(6) - outcomes(13), outcomes(10) - outcomes(17)])
        worst, under_reference, taken = (
            f"{cell.replace(' [', ' points (95 % interval [')}, 2 seeds, no spread between seeds)"
            for cell in (points(-3, -3, apart=4), points(4, 4, apart=4), written(lost))
        )
        assert text == (
            f"tiny: ensemble state against none: no difference shown under the adaptive worst case, {worst}; no "
            f"difference shown under the reference protocol, {under_reference}. The adaptive attacks take away "
            f"{taken} of its accuracy under the reference protocol."
        )
        (text,) = [sentences(pair, TRAINING) for pair in training_pairs(groups)]
        assert (
            "no difference shown under the worst case, +22.50 points (95 % interval [-42.63, 87.19], 2 seeds)" in text
        )
        assert "reference protocol" not in text
        assert text.endswith(". Red flags are raised, so this is not trustworthy.")

    def test_intervals_of_one_seed_are_for_other_images_alone(self, groups):
        one = [replace(group, evaluations=group.evaluations[:1]) for group in groups]
        assert rows_of(headline_table(one))[0][2:6] == ["1", accuracy(2), accuracy(10), accuracy(10)]
        (pair,) = defence_pairs(one)
        row = rows_of(pair_table("defences", "", [pair], DEFENCE))[0]
        single = "no difference shown, of this seed alone"
        assert row[1:] == ["1", points(0), points(4), single, points(-3), single, "none raised"]
        assert f"{points(4)[8:-1]}], for other images alone, one seed)" in sentences(pair, DEFENCE)

    @pytest.mark.slow
    def test_no_verdict_on_a_defence_that_was_not_shown_what_broke_the_undefended_predictor(self, runs, tmp_path):
        for seed in (0, 1):
            config = config_of(0.1, "ensemble state", seed)
            own = replace(config, trials=config.trials[:2])
            write(tmp_path / str(seed), own, seed, {"clean": 2, "apgd": 3, "pgd": 3})
        undefended = [run / "evaluation" / "a" for run in runs[:2]]
        (pair,) = defence_pairs(groups_of(read_evaluations([*undefended, tmp_path / "0", tmp_path / "1"])))
        row = rows_of(pair_table("defences", "", [pair], DEFENCE))[0]
        verdict = "no verdict (not shown the images that broke the undefended predictor)"
        assert row[3:] == ["–", "–", points(7, 11), verdict, "none raised"]
        assert f"{verdict} under the adaptive worst case" in sentences(pair, DEFENCE)

    def test_without_attack_there_is_clean_accuracy_only(self, tmp_path):
        write(tmp_path / "none", EvalConfig(Linf(0.0), ()), 0, {"clean": 3})
        groups = groups_of(read_evaluations([tmp_path / "none"]))
        table = headline_table(groups)
        assert rows_of(table) == [["tiny", "none", "1", accuracy(3), "–", "nothing has attacked it", "none"]]
        assert quotes(groups) == []
        report.main([str(tmp_path / "none"), "--out", str(tmp_path / "report")])
        text = (tmp_path / "report" / "index.html").read_text()
        assert "Nothing has been attacked." in text
        assert "Nothing has attacked these predictors, so there is no robust accuracy to quote." in text

    def test_cost_and_what_it_is_a_multiple_of(self, page):
        costs = {tuple(row[:2]): row[3:] for row in page.tables["cost.csv"][1:]}
        agree = " no spread between seeds"
        assert costs["tiny", "none"] == [f"7{agree}", "–", f"0.001{agree}", "–"]
        own = [f"{value}{agree}" for value in ("21", "3.00", "0.004", "4.00")]
        assert costs["tiny", "ensemble state"] == own

    def test_state_and_attack_table_is_the_mean_over_seeds(self, page, runs):
        table = page.tables["accuracy-1-tiny-none.csv"]
        stored = [json.loads((run / "evaluation/a/evaluation.json").read_text())["accuracy"] for run in runs[:2]]
        assert table[0] == ["images of", "z_1", "z_2", "z_3", "ensemble", "deployed"]
        assert [row[0] for row in table[1:]] == ["clean", "apgd", "AutoAttack", "pgd", "union"]
        for name, *cells in table[1:]:
            means = [np.mean([100 * one[name][state] for one in stored]) for state in table[0][1:]]
            assert cells == [f"{mean:.2f}" for mean in means]

    def test_classes_have_their_names_and_means_over_seeds(self, page, runs):
        table = page.tables["classes-1-tiny-none.csv"]
        assert table[0] == ["class", "images", "clean", "worst case"]
        assert [row[0] for row in table[1:]] == [*NAMES, *map(str, range(3, 10))]
        stored = [json.loads((run / "evaluation/a/evaluation.json").read_text())["classes"] for run in runs[:2]]
        for row, *classes in zip(table[1:], *stored, strict=True):
            means = [100 * np.mean([one[name] for one in classes]) for name in ("clean", "attacked")]
            assert row[1:] == [str(classes[0]["images"]), *(f"{mean:.2f}" for mean in means)]
        assert "not trustworthy" in page.tables["classes-3-longer-none.csv"][1][3]

    def test_numbers_along_the_dynamics(self, page, runs):
        """Accuracies and entropies, over the images of both seeds."""
        found, entropies = [], []
        for run in runs[:2]:
            with np.load(run / "evaluation/a/evaluation.npz") as file:
                right = (file["attacked_label"] == file["y"][:, None]) & (file["clean_label"] == file["y"][:, None])
                found.append(100.0 * right[:, 1])
                entropies.append(file["clean_entropy"][:, 1])
        row = page.tables["dynamics-1-tiny.csv"][2]
        assert row[0] == "z_2"
        assert row[2].startswith(written(Estimate.of_accuracies(found)))
        interval = Estimate.of_images(entropies).interval
        assert interval is not None
        low, high = interval
        assert row[3] == f"{np.mean(entropies):.3f} [{low:.3f}, {high:.3f}]"
        assert page.tables["dynamics-1-tiny.csv"][4][5:] == ["–", "–"]  # the residual of the mean of the states

    def test_undefended_trainings_are_shown_side_by_side(self, page):
        shown = [row for row in page.tables["dynamics-4-training-configs-without-a-defence.csv"] if row[0] == "z_1"]
        own = [page.tables[f"dynamics-{name}.csv"][1] for name in ("1-tiny", "2-longer")]
        assert own[0] != own[1]
        assert shown == own

    def test_flags_are_listed_with_value_and_threshold(self, page):
        rows = {row[0]: row for row in page.tables["flags-3-longer-none.csv"]}
        assert rows["zero gradients"][1:3] == ["1", "0.01"]
        assert rows["zero gradients"][3].startswith("raised")
        assert rows["no plateau"][1:4] == ["–", "0.005", "not checked"]
        assert rows["randomness"][1:4] == ["0", "0.01", "not raised"]


class TestPage:
    def test_nothing_is_loaded_from_elsewhere(self, page):
        assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "base")]
        addresses = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
        assert addresses
        assert all(text.startswith(("#", "data:image/png;base64,")) for text in addresses)
        identifiers = {a["id"] for _, a in page.tags if "id" in a}
        assert {text[1:] for text in addresses if text.startswith("#")} <= identifiers

    def test_it_can_be_read_by_everyone(self, page, out):
        assert (out / "index.html").read_text().startswith("<!doctype html>")
        assert page.all("html") == [{"lang": "en"}]
        assert len(page.all("title")) == 1
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
        assert all(picture["alt"] for picture in page.all("img"))
        assert len(page.all("caption")) == len(page.all("table"))
        assert {attributes.get("scope") for attributes in page.all("th")} == {"col", "row", "rowgroup"}

    def test_parts_in_their_order(self, page):
        order = ["headline", "comparisons", "attacks", "classes", "images", "figures", "flags", "cost", "protocol"]
        assert [attributes["id"] for attributes in page.all("section")] == order

    def test_the_number_its_flags_and_its_budget_come_first(self, page):
        text = " ".join("".join(page.text).split())
        first = ["Robust accuracy to quote ≤ 70.00 %", "No red flags raised", "Attacks AutoAttack, pgd (2 trials)"]
        then = ["Radius Linf ε = 0.1", "Not checked black box", "8 evaluations by", "8 warnings about the models"]
        last = ["Accuracy in percent", "Every defence minus", "accuracy of every state", "all checks, with"]
        places = [text.index(part) for part in (*first, *then, *last)]
        assert places == sorted(places)

    def test_details_are_folded_and_a_link_opens_them(self, page, out):
        """But red flags that are raised are shown at once."""
        text = (out / "index.html").read_text()
        fold = r'<section id="(\w+)">\n<details class="part"( open)?>\n<summary><h2>.*?</summary>\n<div id="in-(\w+)">'
        folded = ["attacks", "classes", "images", "figures", "flags", "cost", "protocol"]
        assert re.findall(fold, text) == [(name, " open" if name == "flags" else "", name) for name in folded]
        assert {f"#in-{name}" for name in folded} < {attributes["href"] for attributes in page.all("a")}
        flags = text[text.index('id="in-flags"') : text.index('id="cost"')]
        assert re.findall(r"<details( open)?>", flags) == ["", "", " open", ""]  # of the third group alone

    def test_untrustworthy_numbers_are_marked(self, page):
        """Wherever they are: as the worst case and the reference protocol, in comparisons, in the table of attacks."""
        rows = {tuple(row[:2]): row for row in page.tables["headline.csv"][1:]}
        agree = "no spread between seeds"
        marked = [f"{sign}{accuracy(3, 3)} not trustworthy {agree}" for sign in ("", "≤ ")]
        assert [" ".join(text.split()) for text in rows["longer", "none"][4:6]] == marked
        assert re.fullmatch(r"no difference shown\s+not trustworthy", page.tables["trainings.csv"][1][4])
        assert re.fullmatch(r"≤ 92.50\s+not trustworthy", page.tables["accuracy-3-longer-none.csv"][-1][-1])
        assert page.tables["defences.csv"][1][6] == "no difference shown"

    def test_tables_are_those_of_the_csv_files(self, page, out):
        assert {path.name for path in out.glob("*.csv")} == set(page.tables)
        for name, rows in page.tables.items():
            with (out / name).open() as file:
                written = list(csv.reader(file))
            titled = written[0][0] != rows[0][0]
            assert len(written) == len(rows)
            for row, shown in zip(written[1:], rows[1:], strict=True):
                assert numbers(row[titled:]) == numbers(shown), name

    def test_figures_are_those_of_the_png_files(self, page, out):
        shown = [base64.b64decode(picture["src"].partition(",")[2]) for picture in page.all("img")]
        titles = ["1-tiny", "2-longer", "3-tiny", "4-training-configs-without-a-defence"]
        names = [f"dynamics-{title}-{what}" for title in titles for what in QUANTITIES]
        panels = ["1-tiny-none", "2-tiny-ensemble-state", "3-longer-none", "4-tiny-none"]
        names += ["radius-1-tiny", *(f"images-{name}" for name in panels)]
        assert sorted(shown) == sorted((out / f"{name}.png").read_bytes() for name in names)
        assert len(list(out.glob("*.png"))) == 17
        assert all(picture.startswith(b"\x89PNG") for picture in shown)

    def test_images_are_those_of_the_first_seed_that_has_them(self, runs, tmp_path):
        for run in runs[:2]:
            shutil.copytree(run / "evaluation" / "a", tmp_path / run.name)
        folders = [tmp_path / run.name for run in runs[:2]]
        (folders[0] / "images.png").unlink()
        (folders[1] / "images.png").write_bytes(b"of seed 1")
        assert report_files(read_evaluations(folders))["images-1-tiny-none.png"] == b"of seed 1"
        (folders[1] / "images.png").unlink()
        files = report_files(read_evaluations(folders))
        assert "images-1-tiny-none.png" not in files and b'id="images"' not in files["index.html"]

    @pytest.mark.slow
    def test_what_strangers_wrote_is_text(self, tmp_path):
        wrong = {"clean": 2, "apgd": 3, "pgd": 4}
        folder = write(tmp_path / "a", config_of(0.1, "none", 0), 0, wrong, workdir='"><img src=x>', masked=True)
        strange = "</style><script>x</script>"
        edit(folder, lambda content: content.update(defence=strange, warnings=["<em>"]))
        edit(folder, lambda content: content["red_flags"][0].update(raised=True, name="<q>", explanation="<i>"))
        page = Page(report_files(read_evaluations([folder]))["index.html"].decode())
        assert not {"script", "em", "q", "i"} & {tag for tag, _ in page.tags}
        assert all(picture["src"].startswith("data:image/png;base64,") for picture in page.all("img"))
        for written in (f'training "><img src=x>, defence {strange}', f"{strange}, seed 0: <em>", "⚑ <q>: <i>"):
            assert written in "".join(page.text)


@pytest.mark.slow
def test_the_page_only_formats_what_the_report_has(runs, out, monkeypatch):
    report = Report.of(read_evaluations(runs))
    assert [len(part) for part in (report.defences.pairs, report.trainings.pairs, report.sections)] == [1, 1, 17]
    for name in ("Estimate.of_accuracies", "Estimate.of_differences"):  # nothing is computed from here on
        monkeypatch.setattr(f"deq_jax.reporting.statistics.{name}", None)
    assert render(report) == (out / "index.html").read_text()
    assert "<li>said</li>" in render(replace(report, defences=replace(report.defences, sentences=("said",))))


def test_a_column_says_how_a_row_fills_it():
    length: Field[str] = Field(Column("b"), lambda text: text_cell(f"{len(text)}"))
    columns = Field(Column("a", kind="text"), text_cell), length
    table = filled("name", "", "part", columns, sectioned(["xy", "z", "xyz"], lambda text: text[0]))
    assert table.csv() == "part,a,b\nx,xy,2\nx,xyz,3\nz,z,1\n"
    assert filled("name", "", "part", columns[1:], {"": ["xy"]}).csv() == "b\n2\n"


def test_a_text_in_a_csv_file_is_no_formula_and_a_number_stays_one():
    texts = ["=1+1", "+cmd", "-x", "@sum", "\t=1", "-0.5", "+1.25", "-1e-3", "a=b", ""]
    row = tuple(text_cell(text) for text in texts)
    table = Table("name", "", "=part", tuple(Column("=head") for _ in row), {"=title": [row]})
    head, line = csv.reader(table.csv().splitlines())
    assert head == ["'=part"] + ["'=head"] * len(row)
    assert line == ["'=title", "'=1+1", "'+cmd", "'-x", "'@sum", "'\t=1", "-0.5", "+1.25", "-1e-3", "a=b", ""]


@pytest.mark.slow
def test_flagged_points_of_a_curve_look_different(tmp_path):
    wrong = {"clean": 2, "apgd": 3, "pgd": 4}
    write(tmp_path / "far", config_of(0.1, "none", 0), 0, wrong)
    pictures = []
    for masked in (False, True):
        write(tmp_path / "near", config_of(0.05, "none", 0), 0, wrong, masked=masked)
        files = report_files(read_evaluations([tmp_path / "far", tmp_path / "near"]))
        pictures.append(files["radius-1-tiny.png"])
        assert ("zero gradients" in files["radius-1-tiny.csv"].decode()) == masked
    assert pictures[0] != pictures[1]


QUANTITIES = ("accuracy", "entropy", "residual")


def numbers(texts):
    return re.findall(r"[-+]?\d[\d.]*(?:e[-+]\d+)?", " ".join(texts))


def test_protocol_names_what_determines_an_evaluation(groups):
    text = protocol_text(groups[1].evaluations[1])
    lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    assert lines["training"] == "runs/tiny-1, seed 1, checkpoint best, step 17"
    assert lines["solver"].startswith("T = 4, tolerance 0.001: Broyden(")
    assert lines["gradient"] == "K = 2: Phantom(steps=2, damping=0.5)"
    assert lines["threat"] == "Linf, epsilon = 0.1"
    assert lines["images"] == "40 of Digits, test split"
    assert lines["evaluation"] == "batch size 16, seed of the attacks 0"
    assert lines["draws"] == "the predictor is deterministic"
    assert lines["schedule"].startswith("epochs 1, batch_size 64, pretrain_steps 2, optimizer AdamCosine(")
    assert lines["versions"] == "deq_jax 0.1.0, jax 0.10"
    assert lines["deployed"].startswith("ensemble state: Equilibrium(")
    assert "attacks (3):\n  apgd [AutoAttack]: APGD(threat=Linf(epsilon=0.1), steps=5, " in text
    assert "  reference.pgd [reference]: Transfer(path=runs/tiny-1), gradients: Direct" in text


def test_protocol_names_code_devices_and_command(groups):
    one = groups[1].evaluations[0]
    environment = {
        "versions": {"python": "3.12.1", "jax": "0.12.0"},
        "code": {"revision": "abc", "unchanged": False},
        "platform": {"device_kind": "cpu", "devices": 8},
        "command": {"arguments": ["evaluate.py", "--workdir", "my\nruns"]},
    }

    def text(environment):
        return protocol_text(replace(one, provenance=replace(one.provenance, environment=environment)))

    lines = text(environment).splitlines()
    assert "versions: python 3.12.1, jax 0.12.0" in lines and "devices: 8 x cpu" in lines
    assert "code: revision abc, with changes" in lines and "command: evaluate.py --workdir 'my runs'" in lines
    assert "code: revision None, changes unknown" in text({"code": {"revision": None, "unchanged": None}})
    assert "code:" not in text(None) and "code:" not in text({"code": 3})


def test_protocol_names_the_early_state_and_the_draws(groups):
    one = groups[1].evaluations[0]
    evaluation = one.record.evaluation | {"draws": 20}
    record = replace(one.record, defence="early state", early_state=(0.1, 0.5, 0.3), evaluation=evaluation)
    text = protocol_text(replace(one, record=record))
    assert "deployed: early state z_2: Equilibrium(" in text
    assert "draws: 20 (EOT)" in text


def test_configs_are_written_briefly():
    tree = to_tree(PGD(Linf(8 / 255), steps=3, step_size=0.1))
    assert brief(tree).startswith(
        "PGD(threat=Linf(epsilon=8/255), steps=3, step_size=0.1, restarts=1, loss=cross_entropy, "
    )
    assert brief([tree["loss"], None, True, 2]) == "[cross_entropy, None, True, 2]"
    assert [number(value) for value in (0.1, 0.2, 2 / 255, 0.0, 1 / 3)] == ["0.1", "0.2", "2/255", "0", "0.333333"]


def test_csv_has_a_column_for_every_number():
    columns = Column("a", kind="text"), Column("b", ("", "low", "high"))
    row, single = (Cell(("x,y",)), Cell(("3", "4", "5"))), (Cell(("z",)), Cell(("",)))
    table = Table("name", "", "part", columns, {"p": [row], "q": [single]})
    assert table.csv() == 'part,a,b,b low,b high\np,"x,y",3,4,5\nq,z,,,\n'
    assert replace(table, sections={"": [row]}).csv() == 'a,b,b low,b high\n"x,y",3,4,5\n'
    assert [str(cell) for cell in (*row, *single)] == ["x,y", "3 [4, 5]", "z", "–"]


def test_csv_has_the_remarks():
    columns = Column("a", kind="text"), Column("b")
    rows: list[tuple[Cell, ...]] = [(Cell(("x",)), Cell(("1",), "beware", "few")), (Cell(("y",)), Cell(("2",)))]
    assert Table("name", "", "", columns, {"": rows}).csv() == "a,b,remarks\nx,1,b: beware; b: few\ny,2,\n"


class TestQuotes:
    """The first sentence: the number to quote, with all that belongs to it."""

    def test_the_highest_without_red_flags_in_each_setting(self, groups, page):
        far, near = (quote.sentence for quote in quotes(groups))
        assert far == (
            "Robust accuracy to quote: at most 70.00 % (95 % interval [4.63, 100.00], 2 seeds) of 40 images of Digits, "
            "test split, best checkpoint, Linf ε = 0.1; training tiny, defence none, the highest of 3 configs and "
            "defences without red flags; attacks: AutoAttack, pgd (2 trials); no red flags raised."
        )
        assert near.startswith("Robust accuracy to quote: at most 86.25 % (95 % interval [")
        assert "Linf ε = 0.05; training tiny, defence none; attacks: " in near
        text = "".join(page.text)
        assert text.index("Robustness report\n") < text.index(far) < text.index("8 evaluations by deq_jax")

    def test_red_flags_take_it_away(self, groups):
        (quote,) = quotes([groups[2]])
        assert list(quote.flags) == ["zero gradients, 2 of 2 seeds"] and quote.flags.popitem()[1]
        text = quote.sentence
        assert text.startswith("No robust accuracy to quote, since red flags are raised: at most 92.50 % (95 % ")
        assert ", 2 seeds, no spread between seeds)" in text
        assert text.endswith("; red flags raised: zero gradients.")

    def test_of_several_evaluations_the_lowest_counts(self, runs, tmp_path):
        config = replace(config_of(0.1, "none", 0), trials=config_of(0.1, "none", 0).trials[:1])
        weak = write(tmp_path / "weak", config, 0, {"clean": 2, "apgd": 2})
        (quote,) = quotes(groups_of(read_evaluations([runs[0] / "evaluation" / "a", weak])))
        text = quote.sentence
        assert quote.value == "75.00 %" and "at most 75.00 %" in text and "for other images alone, one seed)" in text

    def test_the_budget_is_told_with_its_cost(self, runs, tmp_path):
        shutil.copytree(runs[0] / "evaluation" / "a", tmp_path / "a")
        edit(tmp_path / "a", lambda content: content["evaluation"].update(budget="quick"))
        edit(tmp_path / "a", lambda content: [one.update(gradient_queries=20) for one in content["trials"].values()])
        (quote,) = quotes(groups_of(read_evaluations([tmp_path / "a"])))
        trials = "AutoAttack, pgd (2 trials)"
        assert quote.facts["Attacks"] == f"{trials}; budget quick: at most 40 gradients per image"


class TestAdaptive:
    def words(self, folder, config, wrong):
        write(folder, config, 0, wrong)
        text = report_files(read_evaluations([folder]))["index.html"].decode()
        return text.replace(str(folder), "").casefold()

    @pytest.mark.slow
    def test_what_was_not_adaptive_is_not_called_so(self, tmp_path):
        text = self.words(tmp_path, config_of(0.1, "none", 0), {"clean": 2, "apgd": 3, "pgd": 4})
        assert "adaptive" not in text and "reference protocol" not in text
        assert '<th scope="col" class="main">worst case</th>' in text

    @pytest.mark.parametrize("change", ["surrogate", "transfer", "defence"])
    def test_what_was_adaptive_is(self, tmp_path, change):
        config = config_of(0.1, "none", 0)
        first, second = config.trials
        if change == "defence":
            config = replace(config, predictor=tiny.classifier(dropout=0.1), defence="other")
        else:
            changes = {"surrogate": {"surrogate": ThroughSolver()}, "transfer": {"attack": Transfer("a.npz")}}
            config = replace(config, trials=(first, replace(second, **changes[change])))
        text = self.words(tmp_path, config, {"clean": 2, "apgd": 3, "pgd": 4})
        assert ">adaptive worst case</th>" in text
        assert ("reference protocol" in text) == (change == "defence")


class TestUnfinished:
    def test_folders_without_a_finished_evaluation_are_named(self, runs, tmp_path, capfd):
        shutil.copytree(runs[0], tmp_path / "a")
        for name in ("b/evaluation/x", "a/evaluation/y", "c"):
            (tmp_path / name).mkdir(parents=True)
        for name in ("b/evaluation/x", "a/evaluation/y"):
            (tmp_path / name / "manifest.json").touch()
        report.main([*(str(tmp_path / name) for name in "abc"), "--out", str(tmp_path / "out")])
        missing = ", ".join(str(tmp_path / name) for name in ("a/evaluation/y", "b/evaluation/x", "c"))
        assert f"Not evaluated: {missing}" in "".join(Page((tmp_path / "out" / "index.html").read_text()).text)
        assert f"not evaluated: {missing}" in capfd.readouterr().out.replace("\n", "")

    def test_nothing_is_said_where_all_are_finished(self, page, runs):
        assert unfinished([*runs, runs[0] / "evaluation" / "a"]) == []
        assert "Not evaluated" not in "".join(page.text)


@pytest.mark.slow
def test_trials_that_found_nothing_left_to_attack_say_so(tmp_path):
    """Every seed must have had nothing left; otherwise the means are shown."""
    config = replace(config_of(0.1, "none", 0), skip_broken=True)
    rows = []
    for left in ((0, 0), (0, 3)):
        for seed, count in enumerate(left):
            folder = write(tmp_path / str(seed), config, seed, {"clean": 2, "apgd": IMAGES, "pgd": IMAGES})
            edit(folder, lambda content, count=count: content["trials"]["pgd"].update(attacked=count))
        (group,) = groups_of(read_evaluations([tmp_path / "0", tmp_path / "1"]))
        rows.append({row[0]: row[1:] for row in rows_of(accuracy_table("a", group))})
    assert rows[0]["pgd"] == ["–"] * 4 + ["nothing left to attack"]
    assert rows[0]["apgd"][-1] == rows[1]["pgd"][-1] == "0.00"


def edit(folder, change):
    path = folder / "evaluation.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class TestMistakes:
    @pytest.fixture
    def copies(self, runs, tmp_path):
        """Two evaluations that may be spoiled."""
        folders = [tmp_path / name for name in ("a", "b")]
        for folder, run in zip(folders, runs, strict=False):
            shutil.copytree(run / "evaluation" / "a", folder)
        return folders

    def refused(self, capsys, out, *arguments):
        with pytest.raises(SystemExit) as stop:
            report.main([*map(str, arguments), "--out", str(out)])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1
        return lines[0]

    def test_no_evaluation(self, capsys, tmp_path):
        line = self.refused(capsys, tmp_path / "out", tmp_path)
        expected = "no finished evaluation: expected evaluation.json or evaluation/*/evaluation.json in it"
        assert line == f"error: {tmp_path}: {expected}"
        assert not (tmp_path / "out").exists()

    def test_no_folder(self, capsys, tmp_path, copies):
        line = self.refused(capsys, tmp_path / "out", copies[0], tmp_path / "nothing")
        assert line == f"error: {tmp_path / 'nothing'}: no such folder"

    def test_damaged(self, capsys, tmp_path, copies):
        text = (copies[1] / "evaluation.json").read_text()
        (copies[1] / "evaluation.json").write_text(text[:-100])
        line = self.refused(capsys, tmp_path / "out", *copies)
        assert line.startswith(f"error: {copies[1]}/evaluation.json: not valid JSON (")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content.pop("accuracy"),
            lambda content: content.update(rows=3),
            lambda content: content["rows"]["z_1"]["clean"].update(entropy="high"),
            lambda content: content["rows"]["z_1"]["clean"].update(entropy=0.123),
            lambda content: content["rows"]["z_1"].pop("attacked"),
            lambda content: content["rows"].pop("z_1"),
            lambda content: content["accuracy"].pop("clean"),
            lambda content: content["accuracy"].pop("pgd"),
            lambda content: content["accuracy"]["pgd"].pop("z_1"),
            lambda content: content["red_flags"][0].pop("value"),
            lambda content: content["evaluation"].pop("threat"),
            lambda content: content["evaluation"]["trials"][0].pop("attack"),
            lambda content: content["config"].pop("seed"),
            lambda content: content["config"].pop("classifier"),
            lambda content: content.update(images=20),
        ],
    )
    def test_incomplete(self, capsys, tmp_path, copies, change):
        edit(copies[1], change)
        line = self.refused(capsys, tmp_path / "out", *copies)
        assert line.startswith(f"error: {copies[1]}/evaluation.json: not an evaluation as this version writes it (")

    def test_other_outcomes(self, capsys, tmp_path, copies):
        """evaluation.npz is another evaluation's, damaged, or missing."""
        shutil.copy(copies[0] / "evaluation.npz", copies[1])
        spoils = [None, lambda path: path.write_bytes(path.read_bytes()[:500]), lambda path: path.unlink()]
        for spoil in spoils:
            if spoil:
                spoil(copies[1] / "evaluation.npz")
            line = self.refused(capsys, tmp_path / "out", *copies)
            assert line.startswith(f"error: {copies[1]}/evaluation.json: not an evaluation as this version writes it (")
            assert "evaluation.npz" in line

    def test_twice_the_same(self, capsys, tmp_path, copies):
        edit(copies[1], lambda content: content["config"].update(seed=0))
        line = self.refused(capsys, tmp_path / "out", *copies)
        same = "the same training config, defence, seed 0, images, radius and attacks"
        assert line == f"error: {copies[1]} has {same} as {copies[0]}: expected one of the two"

    @pytest.mark.slow
    def test_a_folder_that_cannot_be_written(self, capsys, tmp_path, copies):
        (tmp_path / "file").touch()
        assert "cannot write there" in self.refused(capsys, tmp_path / "file", *copies)


def test_warnings_on_the_model_are_shown(tmp_path, runs):
    shutil.copytree(runs[0] / "evaluation" / "a", tmp_path / "a")
    edit(tmp_path / "a", lambda content: content.update(warnings=["clean accuracy is at chance"]))
    page = Page(report_files(read_evaluations([tmp_path / "a"]))["index.html"].decode())
    assert "Warning: tiny, none, seed 0: clean accuracy is at chance" in "".join(page.text)


def test_what_an_evaluation_may_lack(tmp_path, runs):
    """Evaluations that know neither a defence's name nor costs are read, too."""
    shutil.copytree(runs[0] / "evaluation" / "b", tmp_path / "a")
    edit(tmp_path / "a", lambda content: (content.pop("defence"), content.pop("cost")))
    (one,) = read_evaluations([tmp_path / "a"])
    assert (one.record.cost.evaluations, one.record.cost.seconds) == (None, None)
    assert Group("a", one.record.defence, (one,)).is_defended


@pytest.mark.slow
def test_report_on_a_real_training(tmp_path):
    run = str(tmp_path / "tiny-0")
    train.main(["--config", "configs/digits_pgd_at.py", "--workdir", run, *assignments(*OVERRIDES)])
    evaluate.main(["--workdir", run, "--attack", "pgd", *assignments("steps=1", "restarts=1")])
    report.main([run, "--out", str(tmp_path / "report")])
    stored = json.loads((tmp_path / "tiny-0/evaluation/test-pgd/evaluation.json").read_text())
    (row,) = Page((tmp_path / "report/index.html").read_text()).tables["headline.csv"][1:]
    assert row[:3] == ["tiny", "none", "1"]
    assert f"{100 * stored['robust_accuracy']:.2f}" in row[4]
    assert ("not trustworthy" in row[4]) == any(flag["raised"] for flag in stored["red_flags"])
