"""Names and fields that files of older versions have, as this version writes them: the one table of moved names."""

from __future__ import annotations

from typing import Any

ROOMS = {
    "adaptive": "surrogates",
    "attacks.apgd": "attacks",
    "attacks.auto": "attacks",
    "attacks.fab": "attacks",
    "attacks.pgd": "attacks",
    "attacks.spsa": "attacks",
    "attacks.square": "attacks",
    "attacks.targeted": "attacks",
    "attacks.threat": "attacks",
    "carries": "defences",
    "classifiers": "models",
    "config": "training",
    "entropy": "defences",
    "gradients": "core",
    "losses": "core",
    "models.mdeq": "models",
    "models.resnet": "models",
    "models.small": "models",
    "models.wide_resnet": "models",
    "objectives": "training",
    "readouts": "core",
    "regularizers": "models",
    "solvers": "core",
    "transfers": "evaluation",
    "trials": "evaluation",
}
"""Modules of the older flat layout, and the rooms that show their names now."""

NAMES = {
    "deq_jax.adaptive.LowEntropy": "deq_jax.core.LowEntropy",
    "deq_jax.attacks.targeted.logit_difference": "deq_jax.core.logit_difference",
    "deq_jax.attacks.targeted.targeted_dlr": "deq_jax.core.targeted_dlr",
    "deq_jax.surrogates.defended": "deq_jax.surrogates.require_defended",
    "deq_jax.trials.Noise": "deq_jax.attacks.Noise",
}
"""Names that did not go where the rest of their module went."""

FIELDS = {
    "deq_jax.core.IntermediateState": {"t": "state"},
    "deq_jax.surrogates.SimultaneousAdjoint": {"step": "state"},
}
"""Renamed fields by class; the class has its name of this version."""

ADDED = {
    f"deq_jax.training.{name}": {"label_smoothing": 0.0} for name in ("Standard", "PGDAdversarialTraining", "Trades")
}
"""Fields that older files do not have, by class, with the values that change nothing."""


def upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """One object or function of a config tree, not the objects below it, under the names of this version.

    Args:
      tree: as `trees.to_tree` wrote it in this version or an older one.
    """
    if not isinstance(tree.get("class", ""), str):
        return tree
    for key in {"class", "name"} & tree.keys():
        tree = tree | {key: _renamed(tree[key])}
    fields = FIELDS.get(tree.get("class", ""), {})
    tree = {fields.get(name, name): value for name, value in tree.items()}
    tree = ADDED.get(tree.get("class", ""), {}) | tree
    if tree.get("class") == "deq_jax.attacks.PGD" and "epsilon" in tree:  # in ℓ∞, the only norm that it had
        ball = {"class": "deq_jax.attacks.Linf", "epsilon": tree["epsilon"]}
        others = {name: value for name, value in tree.items() if name != "epsilon"}
        return {"class": tree["class"], "threat": ball} | others
    if tree.get("class") == "deq_jax.training.TrainConfig" and "penalty_schedule" not in tree:
        schedule = {"probability": 0.02, "epochs": 90} | _schedule(_part(_part(tree, "classifier"), "jacobian"))
        return tree | {"penalty_schedule": {"class": "deq_jax.training.PenaltySchedule"} | schedule}
    if tree.get("class") == "deq_jax.models.JacobianRegularization":
        return {name: value for name, value in tree.items() if name not in _schedule(tree)}
    return tree


def _part(tree: dict[str, Any], name: str) -> dict[str, Any]:
    part = tree.get(name)
    return part if isinstance(part, dict) else {}


def _schedule(penalty: dict[str, Any]) -> dict[str, Any]:
    """The schedule of a penalty; today it is part of the training config."""
    return {name: penalty[name] for name in ("probability", "epochs") if name in penalty}


def _renamed(name: Any) -> Any:
    if not isinstance(name, str):
        return name
    if name in NAMES:
        return NAMES[name]
    module, _, attribute = name.rpartition(".")
    room = ROOMS.get(module.removeprefix("deq_jax."))
    return name if room is None or not module.startswith("deq_jax.") else f"deq_jax.{room}.{attribute}"
