"""What a report on many evaluations says: its tables, and their comparisons in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from deq_jax.comparisons import Difference, Mean, paired_quotient
from deq_jax.finished import Evaluation, number
from deq_jax.studies import Curve, Group, Pair, clean, overestimate, reference, robust, undefended
from deq_jax.tables import ERROR, INTERVAL, Cell, Column, Form, Table, difference_cell, mean_cell, mean_of, text_cell

NOT_TRUSTWORTHY = "NOT TRUSTWORTHY, an upper bound only"
WARNING = "not trustworthy"
NOT_SHOWN = "no verdict (not shown the images that broke the undefended predictor)"
FORMS: dict[str, Form] = {"accuracy": "{:.2f}".format, "entropy": "{:.3f}".format, "residual": "{:.2e}".format}
CONDITIONS = ("clean", "attacked")


def headline_table(groups: Sequence[Group]) -> Table:
    """A row for each training, defence and set of attacks; a section for each setting."""
    columns = (
        Column("training", kind="text"),
        Column("defence", kind="text"),
        Column("seeds"),
        Column("clean", ERROR),
        Column("reference protocol", ERROR),
        Column("adaptive worst case", ERROR, kind="main"),
        Column("red flags", kind="text"),
        Column("attacks", kind="text"),
    )
    sections: dict[str, list[tuple[Cell, ...]]] = {}
    for group in groups:
        sections.setdefault(str(group.setting), []).append(_headline_row(group))
    caption = "Accuracy in percent of the deployed predictor, mean ± standard error over the seeds of the training"
    return Table("headline", caption, "setting", columns, sections)


def _headline_row(group: Group) -> tuple[Cell, ...]:
    worst = _robust_cell(group)
    return (
        text_cell(group.training),
        text_cell(group.defence),
        text_cell(str(len(group.evaluations))),
        mean_cell(mean_of(group.means(clean))),
        mean_cell(mean_of(group.means(reference))) if group.is_defended else worst,
        worst,
        text_cell(_flags(group)),
        text_cell(group.trials),
    )


def _robust_cell(group: Group) -> Cell:
    return mean_cell(mean_of(group.means(robust)))._replace(warning=WARNING if group.raised else "")


def _flags(group: Group) -> str:
    if not group.values(robust):
        return "nothing has attacked it"
    unchecked = f"; not checked: {', '.join(group.unchecked)}" if group.unchecked else ""
    return (f"{NOT_TRUSTWORTHY}: {_raised(group)}" if group.raised else "none raised") + unchecked


def _raised(group: Group) -> str:
    seeds = len(group.evaluations)
    return ", ".join(f"{name} ({count} of {seeds})" for name, count in group.raised.items())


class Words(NamedTuple):
    """What a difference whose interval lies below, around or above 0 is called."""

    below: str
    around: str
    above: str

    def of(self, difference: Difference) -> str:
        """One of them; a single seed shows nothing."""
        if difference.sign is None:
            return "one seed, no interval"
        return (self.around, self.above, self.below)[difference.sign]


DEFENCE = Words("hurts", "no difference shown", "helps")
TRAINING = Words("less accurate", "no difference shown", "more accurate")


def pair_title(pair: Pair) -> str:
    """What is compared with what."""
    if pair.first.training == pair.second.training:
        return f"{pair.first.training}: {pair.first.defence} against {pair.second.defence}"
    defence = f" (both: {pair.first.defence})" if pair.first.is_defended else ""
    return f"{pair.first.training} against {pair.second.training}{defence}"


def pair_table(name: str, caption: str, pairs: Sequence[Pair], words: Words) -> Table:
    """A row for each pair: differences over the seeds that both have, and what they are called."""
    columns = (
        Column("comparison", kind="text"),
        Column("seeds"),
        Column("clean", INTERVAL),
        Column("reference protocol", INTERVAL),
        Column("verdict on it", kind="text"),
        Column("adaptive worst case", INTERVAL, kind="main"),
        Column("verdict", kind="text"),
        Column("red flags", kind="text"),
    )
    sections: dict[str, list[tuple[Cell, ...]]] = {}
    for pair in pairs:
        found = [pair.difference(quantity) for quantity in (clean, reference, robust)]
        cells = [difference_cell(difference) for difference in found]
        on_reference, verdict = (text_cell(_verdict(pair, difference, words)) for difference in found[1:])
        verdict = verdict._replace(warning=WARNING if pair.is_flagged else "")
        title, seeds = text_cell(pair_title(pair)), text_cell(str(found[0].seeds if found[0] else 0))
        row = (title, seeds, cells[0], cells[1], on_reference, cells[2], verdict, text_cell(_flags_of_pair(pair)))
        sections.setdefault(f"{pair.first.setting}; attacks: {pair.first.trials}", []).append(row)
    return Table(name, caption, "setting", columns, sections)


def _verdict(pair: Pair, difference: Difference | None, words: Words) -> str:
    if difference is None:
        return ""
    return words.of(difference) if pair.is_fair else NOT_SHOWN


def _flags_of_pair(pair: Pair) -> str:
    same = pair.first.training == pair.second.training
    named = {group.defence if same else group.training: group for group in (pair.first, pair.second)}
    return "; ".join(f"{name}: {_raised(group)}" for name, group in named.items() if group.raised) or "none raised"


def sentences(pair: Pair, words: Words) -> str:
    """What a pair shows, in words; and what the adaptive attacks take away from a defence."""
    parts = [
        _sentence(protocol, pair, pair.difference(quantity), words)
        for protocol, quantity in (("the adaptive worst case", robust), ("the reference protocol", reference))
    ]
    known = "; ".join(part for part in parts if part) or "nothing that both were attacked with"
    trust = " Red flags are raised, so this is not trustworthy." if pair.is_flagged else ""
    return f"{pair_title(pair)}: {known}.{_taken_away(pair.first)}{trust}"


def _sentence(protocol: str, pair: Pair, difference: Difference | None, words: Words) -> str:
    if difference is None:
        return ""
    return f"{_verdict(pair, difference, words)} under {protocol}, {_points(difference)}"


def _taken_away(group: Group) -> str:
    lost = group.values(overestimate)
    if not (group.is_defended and lost):
        return ""
    difference = Difference.of(list(lost.values()))
    return f" The adaptive attacks take away {_points(difference, sign='')} of what the reference protocol gives it."


def _points(difference: Difference, sign: str = "+") -> str:
    value = f"{difference.value:{sign}.2f} points"
    if difference.interval is None:
        return value
    low, high = difference.interval
    return f"{value} (95 % interval [{low:.2f}, {high:.2f}], {difference.seeds} seeds)"


def accuracy_table(name: str, group: Group) -> Table:
    """Accuracy of every predictor on the images of every trial, mean over the seeds."""
    first = group.evaluations[0].accuracy
    predictors = list(first["clean"])
    kinds = ["main" if predictor == "deployed" else "number" for predictor in predictors]
    columns = [Column(predictor, kind=kind) for predictor, kind in zip(predictors, kinds, strict=True)]
    rows = []
    for trial in first:
        tables = [one.accuracy[trial] for one in group.evaluations]
        means = [Mean.of([table[predictor] for table in tables]).value for predictor in predictors]
        cells = [text_cell(f"{100 * mean:.2f}") for mean in means]
        if trial == "union" and group.raised:
            cells[-1] = cells[-1]._replace(warning=WARNING)
        rows.append((text_cell(trial), *cells))
    seeds = f"mean over {len(group.evaluations)} seeds" if len(group.evaluations) > 1 else "one seed"
    caption = f"Accuracy (%) of each predictor on the images of each trial, {seeds}"
    return Table(name, caption, "", (Column("images of", kind="text"), *columns), {"": rows})


def states_table(name: str, groups: Mapping[str, Group]) -> Table:
    """What was measured in every state of the dynamics, clean and attacked; a section for each labelled group."""
    shown = [(quantity, condition) for quantity in FORMS for condition in CONDITIONS]
    columns = [Column(f"{quantity}, {condition}", ERROR) for quantity, condition in shown]
    sections = {}
    for label, group in groups.items():
        rows = []
        for state in group.evaluations[0].rows:
            means = [(mean_of(measured(group, state, c, quantity)), FORMS[quantity]) for quantity, c in shown]
            rows.append((text_cell(state), *(mean_cell(mean, form) for mean, form in means)))
        sections[label] = rows
    known = "attacked: the worst case of each image; residual of what is deployed: the lowest one of all states"
    caption = f"Accuracy (%), prediction entropy (nats) and relative residual; {known}"
    return Table(name, caption, "predictor", (Column("state", kind="text"), *columns), sections)


def measured(group: Group, state: str, condition: str, quantity: str) -> dict[int, float]:
    """Seed -> what was measured in a state, "clean" or "attacked"; accuracies in percent."""
    scale = 100 if quantity == "accuracy" else 1

    def value(one: Evaluation) -> float | None:
        found = one.rows.get(state, {}).get(condition, {}).get(quantity)
        return None if found is None else scale * found

    return group.values(value)


def radius_table(name: str, curves: Sequence[Curve]) -> Table:
    """Clean and robust accuracy at several radii; a section for each curve."""
    worst, flags = Column("adaptive worst case", ERROR, "main"), Column("red flags", kind="text")
    columns = Column("epsilon"), Column("seeds"), Column("clean", ERROR), worst, flags
    sections = {curve.label: [_radius_row(group) for group in curve.groups] for curve in curves}
    return Table(
        name, "Accuracy (%) at several radii, mean ± standard error over the seeds", "defence", columns, sections
    )


def _radius_row(group: Group) -> tuple[Cell, ...]:
    return (
        text_cell(number(group.setting.epsilon)),
        text_cell(str(len(group.evaluations))),
        mean_cell(mean_of(group.means(clean))),
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
            for flag in one.flags
        ]
    caption = "Signs that the attacks have failed; a flag is raised where the value exceeds the threshold"
    return Table(name, caption, "evaluation", (*columns, Column("what it would mean", kind="text")), sections)


def cost_table(groups: Sequence[Group]) -> Table:
    """What a prediction costs, and as a multiple of the undefended one's."""
    columns = (
        Column("training", kind="text"),
        Column("defence", kind="text"),
        Column("attacks", kind="text"),
        Column("cell evaluations per image", ERROR),
        Column("× undefended", ERROR),
        Column("seconds per image", ERROR),
        Column("× undefended", ERROR),
    )
    sections: dict[str, list[tuple[Cell, ...]]] = {}
    for group in groups:
        if any(one.cost for one in group.evaluations):
            heads = text_cell(group.training), text_cell(group.defence), text_cell(group.trials)
            cells = [
                cell for name in ("evaluations", "seconds") for cell in _costs(group, undefended(group, groups), name)
            ]
            sections.setdefault(str(group.setting), []).append((*heads, *cells))
    counted = "cell evaluations: applications to the image; a vector-Jacobian product counts as one"
    caption = f"Cost of a warm prediction, compilation excluded, mean ± standard error over the seeds; {counted}"
    return Table("cost", caption, "setting", columns, sections)


def _costs(group: Group, base: Group | None, name: str) -> tuple[Cell, Cell]:
    def quantity(one: Evaluation) -> float | None:
        return one.cost.get(name)

    own = group.values(quantity)
    quotient = paired_quotient(own, base.values(quantity)) if base is not None and group.is_defended else None
    return mean_cell(mean_of(own), "{:.4g}".format), mean_cell(quotient)
