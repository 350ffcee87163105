"""Everything that determines an evaluation, line by line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import numpy as np

from deq_jax.core.errors import escaped
from deq_jax.reporting.archive import Evaluation
from deq_jax.storage.briefs import brief, number, short_name
from deq_jax.storage.trees import Json


def protocol_text(one: Evaluation) -> str:
    """Everything that determines an evaluation, line by line, to be copied."""
    run, plan, where = one.run, one.record.plan, one.provenance
    lines = {
        "training": f"{where.workdir}, seed {run.seed}, checkpoint {where.checkpoint}",
        "objective": brief(run.objective),
        "schedule": ", ".join(f"{name} {brief(value)}" for name, value in run.schedule.items()),
        "classifier": _classifier_text(run.classifier),
        **_dynamics_lines(run.classifier.get("dynamics")),
        "deployed": _deployed_text(one),
        "threat": f"{plan.norm}, epsilon = {number(plan.epsilon)}",
        "images": f"{one.record.images} of {brief(run.dataset)}, {where.split} split",
        "evaluation": f"batch size {plan.batch_size}, seed of the attacks {plan.seed}",
        "draws": "the predictor is deterministic" if plan.draws is None else f"{plan.draws} (EOT)",
        "broken images": "skipped by later trials" if plan.skip_broken else "attacked by every trial",
        "versions": _versions_text(where.versions),
        **_environment_lines(where.environment),
    }
    trials = plan.all_trials
    text = [f"{name}: {value}" for name, value in lines.items()]
    return "\n".join([*text, f"attacks ({len(trials)}):", *(f"  {trial}" for trial in trials)])


def _versions_text(versions: Mapping[str, Json]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _environment_lines(environment: Json) -> dict[str, str]:
    """All versions, code, devices and command; nothing of older files, which do not have them."""
    parts = environment if isinstance(environment, dict) else {}
    versions, code, platform, command = (parts.get(name) for name in ("versions", "code", "platform", "command"))
    lines = {}
    if isinstance(versions, dict):
        lines["versions"] = _versions_text(versions)
    if isinstance(code, dict):
        unchanged = code.get("unchanged")
        state = "changes unknown" if unchanged is None else "unchanged" if unchanged else "with changes"
        lines["code"] = f"revision {code.get('revision')}, {state}"
    if isinstance(platform, dict):
        lines["devices"] = f"{platform.get('devices')} x {platform.get('device_kind')}"
    if isinstance(command, dict) and isinstance(arguments := command.get("arguments"), list):
        lines["command"] = shlex.join(map(str, arguments))
    return {name: escaped(" ".join(text.split())) for name, text in lines.items()}  # a line each


def _deployed_text(one: Evaluation) -> str:
    predictor, early = one.record.plan.predictor, one.record.early_state
    chosen = "" if early is None else f" z_{1 + int(np.argmax(early))}"
    return f"{one.record.defence}{chosen}: {brief(predictor)}" if predictor else one.record.defence


def _classifier_text(classifier: Mapping[str, Json]) -> str:
    """Its class, and its parts but the dynamics."""
    parts = [f"{name} {brief(part)}" for name, part in classifier.items() if name not in ("class", "dynamics")]
    return f"{short_name(classifier)}: {', '.join(parts)}"


def _dynamics_lines(dynamics: Json) -> dict[str, str]:
    """Readout, solver and gradient, as far as it has them: name -> text."""
    parts = dynamics if isinstance(dynamics, dict) else {}
    lines = {"readout": brief(parts["readout"])} if "readout" in parts else {}
    solver, gradient = parts.get("solver"), parts.get("gradient")
    if isinstance(solver, dict):
        known = {"T =": solver.get("steps"), "tolerance": solver.get("tolerance")}
        heads = [f"{name} {brief(value)}" for name, value in known.items() if value is not None]
        lines["solver"] = f"{', '.join(heads)}: {brief(solver)}" if heads else brief(solver)
    if isinstance(gradient, dict):
        steps = f"K = {brief(gradient.get('steps'))}: " if short_name(gradient) == "Phantom" else ""
        lines["gradient"] = steps + brief(gradient)
    return lines
