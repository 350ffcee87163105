"""Configs, numbers and durations, written in a few words."""

from __future__ import annotations

from typing import Any


def brief(tree: Any) -> str:
    """A config as `to_tree` writes it, as one line without module names: ``PGD(epsilon=0.1, steps=10)``."""
    if isinstance(tree, list):
        return f"[{', '.join(brief(item) for item in tree)}]"
    if not isinstance(tree, dict):
        return number(tree) if isinstance(tree, float) else str(tree)
    if "class" not in tree:
        return short_name(tree)
    fields = [f"{name}={brief(value)}" for name, value in tree.items() if name != "class"]
    return f"{short_name(tree)}({', '.join(fields)})" if fields else short_name(tree)


def short_name(tree: dict[str, Any]) -> str:
    """Name of a class or function in a config, without its module."""
    return str(tree.get("class", tree.get("name", ""))).rpartition(".")[2]


def number(value: float) -> str:
    """With six digits, or as a small number of 255 grey levels where that is exact and shorter."""
    text, numerator = f"{value:g}", round(255 * value)
    is_fraction = len(text) > 6 and 0 < numerator <= 32 and abs(255 * value - numerator) < 1e-9
    return f"{numerator}/255" if is_fraction else text


def classifier_text(classifier: dict[str, Any]) -> str:
    """Its class, and its parts but the dynamics."""
    parts = [f"{name} {brief(part)}" for name, part in classifier.items() if name not in ("class", "dynamics")]
    return f"{short_name(classifier)}: {', '.join(parts)}"


def dynamics_lines(dynamics: dict[str, Any]) -> dict[str, str]:
    """Readout, solver and gradient, as far as it has them: name -> text."""
    solver, gradient = dynamics.get("solver"), dynamics.get("gradient")
    lines = {"readout": brief(dynamics["readout"])} if "readout" in dynamics else {}
    if solver:
        states = f"T = {solver['steps']}, tolerance {number(solver['tolerance'])}"
        lines["solver"] = f"{states}: {brief(solver)}"
    if gradient:
        steps = f"K = {gradient['steps']}: " if short_name(gradient) == "Phantom" else ""
        lines["gradient"] = steps + brief(gradient)
    return lines


def trial_text(trial: dict[str, Any]) -> str:
    """Its name, suite, attack and surrogate."""
    suite = f" [{trial['suite']}]" if trial["suite"] else ""
    start = ", from the worst image so far" if trial["from_worst"] else ""
    return f"{trial['name']}{suite}: {brief(trial['attack'])}{start}, gradients: {brief(trial['surrogate'])}"


def duration(seconds: float) -> str:
    """A duration in its two largest units: ``45 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    whole = round(seconds)
    for name, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
