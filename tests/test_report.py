"""The report: its numbers against hand-computed ones, its page as HTML, its files, and what a user may get wrong."""

import base64
import csv
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from deq_jax import evaluate, report, train
from deq_jax.attacks import APGD, PGD, Linf
from deq_jax.config import to_tree
from deq_jax.evaluation import Measured
from deq_jax.finished import brief, number, protocol_text, read_evaluations
from deq_jax.pages import report_files
from deq_jax.readouts import EnsembleState
from deq_jax.reports import report_of, write_report
from deq_jax.results import Attempt, Cost, Probe, WorstCase
from deq_jax.studies import (
    Group,
    defence_pairs,
    groups_of,
    labels,
    radius_curves,
    robust,
    training_pairs,
    undefended,
    undefended_trainings,
)
from deq_jax.summaries import DEFENCE, TRAINING, headline_table, pair_table, sentences
from deq_jax.surrogates import deployed
from deq_jax.tables import Cell, Column, Table
from deq_jax.transfers import Transfer
from deq_jax.trials import EvalConfig, Trial
from tests import tiny
from tests.test_cli import TINY, assignments

IMAGES = 40
Y = np.arange(IMAGES) % 10
LOGITS = np.eye(16, 10)


def measured(wrong, rng):
    """Of three raw states, their mean and the deployed predictor, which errs on the first `wrong` images."""
    is_wrong = np.concatenate([rng.random((IMAGES, 4)) < 0.3, (np.arange(IMAGES) < wrong)[:, None]], axis=1)
    margin, residual = np.where(is_wrong, 1.0, -1.0), rng.uniform(0.01, 0.5, (IMAGES, 5))
    residual[:, 3] = np.nan
    return Measured((Y[:, None] + is_wrong) % 10, margin, rng.uniform(0, 2, (IMAGES, 5)), residual)


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
    worst = max(attempts.values(), key=lambda one: one.measured.margin[:, -1].sum()).measured if attempts else clean
    defended = config.predictor is not None
    cost = Cost(np.full(4, 21.0 if defended else 7.0), np.full(3, 0.004 if defended else 0.001))
    probe = Probe(LOGITS, LOGITS, LOGITS, LOGITS)
    return WorstCase(
        config, Y, clean, np.full(IMAGES, masked), np.full(IMAGES, 0.9), probe, cost, attempts, x_adv, worst
    )


def write(folder, config, seed, wrong, *, train=None, workdir="runs/tiny", **options):
    """What `evaluate` writes."""
    train = tiny.get_config(seed=seed) if train is None else replace(train, seed=seed)
    about = {"checkpoint": "best, step 17", "split": "test", "versions": {"deq_jax": "0.1.0", "jax": "0.10"}}
    result = found(config, seed, wrong, **options)
    folder.mkdir(parents=True, exist_ok=True)
    report = {**report_of(result), "workdir": f"{workdir}-{seed}", **about, "config": to_tree(train)}
    write_report(folder, report, result, result.x_adv)
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
        correct = file["correct"][:, : IMAGES // 2]
        np.savez(folder / "evaluation.npz", rows=file["rows"], correct=correct)
    path = folder / "evaluation.json"
    content = json.loads(path.read_text())
    for name, row in zip(content["accuracy"], correct, strict=True):
        content["accuracy"][name]["deployed"] = float(row.mean())
    path.write_text(json.dumps(content | {"images": IMAGES // 2}))


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

    def test_groups_that_differ_in_the_settings_of_an_attack_alone_have_labels_of_their_own(self, tmp_path):
        for name, steps in (("x", 10), ("y", 20)):
            config = replace(
                config_of(0.1, "none", 0), trials=(Trial("pgd", PGD(Linf(0.1), steps=steps, step_size=0.1)),)
            )
            write(tmp_path / name, config, 0, {"clean": 2, "pgd": 3})
        groups = groups_of(read_evaluations([tmp_path / name for name in ("x", "y")]))
        assert labels(groups) == ["none: pgd", "none: pgd #2"]

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
        paths = [one.evaluation["trials"][2]["attack"]["path"] for one in groups[1].evaluations]
        assert paths == ["runs/tiny-0", "runs/tiny-1"]

    def test_attacks_in_a_few_words(self, groups):
        assert [group.trials for group in groups[:2]] == [
            "AutoAttack, pgd (2 trials)",
            "AutoAttack, pgd, reference (3 trials)",
        ]

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
        assert [group.means(robust)[0] for group in curves[0].groups] == [77.5, 75.0]

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


class TestNumbers:
    """Of 40 images an image is 2.5 points; over two seeds the standard error is half their distance."""

    def test_headline(self, groups):
        rows = {(row[0], row[1], row[4], row[5]): row for row in rows_of(headline_table(groups))}
        assert list(rows) == [
            ("tiny", "none", "70.00 ± 5.00", "70.00 ± 5.00"),
            ("tiny", "ensemble state", "80.00 ± 5.00", "62.50 ± 5.00"),
            ("longer", "none", "92.50 ± 0.00", "92.50 ± 0.00"),
            ("tiny", "none", "86.25 ± 1.25", "86.25 ± 1.25"),
        ]
        assert [row[2:4] for row in rows.values()] == [["2", "95.00 ± 0.00"]] * 2 + [
            ["2", "97.50 ± 0.00"],
            ["2", "95.00 ± 0.00"],
        ]

    def test_a_raised_flag_takes_the_trust_away(self, groups):
        rows = [row for rows in headline_table(groups).sections.values() for row in rows]
        assert [row[5].warning for row in rows] == ["", "", "not trustworthy", ""]
        flags = [str(row[6]) for row in rows]
        assert flags[2].startswith("NOT TRUSTWORTHY, an upper bound only: zero gradients (2 of 2); not checked: ")
        assert flags[0].startswith("none raised; not checked: black box beats white box, ")

    def test_defences_are_compared_seed_by_seed(self, groups):
        """-3 images for each seed, others than for the other: 6 of 40 lose 50 points on average, so the standard error
        is 2.859, and t(39) = 2.0227; reference: 8 of 40 gain 50 points, with a standard error of 3.203."""
        table = pair_table("defences", "", defence_pairs(groups), DEFENCE)
        assert rows_of(table) == [
            [
                "tiny: ensemble state against none",
                "2",
                "+0.00 [0.00, 0.00]",
                "+10.00 [3.52, 16.48]",
                "helps",
                "-7.50 [-13.28, -1.72]",
                "hurts",
                "none raised",
            ]
        ]

    def test_trainings_are_compared_seed_by_seed(self, groups):
        """17.5 and 27.5 points: half-widths are 12.706 times 5 over the seeds, 2.0227 times 6.1888 over the images."""
        row = rows_of(pair_table("trainings", "", training_pairs(groups), TRAINING))[0]
        assert row[0] == "longer against tiny"
        assert row[5:] == ["+22.50 [-42.25, 87.25]", "no difference shown", "longer: zero gradients (2 of 2)"]

    def test_sentences(self, groups):
        (text,) = [sentences(pair, DEFENCE) for pair in defence_pairs(groups)]
        assert text == (
            "tiny: ensemble state against none: hurts under the adaptive worst case, -7.50 points (95 % interval "
            "[-13.28, -1.72], 2 seeds); helps under the reference protocol, +10.00 points (95 % interval [3.52, "
            "16.48], 2 seeds). The adaptive attacks take away 17.50 points (95 % interval [7.55, 27.45], 2 seeds) of "
            "what the reference protocol gives it."
        )
        (text,) = [sentences(pair, TRAINING) for pair in training_pairs(groups)]
        assert "no difference shown under the adaptive worst case, +22.50 points (95 % interval [-42.25, 87.25]" in text
        assert text.endswith(". Red flags are raised, so this is not trustworthy.")

    def test_one_seed_has_neither_error_nor_interval(self, groups):
        one = [replace(group, evaluations=group.evaluations[:1]) for group in groups]
        assert rows_of(headline_table(one))[0][2:6] == ["1", "95.00", "75.00", "75.00"]
        row = rows_of(pair_table("defences", "", defence_pairs(one), DEFENCE))[0]
        single = "one seed, no interval"
        assert row[1:] == ["1", "+0.00", "+10.00", single, "-7.50", single, "none raised"]

    def test_no_verdict_on_a_defence_that_was_not_shown_what_broke_the_undefended_predictor(self, runs, tmp_path):
        for seed in (0, 1):
            config = config_of(0.1, "ensemble state", seed)
            own = replace(config, trials=config.trials[:2])
            write(tmp_path / str(seed), own, seed, {"clean": 2, "apgd": 3, "pgd": 3})
        undefended = [run / "evaluation" / "a" for run in runs[:2]]
        (pair,) = defence_pairs(groups_of(read_evaluations([*undefended, tmp_path / "0", tmp_path / "1"])))
        row = rows_of(pair_table("defences", "", [pair], DEFENCE))[0]
        verdict = "no verdict (not shown the images that broke the undefended predictor)"
        assert row[3:] == ["–", "–", "+22.50 [-42.25, 87.25]", verdict, "none raised"]
        assert f"{verdict} under the adaptive worst case" in sentences(pair, DEFENCE)

    def test_without_attack_there_is_clean_accuracy_only(self, tmp_path):
        write(tmp_path / "none", EvalConfig(Linf(0.0), ()), 0, {"clean": 3})
        groups = groups_of(read_evaluations([tmp_path / "none"]))
        table = headline_table(groups)
        assert rows_of(table) == [["tiny", "none", "1", "92.50", "–", "–", "nothing has attacked it", "none"]]
        report.main([str(tmp_path / "none"), "--out", str(tmp_path / "report")])
        assert "Nothing has been attacked." in (tmp_path / "report" / "index.html").read_text()

    def test_cost_and_what_it_is_a_multiple_of(self, page):
        costs = {tuple(row[:2]): row[3:] for row in page.tables["cost.csv"][1:]}
        assert costs["tiny", "none"] == ["7 ± 0", "–", "0.001 ± 0", "–"]
        assert costs["tiny", "ensemble state"] == ["21 ± 0", "3.00 ± 0.00", "0.004 ± 0", "4.00 ± 0.00"]

    def test_state_and_attack_table_is_the_mean_over_seeds(self, page, runs):
        table = page.tables["accuracy-1-tiny-none.csv"]
        stored = [json.loads((run / "evaluation/a/evaluation.json").read_text())["accuracy"] for run in runs[:2]]
        assert table[0] == ["images of", "z_1", "z_2", "z_3", "ensemble", "deployed"]
        assert [row[0] for row in table[1:]] == ["clean", "apgd", "AutoAttack", "pgd", "union"]
        for name, *cells in table[1:]:
            means = [np.mean([100 * one[name][state] for one in stored]) for state in table[0][1:]]
            assert cells == [f"{mean:.2f}" for mean in means]

    def test_numbers_along_the_dynamics(self, page, runs):
        stored = [json.loads((run / "evaluation/a/evaluation.json").read_text())["rows"]["z_2"] for run in runs[:2]]
        a, b = (100 * one["attacked"]["accuracy"] for one in stored)
        row = page.tables["dynamics-1-tiny.csv"][2]
        assert row[0] == "z_2"
        assert row[2] == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2:.2f}"
        assert page.tables["dynamics-1-tiny.csv"][4][5:] == ["–", "–"]  # the residual of the mean of the states

    def test_undefended_trainings_are_shown_side_by_side(self, page):
        shown = [row for row in page.tables["dynamics-4-trainings-without-a-defence.csv"] if row[0] == "z_1"]
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
        order = ["headline", "comparisons", "attacks", "figures", "flags", "cost", "protocol"]
        assert [attributes["id"] for attributes in page.all("section")] == order

    def test_untrustworthy_numbers_are_marked(self, page):
        """Wherever they are: as the worst case and the reference protocol, in comparisons, in the table of attacks."""
        rows = {tuple(row[:2]): row for row in page.tables["headline.csv"][1:]}
        assert re.fullmatch(r"≤ 92.50 ± 0.00\s+not trustworthy", rows["longer", "none"][5])
        assert re.fullmatch(r"92.50 ± 0.00\s+not trustworthy", rows["longer", "none"][4])
        assert re.fullmatch(r"no difference shown\s+not trustworthy", page.tables["trainings.csv"][1][6])
        assert re.fullmatch(r"≤ 92.50\s+not trustworthy", page.tables["accuracy-3-longer-none.csv"][-1][-1])
        assert page.tables["defences.csv"][1][6] == "hurts"

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
        titles = ["1-tiny", "2-longer", "3-tiny", "4-trainings-without-a-defence"]
        names = [f"dynamics-{title}-{what}" for title in titles for what in QUANTITIES]
        assert sorted(shown) == sorted((out / f"{name}.png").read_bytes() for name in [*names, "radius-1-tiny"])
        assert len(list(out.glob("*.png"))) == 13
        assert all(picture.startswith(b"\x89PNG") for picture in shown)


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


def test_protocol_names_the_early_state_and_the_draws(groups):
    one = groups[1].evaluations[0]
    evaluation = one.evaluation | {"draws": 20}
    text = protocol_text(replace(one, defence="early state", early_state=[0.1, 0.5, 0.3], evaluation=evaluation))
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
    columns = Column("a", kind="text"), Column("b", ("", "error")), Column("c", ("", "low", "high"))
    row = Cell(("x,y",)), Cell(("1", "2")), Cell(("3", "4", "5"))
    single = Cell(("z",)), Cell(("1",), "beware"), Cell(("",))
    table = Table("name", "", "part", columns, {"p": [row], "q": [single]})
    assert table.csv() == 'part,a,b,b error,c,c low,c high\np,"x,y",1,2,3,4,5\nq,z,1,,,,\n'
    assert replace(table, sections={"": [row]}).csv() == 'a,b,b error,c,c low,c high\n"x,y",1,2,3,4,5\n'
    assert [str(cell) for cell in (*row, *single)] == ["x,y", "1 ± 2", "3 [4, 5]", "z", "1", "–"]


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
        same = "the same training, defence, seed 0, images, radius and attacks"
        assert line == f"error: {copies[1]} has {same} as {copies[0]}: expected one of the two"

    def test_a_folder_that_cannot_be_written(self, capsys, tmp_path, copies):
        (tmp_path / "file").touch()
        assert "cannot write there" in self.refused(capsys, tmp_path / "file", *copies)


def test_what_an_evaluation_may_lack(tmp_path, runs):
    """Evaluations that know neither a defence's name nor costs are read, too."""
    shutil.copytree(runs[0] / "evaluation" / "b", tmp_path / "a")
    edit(tmp_path / "a", lambda content: (content.pop("defence"), content.pop("cost")))
    (one,) = read_evaluations([tmp_path / "a"])
    assert one.cost == {}
    assert Group("a", one.defence, (one,)).is_defended


@pytest.mark.slow
def test_report_on_a_real_training(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    run = str(tmp_path / "tiny-0")
    train.main(["--config", "configs/digits_pgd_at.py", "--workdir", run, *assignments(*TINY)])
    evaluate.main(["--workdir", run, *assignments("steps=1", "restarts=1")])
    report.main([run, "--out", str(tmp_path / "report")])
    stored = json.loads((tmp_path / "tiny-0/evaluation/test-pgd/evaluation.json").read_text())
    (row,) = Page((tmp_path / "report/index.html").read_text()).tables["headline.csv"][1:]
    assert row[:3] == ["tiny", "none", "1"]
    assert f"{100 * stored['robust_accuracy']:.2f}" in row[5]
    assert ("not trustworthy" in row[5]) == any(flag["raised"] for flag in stored["red_flags"])
