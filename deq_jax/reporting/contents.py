"""The tables of a report. Each column says how a row fills it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deq_jax.evaluation.record import PredictionCost
from deq_jax.evaluation.results import Flag
from deq_jax.reporting.archive import CONDITIONS, Evaluation
from deq_jax.reporting.comparisons import Curve, Pair, undefended
from deq_jax.reporting.groups import Group, Quantity, clean, reference, robust
from deq_jax.reporting.statistics import Estimate, paired_quotient
from deq_jax.reporting.tables import (
    INTERVAL,
    Cell,
    Column,
    Field,
    Form,
    Table,
    difference_cell,
    estimate_cell,
    filled,
    sectioned,
    text_cell,
)
from deq_jax.reporting.wording import Words, pair_title, verdict, worst_case
from deq_jax.storage.briefs import number

NOT_TRUSTWORTHY = "NOT TRUSTWORTHY, an upper bound only"

WARNING = "not trustworthy"

NOTHING_LEFT = "nothing left to attack"

OVER_BOTH = "mean and 95 % interval for other training seeds and other images; of one seed, for other images alone"

OVER_SEEDS = "mean and 95 % interval for other training seeds alone"

FORMS: dict[str, Form] = {"accuracy": "{:.2f}".format, "entropy": "{:.3f}".format, "residual": "{:.2e}".format}

CHECKED = {True: "raised", False: "not raised", None: "not checked"}

WHOSE: list[Field[Group]] = [
    Field(Column("training", kind="text"), lambda group: text_cell(group.training)),
    Field(Column("defence", kind="text"), lambda group: text_cell(group.defence)),
]

SEEDS: Field[Group] = Field(Column("seeds"), lambda group: text_cell(str(len(group.evaluations))))

CLEAN: Field[Group] = Field(Column("clean", INTERVAL), lambda group: estimate_cell(group.accuracy(clean)))

ATTACKS: Field[Group] = Field(Column("attacks", kind="text"), lambda group: text_cell(group.trials))

FLAGS: Field[Group] = Field(Column("red flags", kind="text"), lambda group: text_cell(_flags(group)))


def headline_table(groups: Sequence[Group]) -> Table:
    """A row for each training config, defence and set of attacks; a section for each setting."""

    def under_reference(group: Group) -> Cell:
        return estimate_cell(group.accuracy(reference)) if group.is_defended else _robust_cell(group)

    is_defended = any(group.is_defended for group in groups)
    on_reference = [Field(Column("reference protocol", INTERVAL), under_reference)] if is_defended else []
    worst = Field(Column(worst_case(groups), INTERVAL, kind="main"), _robust_cell)
    fields = [*WHOSE, SEEDS, CLEAN, *on_reference, worst, FLAGS, ATTACKS]
    caption = f"Accuracy in percent of the deployed predictor, {OVER_BOTH}"
    return filled("headline", caption, "setting", fields, sectioned(groups, lambda group: str(group.setting)))


def _robust_cell(group: Group) -> Cell:
    return estimate_cell(group.accuracy(robust))._replace(warning=WARNING if group.raised else "")


def _flags(group: Group) -> str:
    if not group.values(robust):
        return "nothing has attacked it"
    unchecked = f"; too few images to say: {', '.join(group.unsure)}" if group.unsure else ""
    unchecked += f"; not checked: {', '.join(group.unchecked)}" if group.unchecked else ""
    return (f"{NOT_TRUSTWORTHY}: {_raised(group)}" if group.raised else "none raised") + unchecked


def _raised(group: Group) -> str:
    seeds = len(group.evaluations)
    return ", ".join(f"{name} ({count} of {seeds})" for name, count in group.raised.items())


def pair_table(name: str, caption: str, pairs: Sequence[Pair], words: Words) -> Table:
    """A row for each pair: differences over the seeds that both have, and their verdicts."""

    def differences(quantity: Quantity) -> Callable[[Pair], Cell]:
        return lambda pair: difference_cell(pair.difference(quantity))

    def verdicts(quantity: Quantity) -> Callable[[Pair], Cell]:
        return lambda pair: text_cell(verdict(pair, pair.difference(quantity), words))

    def seeds(pair: Pair) -> Cell:
        on_clean = pair.difference(clean)
        return text_cell(str(on_clean.seeds if on_clean else 0))

    def marked(pair: Pair) -> Cell:
        return verdicts(robust)(pair)._replace(warning=WARNING if pair.is_flagged else "")

    on_reference = [
        Field(Column("reference protocol", INTERVAL), differences(reference)),
        Field(Column("verdict on it", kind="text"), verdicts(reference)),
    ]
    title = worst_case([group for pair in pairs for group in (pair.first, pair.second)])
    fields = [
        Field(Column("comparison", kind="text"), lambda pair: text_cell(pair_title(pair))),
        Field(Column("seeds"), seeds),
        Field(Column("clean", INTERVAL), differences(clean)),
        *(on_reference if any(pair.first.is_defended for pair in pairs) else []),
        Field(Column(title, INTERVAL, kind="main"), differences(robust)),
        Field(Column("verdict", kind="text"), marked),
        Field(Column("red flags", kind="text"), lambda pair: text_cell(_flags_of_pair(pair))),
    ]
    sections = sectioned(pairs, lambda pair: f"{pair.first.setting}; attacks: {pair.first.trials}")
    return filled(name, caption, "setting", fields, sections)


def _flags_of_pair(pair: Pair) -> str:
    same = pair.first.training == pair.second.training
    named = {group.defence if same else group.training: group for group in (pair.first, pair.second)}
    return "; ".join(f"{name}: {_raised(group)}" for name, group in named.items() if group.raised) or "none raised"


def accuracy_table(name: str, group: Group) -> Table:
    """Accuracy of every predictor on the images of every trial, mean over the seeds."""
    records = [one.record for one in group.evaluations]

    def accuracies(predictor: str) -> Callable[[str], Cell]:
        is_deployed = predictor == "deployed"

        def cell(trial: str) -> Cell:
            done = [record.trials.get(trial) for record in records]
            if all(one is not None and one.attacked == 0 for one in done):
                return text_cell(NOTHING_LEFT if is_deployed else "")
            mean = float(np.mean([100 * record.accuracy[trial][predictor] for record in records]))
            is_doubtful = is_deployed and trial == "union" and bool(group.raised)
            return Cell((f"{mean:.2f}",), warning=WARNING if is_doubtful else "")

        return cell

    fields = [
        Field(Column(predictor, kind="main" if predictor == "deployed" else "number"), accuracies(predictor))
        for predictor in records[0].accuracy["clean"]
    ]
    seeds = f"mean over {len(records)} seeds" if len(records) > 1 else "one seed"
    caption = f"Accuracy (%) of each predictor on the images of each trial, {seeds}"
    images_of = Field(Column("images of", kind="text"), text_cell)
    return filled(name, caption, "", [images_of, *fields], {"": list(records[0].accuracy)})


def classes_table(name: str, group: Group) -> Table:
    """Accuracy of the deployed predictor on each class, mean over the seeds that have it."""
    seeds = [one.record.classes for one in group.evaluations if one.record.classes]
    labels = range(len(seeds[0])) if seeds else range(0)

    def attacked(label: int) -> Cell:
        found = [classes[label].attacked for classes in seeds]
        accuracies = [accuracy for accuracy in found if accuracy is not None]
        return text_cell("") if not accuracies else Cell(_percent(accuracies), WARNING if group.raised else "")

    fields: list[Field[int]] = [
        Field(Column("class", kind="text"), lambda label: text_cell(seeds[0][label].name)),
        Field(Column("images"), lambda label: text_cell(str(seeds[0][label].images))),
        Field(Column("clean"), lambda label: Cell(_percent([classes[label].clean for classes in seeds]))),
        Field(Column(worst_case([group]), kind="main"), attacked),
    ]
    over = f"mean over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    caption = f"Accuracy (%) of the deployed predictor on the images of each class, {over}"
    return filled(name, caption, "", fields, {"": labels} if seeds else {})


def _percent(accuracies: Sequence[float]) -> tuple[str]:
    return (f"{100 * float(np.mean(accuracies)):.2f}",)


def states_table(name: str, groups: Mapping[str, Group]) -> Table:
    """Measurements in every state of the dynamics, clean and attacked; a section for each labelled group."""

    def measured(condition: str, quantity: str) -> Callable[[tuple[Group, str]], Cell]:
        return lambda row: estimate_cell(row[0].in_state(row[1], condition, quantity), FORMS[quantity])

    fields = [
        Field(Column(f"{quantity}, {condition}", INTERVAL), measured(condition, quantity))
        for quantity in FORMS
        for condition in CONDITIONS
    ]
    state: Field[tuple[Group, str]] = Field(Column("state", kind="text"), lambda row: text_cell(row[1]))
    sections = {label: [(group, state) for state in group.evaluations[0].states] for label, group in groups.items()}
    known = "attacked: the worst case of each image; residual of the deployed predictor: the lowest of all states"
    caption = f"Accuracy (%), prediction entropy (nats) and relative residual, {OVER_BOTH}; {known}"
    return filled(name, caption, "predictor", [state, *fields], sections)


def radius_table(name: str, curves: Sequence[Curve]) -> Table:
    """Clean and robust accuracy at several radii; a section for each curve."""
    title = worst_case([group for curve in curves for group in curve.groups])
    epsilon: Field[Group] = Field(Column("epsilon"), lambda group: text_cell(number(group.setting.epsilon)))
    fields = [epsilon, SEEDS, CLEAN, Field(Column(title, INTERVAL, "main"), _robust_cell), FLAGS]
    sections = {curve.label: list(curve.groups) for curve in curves}
    return filled(name, f"Accuracy (%) at several radii, {OVER_BOTH}", "defence", fields, sections)


def flags_table(name: str, group: Group) -> Table:
    """All checks of the evaluations of a group; a section for each seed."""
    fields: list[Field[Flag]] = [
        Field(Column("check", kind="text"), lambda flag: text_cell(flag.name)),
        Field(Column("value"), lambda flag: text_cell("" if flag.value is None else f"{flag.value:.4g}")),
        Field(Column("threshold"), lambda flag: text_cell(f"{flag.threshold:.4g}")),
        Field(
            Column("result", kind="text"),
            lambda flag: Cell((_outcome(flag),), warning="!" if flag.raised else ""),
        ),
        Field(Column("images"), lambda flag: text_cell("" if flag.count is None else f"{flag.count} of {flag.images}")),
        Field(Column("meaning", kind="text"), lambda flag: text_cell(flag.explanation)),
    ]
    sections = {f"training seed {one.seed}": list(one.record.red_flags) for one in group.evaluations}
    caption = "Signs that the attacks have failed; a flag is raised where the value exceeds the threshold beyond chance"
    return filled(name, caption, "evaluation", fields, sections)


def _outcome(flag: Flag) -> str:
    return "too few images to say" if flag.is_unsure else CHECKED[flag.raised]


def cost_table(groups: Sequence[Group]) -> Table:
    """Cost of a prediction, also as a multiple of the undefended predictor's."""

    def mean(quantity: Callable[[Evaluation], float | None]) -> Callable[[Group], Cell]:
        def cell(group: Group) -> Cell:
            own = list(group.values(quantity).values())
            return estimate_cell(Estimate.of_seeds(own) if own else None, "{:.4g}".format)

        return cell

    def multiple(quantity: Callable[[Evaluation], float | None]) -> Callable[[Group], Cell]:
        def cell(group: Group) -> Cell:
            base = undefended(group, groups) if group.is_defended else None
            own = group.values(quantity)
            return estimate_cell(None if base is None else paired_quotient(own, base.values(quantity)))

        return cell

    quantities: dict[str, Callable[[Evaluation], float | None]] = {
        "cell evaluations per image": lambda one: one.record.cost.evaluations,
        "seconds per image": lambda one: one.record.cost.seconds,
    }
    costs = [
        field
        for title, quantity in quantities.items()
        for field in (
            Field(Column(title, INTERVAL), mean(quantity)),
            Field(Column("× undefended", INTERVAL), multiple(quantity)),
        )
    ]
    known = [group for group in groups if any(one.record.cost != PredictionCost() for one in group.evaluations)]
    counted = "cell evaluations: applications to the image; a vector-Jacobian product counts as one"
    caption = f"Cost of a warm prediction, compilation excluded, {OVER_SEEDS}; {counted}"
    return filled(
        "cost", caption, "setting", [*WHOSE, ATTACKS, *costs], sectioned(known, lambda group: str(group.setting))
    )
