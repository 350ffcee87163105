"""Evaluations and their comparisons in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deq_jax.evaluation.wording import budget_text
from deq_jax.reporting.comparisons import Pair
from deq_jax.reporting.groups import Group, clean, overestimate, reference, robust
from deq_jax.reporting.statistics import Estimate
from deq_jax.reporting.tables import AGREE

NOT_SHOWN = "no verdict (not shown the images that broke the undefended predictor)"


class Words(NamedTuple):
    """Names of a difference with an interval below, around or above 0."""

    below: str
    around: str
    above: str

    def of(self, difference: Estimate) -> str:
        """The name of a difference; a single seed says nothing about others."""
        word = (self.around, self.above, self.below)[difference.sign or 0]
        return word if difference.seeds > 1 else f"{word}, of this seed alone"


DEFENCE = Words("hurts", "no difference shown", "helps")

TRAINING = Words("less accurate", "no difference shown", "more accurate")


def worst_case(groups: Sequence[Group]) -> str:
    """Name of the worst case of all trials: adaptive if some group is."""
    return "adaptive worst case" if any(group.is_adaptive for group in groups) else "worst case"


@dataclass(frozen=True)
class Quote:
    """The robust accuracy to quote in a setting, and everything that belongs to it.

    Attributes:
      title: whether there is one to quote.
      value, interval: at most so much, in percent, and its interval.
      flags: explanations of the red flags that are raised, by their names.
      facts: budget, checks without a result, clean accuracy, images and model, by their names.
      sentence: all of it in one sentence.
    """

    title: str
    value: str
    interval: str
    flags: dict[str, str]
    facts: dict[str, str]
    sentence: str


def quotes(groups: Sequence[Group]) -> list[Quote]:
    """The robust accuracy to quote in each setting.

    Among several evaluations of one training config and defence the lowest accuracy counts. Among several training
    configs and defences the highest one counts; those without red flags come first.
    """
    lowest: dict[str, dict[tuple[str, str], tuple[float, Group]]] = {}
    for group in groups:
        found = group.accuracy(robust)
        if found is not None:
            best = lowest.setdefault(str(group.setting), {})
            key, new = (group.training, group.defence), (found.value, group)
            best[key] = min(best.get(key, new), new, key=lambda one: one[0])
    choices = [[group for _, group in sorted(best.values(), key=_rank)] for best in lowest.values()]
    return [_quote(several[0], len(several)) for several in choices]


def _rank(candidate: tuple[float, Group]) -> tuple[bool, float]:
    value, group = candidate
    return bool(group.raised), -value


def _quote(group: Group, count: int) -> Quote:
    found, on_clean = group.accuracy(robust), group.accuracy(clean)
    assert found is not None and on_clean is not None  # those without are left out
    chosen = (
        ""
        if count == 1
        else f", the highest of {count} configs and defences" + (" without red flags" if not group.raised else "")
    )
    model = f"training {group.training}, defence {group.defence}{chosen}"
    flags = f"red flags raised: {', '.join(group.raised)}" if group.raised else "no red flags raised"
    title = "No robust accuracy to quote, since red flags are raised" if group.raised else "Robust accuracy to quote"
    value = f"{found.value:.2f} %"
    sentence = (
        f"{title}: at most {value}{_interval(found)} of {group.setting}; {model}; attacks: {group.trials}; {flags}."
    )
    budgets = dict.fromkeys(filter(None, (budget_text(one.record) for one in group.evaluations)))
    facts = {
        "Attacks": "; ".join([group.trials, *budgets]),
        "Radius": group.setting.radius_text,
        "Too few images to say": ", ".join(group.unsure),
        "Not checked": ", ".join(group.unchecked),
        "Clean accuracy": f"{on_clean.value:.2f} %{_interval(on_clean)}",
        "Images": group.setting.images_text,
        "Model": model,
    }
    return Quote(
        title,
        value,
        _interval(found).strip(" ()"),
        _meanings(group),
        {k: v for k, v in facts.items() if v},
        sentence,
    )


def _meanings(group: Group) -> dict[str, str]:
    """The meaning of each raised flag, by its name, with the number of seeds where there are several."""
    meant = {flag.name: flag.explanation for one in group.evaluations for flag in one.record.red_flags}
    seeds = len(group.evaluations)
    return {name if seeds == 1 else f"{name}, {n} of {seeds} seeds": meant[name] for name, n in group.raised.items()}


def _interval(estimate: Estimate) -> str:
    """The interval and its meaning, in brackets, after a space."""
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    seeds = f"{estimate.seeds} seeds" if estimate.seeds > 1 else "for other images alone, one seed"
    spread = f", {AGREE}" if estimate.agree else ""
    return f" (95 % interval [{low:.2f}, {high:.2f}], {seeds}{spread})"


def pair_title(pair: Pair) -> str:
    """The names of both sides of a comparison."""
    if pair.first.training == pair.second.training:
        return f"{pair.first.training}: {pair.first.defence} against {pair.second.defence}"
    defence = f" (both: {pair.first.defence})" if pair.first.is_defended else ""
    return f"{pair.first.training} against {pair.second.training}{defence}"


def verdict(pair: Pair, difference: Estimate | None, words: Words) -> str:
    """The name of the difference, if the comparison is fair."""
    if difference is None:
        return ""
    return words.of(difference) if pair.is_fair else NOT_SHOWN


def sentences(pair: Pair, words: Words) -> str:
    """The result of a pair in words, and the loss of a defence under adaptive attacks."""
    protocols = {f"the {worst_case([pair.first, pair.second])}": robust}
    if pair.first.is_defended:
        protocols["the reference protocol"] = reference
    parts = [_sentence(name, pair, pair.difference(quantity), words) for name, quantity in protocols.items()]
    known = "; ".join(part for part in parts if part) or "no attack in common"
    trust = " Red flags are raised, so this is not trustworthy." if pair.is_flagged else ""
    return f"{pair_title(pair)}: {known}.{_taken_away(pair.first)}{trust}"


def _sentence(protocol: str, pair: Pair, difference: Estimate | None, words: Words) -> str:
    if difference is None:
        return ""
    points = f"{difference.value:+.2f} points{_interval(difference)}"
    return f"{verdict(pair, difference, words)} under {protocol}, {points}"


def _taken_away(group: Group) -> str:
    lost = group.values(overestimate)
    if not (group.is_defended and lost):
        return ""
    difference = Estimate.of_differences(list(lost.values()))
    points = f"{difference.value:.2f} points{_interval(difference)}"
    return f" The adaptive attacks take away {points} of its accuracy under the reference protocol."
