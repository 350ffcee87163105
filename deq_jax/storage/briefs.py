"""Configs, numbers and durations, written in a few words."""

from __future__ import annotations

from deq_jax.storage.trees import Json


def brief(tree: Json) -> str:
    """A config as `to_tree` writes it, as one line without module names: ``PGD(epsilon=0.1, steps=10)``.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.storage import brief, to_tree
      >>> brief(to_tree(Linf(8 / 255)))
      'Linf(epsilon=8/255)'
    """
    if isinstance(tree, list):
        return f"[{', '.join(brief(item) for item in tree)}]"
    if not isinstance(tree, dict):
        return number(tree) if isinstance(tree, float) else str(tree)
    if "class" not in tree:
        return short_name(tree)
    fields = [f"{name}={brief(value)}" for name, value in tree.items() if name != "class"]
    return f"{short_name(tree)}({', '.join(fields)})" if fields else short_name(tree)


def short_name(tree: Json) -> str:
    """Name of a class or function in a config, without its module; empty where there is none."""
    name = tree.get("class", tree.get("name", "")) if isinstance(tree, dict) else ""
    return str(name).rpartition(".")[2]


def number(value: float) -> str:
    """With six digits, or as a small number of 255 grey levels where that is exact and shorter.

    Examples:
      >>> from deq_jax.storage import number
      >>> number(0.1), number(8 / 255)
      ('0.1', '8/255')
    """
    text, numerator = f"{value:g}", round(255 * value) if 0 < value < 1 else 0
    is_fraction = len(text) > 6 and 0 < numerator <= 32 and abs(255 * value - numerator) < 1e-9
    return f"{numerator}/255" if is_fraction else text


def duration(seconds: float) -> str:
    """A duration in its two largest units: ``45 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``.

    Examples:
      >>> from deq_jax.storage import duration
      >>> duration(185)
      '3 min 5 s'
    """
    whole = round(seconds)
    for name, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {name}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
