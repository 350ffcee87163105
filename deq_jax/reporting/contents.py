"""What a report on many evaluations says: its tables, and their comparisons in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deq_jax.evaluation.record import PredictionCost
from deq_jax.reporting.archive import CONDITIONS, Evaluation
from deq_jax.reporting.groups import Curve, Group, Pair, clean, reference, robust, undefended
from deq_jax.reporting.statistics import Estimate, paired_quotient
from deq_jax.reporting.tables import INTERVAL, Cell, Column, Form, Table, difference_cell, estimate_cell, text_cell
from deq_jax.reporting.wording import Words, pair_title, verdict, worst_case
from deq_jax.storage.briefs import number

NOT_TRUSTWORTHY = "NOT TRUSTWORTHY, an upper bound only"

WARNING = "not trustworthy"

NOTHING_LEFT = "nothing left to attack"

OVER_BOTH = "mean and 95 % interval for other training seeds and other images; of one seed, for other images alone"

OVER_SEEDS = "mean and 95 % interval for other training seeds alone"

FORMS: dict[str, Form] = {"accuracy": "{:.2f}".format, "entropy": "{:.3f}".format, "residual": "{:.2e}".format}


def headline_table(groups: Sequence[Group]) -> Table:
    """A row for each training, defence and set of attacks; a section for each setting."""
    defended = any(group.is_defended for group in groups)
    columns = (
        Column("training", kind="text"),
        Column("defence", kind="text"),
        Column("seeds"),
        Column("clean", INTERVAL),
        *[Column("reference protocol", INTERVAL)][: int(defended)],
        Column(worst_case(groups), INTERVAL, kind="main"),
        Column("red flags", kind="text"),
        Column("attacks", kind="text"),
    )
    sections: dict[str, list[tuple[Cell, ...]]] = {}
    for group in groups:
        sections.setdefault(str(group.setting), []).append(_headline_row(group, defended))
    caption = f"Accuracy in percent of the deployed predictor, {OVER_BOTH}"
    return Table("headline", caption, "setting", columns, sections)


def _headline_row(group: Group, with_reference: bool) -> tuple[Cell, ...]:
    worst = _robust_cell(group)
    under_reference = estimate_cell(group.accuracy(reference)) if group.is_defended else worst
    return (
        text_cell(group.training),
        text_cell(group.defence),
        text_cell(str(len(group.evaluations))),
        estimate_cell(group.accuracy(clean)),
        *[under_reference][: int(with_reference)],
        worst,
        text_cell(_flags(group)),
        text_cell(group.trials),
    )


def _robust_cell(group: Group) -> Cell:
    return estimate_cell(group.accuracy(robust))._replace(warning=WARNING if group.raised else "")


def _flags(group: Group) -> str:
    if not group.values(robust):
        return "nothing has attacked it"
    unchecked = f"; not checked: {', '.join(group.unchecked)}" if group.unchecked else ""
    return (f"{NOT_TRUSTWORTHY}: {_raised(group)}" if group.raised else "none raised") + unchecked


def _raised(group: Group) -> str:
    seeds = len(group.evaluations)
    return ", ".join(f"{name} ({count} of {seeds})" for name, count in group.raised.items())


def pair_table(name: str, caption: str, pairs: Sequence[Pair], words: Words) -> Table:
    """A row for each pair: differences over the seeds that both have, and what they are called."""
    defended = any(pair.first.is_defended for pair in pairs)
    on_reference = Column("reference protocol", INTERVAL), Column("verdict on it", kind="text")
    columns = (
        Column("comparison", kind="text"),
        Column("seeds"),
        Column("clean", INTERVAL),
        *(on_reference if defended else ()),
        Column(worst_case([group for pair in pairs for group in (pair.first, pair.second)]), INTERVAL, kind="main"),
        Column("verdict", kind="text"),
        Column("red flags", kind="text"),
    )
    sections: dict[str, list[tuple[Cell, ...]]] = {}
    for pair in pairs:
        row = _pair_row(pair, words, defended)
        sections.setdefault(f"{pair.first.setting}; attacks: {pair.first.trials}", []).append(row)
    return Table(name, caption, "setting", columns, sections)


def _pair_row(pair: Pair, words: Words, with_reference: bool) -> tuple[Cell, ...]:
    on_clean, on_reference, worst = (pair.difference(quantity) for quantity in (clean, reference, robust))
    under_reference = difference_cell(on_reference), text_cell(verdict(pair, on_reference, words))
    return (
        text_cell(pair_title(pair)),
        text_cell(str(on_clean.seeds if on_clean else 0)),
        difference_cell(on_clean),
        *(under_reference if with_reference else ()),
        difference_cell(worst),
        text_cell(verdict(pair, worst, words))._replace(warning=WARNING if pair.is_flagged else ""),
        text_cell(_flags_of_pair(pair)),
    )


def _flags_of_pair(pair: Pair) -> str:
    same = pair.first.training == pair.second.training
    named = {group.defence if same else group.training: group for group in (pair.first, pair.second)}
    return "; ".join(f"{name}: {_raised(group)}" for name, group in named.items() if group.raised) or "none raised"


def accuracy_table(name: str, group: Group) -> Table:
    """Accuracy of every predictor on the images of every trial, mean over the seeds."""
    records = [one.record for one in group.evaluations]
    tables = {trial: [record.accuracy[trial] for record in records] for trial in records[0].accuracy}
    predictors = list(tables["clean"][0])
    kinds = ["main" if predictor == "deployed" else "number" for predictor in predictors]
    columns = [Column(predictor, kind=kind) for predictor, kind in zip(predictors, kinds, strict=True)]
    rows = []
    for trial, several in tables.items():
        means = [float(np.mean([100 * table[predictor] for table in several])) for predictor in predictors]
        cells = [text_cell(f"{mean:.2f}") for mean in means]
        if trial == "union" and group.raised:
            cells[-1] = cells[-1]._replace(warning=WARNING)
        if _left_nothing(group, trial):
            cells = [*[text_cell("")] * (len(cells) - 1), text_cell(NOTHING_LEFT)]
        rows.append((text_cell(trial), *cells))
    seeds = f"mean over {len(group.evaluations)} seeds" if len(group.evaluations) > 1 else "one seed"
    caption = f"Accuracy (%) of each predictor on the images of each trial, {seeds}"
    return Table(name, caption, "", (Column("images of", kind="text"), *columns), {"": rows})


def _left_nothing(group: Group, trial: str) -> bool:
    """Whether earlier trials had broken all images of every seed, or all were misclassified as they are."""
    known = [one.record.trials.get(trial) for one in group.evaluations]
    return all(done is not None and done.attacked == 0 for done in known)


def states_table(name: str, groups: Mapping[str, Group]) -> Table:
    """What was measured in every state of the dynamics, clean and attacked; a section for each labelled group."""
    shown = [(quantity, condition) for quantity in FORMS for condition in CONDITIONS]
    columns = [Column(f"{quantity}, {condition}", INTERVAL) for quantity, condition in shown]
    sections = {}
    for label, group in groups.items():
        rows = []
        for state in group.evaluations[0].states:
            found = [(group.in_state(state, condition, quantity), FORMS[quantity]) for quantity, condition in shown]
            rows.append((text_cell(state), *(estimate_cell(estimate, form) for estimate, form in found)))
        sections[label] = rows
    known = "attacked: the worst case of each image; residual of what is deployed: the lowest one of all states"
    caption = f"Accuracy (%), prediction entropy (nats) and relative residual, {OVER_BOTH}; {known}"
    return Table(name, caption, "predictor", (Column("state", kind="text"), *columns), sections)


def radius_table(name: str, curves: Sequence[Curve]) -> Table:
    """Clean and robust accuracy at several radii; a section for each curve."""
    title = worst_case([group for curve in curves for group in curve.groups])
    worst, flags = Column(title, INTERVAL, "main"), Column("red flags", kind="text")
    columns = Column("epsilon"), Column("seeds"), Column("clean", INTERVAL), worst, flags
    sections = {curve.label: [_radius_row(group) for group in curve.groups] for curve in curves}
    return Table(name, f"Accuracy (%) at several radii, {OVER_BOTH}", "defence", columns, sections)


def _radius_row(group: Group) -> tuple[Cell, ...]:
    return (
        text_cell(number(group.setting.epsilon)),
        text_cell(str(len(group.evaluations))),
        estimate_cell(group.accuracy(clean)),
        _robust_cell(group),
        text_cell(_flags(group)),
    )


def flags_table(name: str, group: Group) -> Table:
    """All checks of the evaluations of a group; a section for each seed."""
    columns = Column("check", kind="text"), Column("value"), Column("threshold"), Column("result", kind="text")
    sections: dict[str, list[tuple[Cell, ...]]] = {}
    for one in group.evaluations:
        results = {True: "raised", False: "not raised", None: "not checked"}
        sections[f"training seed {one.seed}"] = [
            (
                text_cell(flag.name),
                text_cell("" if flag.value is None else f"{flag.value:.4g}"),
                text_cell(f"{flag.threshold:.4g}"),
                Cell((results[flag.raised],), warning="!" if flag.raised else ""),
                text_cell(flag.explanation),
            )
            for flag in one.record.red_flags
        ]
    caption = "Signs that the attacks have failed; a flag is raised where the value exceeds the threshold"
    return Table(name, caption, "evaluation", (*columns, Column("what it would mean", kind="text")), sections)


def cost_table(groups: Sequence[Group]) -> Table:
    """What a prediction costs, and as a multiple of the undefended one's."""
    columns = (
        Column("training", kind="text"),
        Column("defence", kind="text"),
        Column("attacks", kind="text"),
        Column("cell evaluations per image", INTERVAL),
        Column("× undefended", INTERVAL),
        Column("seconds per image", INTERVAL),
        Column("× undefended", INTERVAL),
    )
    sections: dict[str, list[tuple[Cell, ...]]] = {}
    for group in groups:
        if any(one.record.cost != PredictionCost() for one in group.evaluations):
            heads = text_cell(group.training), text_cell(group.defence), text_cell(group.trials)
            base = undefended(group, groups)
            cells = [cell for quantity in (_cell_evaluations, _seconds) for cell in _costs(group, base, quantity)]
            sections.setdefault(str(group.setting), []).append((*heads, *cells))
    counted = "cell evaluations: applications to the image; a vector-Jacobian product counts as one"
    caption = f"Cost of a warm prediction, compilation excluded, {OVER_SEEDS}; {counted}"
    return Table("cost", caption, "setting", columns, sections)


def _cell_evaluations(one: Evaluation) -> float | None:
    return one.record.cost.evaluations


def _seconds(one: Evaluation) -> float | None:
    return one.record.cost.seconds


def _costs(group: Group, base: Group | None, quantity: Callable[[Evaluation], float | None]) -> tuple[Cell, Cell]:
    own = group.values(quantity)
    quotient = paired_quotient(own, base.values(quantity)) if base is not None and group.is_defended else None
    mean = Estimate.of_seeds(list(own.values())) if own else None
    return estimate_cell(mean, "{:.4g}".format), estimate_cell(quotient)
