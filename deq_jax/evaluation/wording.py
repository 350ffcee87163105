"""An evaluation in words: its headline and captions."""

from __future__ import annotations

from collections.abc import Sequence

from deq_jax.evaluation.record import EvaluationRecord
from deq_jax.evaluation.results import Flag


def headline(record: EvaluationRecord) -> str:
    """The robust accuracy in one line, with all that speaks against it; then a line for each raised flag and warning.

    Args:
      record: the numbers of the evaluation.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.evaluation import EvalConfig, EvaluationRecord, PredictionCost, Spread, headline
      >>> from deq_jax.storage import to_tree
      >>> record = EvaluationRecord(
      ...     images=100,
      ...     rows={},
      ...     accuracy={"clean": {"deployed": 0.9}, "union": {"deployed": 0.4}},
      ...     cumulative=True,
      ...     trials={},
      ...     defence="none",
      ...     cost=PredictionCost(),
      ...     spectral_radius=Spread(None, None),
      ...     unsettled=None,
      ...     adjoint_residual=Spread(None, None),
      ...     warnings=(),
      ...     red_flags=(),
      ...     early_state=None,
      ...     evaluation=to_tree(EvalConfig(Linf(0.1), trials=())),
      ... )
      >>> headline(record)
      'robust accuracy: at most 40.00 % of 100 images (95 %: 30.3 to 50.3); no flags raised'
    """
    raised = [flag for flag in record.red_flags if flag.raised]
    explained = [f"{flag.name}: {flag.explanation}" for flag in raised]
    warned = [f"warning: {text}" for text in record.warnings]
    return "\n".join([_number_line(record, raised), *explained, *warned])


def _number_line(record: EvaluationRecord, raised: Sequence[Flag]) -> str:
    if record.robust_accuracy is None:
        return f"clean accuracy: {_accuracy_text(record, 'clean')}; nothing has attacked them"
    budget = budget_text(record)
    number = _accuracy_text(record, "union") + (f" ({budget})" if budget else "")
    unsure = [flag_text(flag) for flag in record.red_flags if flag.is_unsure]
    missing = [flag.name for flag in record.red_flags if flag.raised is None and not flag.is_unsure]
    unchecked = f"; too few images to say: {', '.join(unsure)}" if unsure else ""
    unchecked += f"; not checked: {', '.join(missing)}" if missing else ""
    if raised:
        flags = ", ".join(map(flag_text, raised))
        return f"robust accuracy: NOT TRUSTWORTHY, an upper bound only: {number}; flags raised: {flags}{unchecked}"
    return f"robust accuracy: at most {number}; no flags raised{unchecked}"


def flag_text(flag: Flag) -> str:
    """Its name, with its count or value."""
    return f"{flag.name} ({flag.value:.3g})" if flag.count is None else f"{flag.name} ({flag.count} of {flag.images})"


def _accuracy_text(record: EvaluationRecord, name: str) -> str:
    low, high = (100 * end for end in record.intervals[name])
    accuracy = 100 * record.accuracy[name]["deployed"]
    return f"{accuracy:.2f} % of {record.images} images (95 %: {low:.1f} to {high:.1f})"


def budget_text(record: EvaluationRecord) -> str:
    """The budget by which the attacks were chosen, and their largest cost; empty for a choice of one's own."""
    if record.plan.budget is None:
        return ""
    gradients = sum(trial.gradient_queries or 0 for trial in record.trials.values())
    return f"budget {record.plan.budget}: at most {gradients} gradients per image"


def diagnoses(record: EvaluationRecord) -> str:
    """Spectral radius and adjoint residual, where they are known, for a caption."""
    radius, adjoint, known = record.spectral_radius, record.adjoint_residual, ""
    if radius.mean is not None:
        known += f"; spectral radius of the cell: mean {radius.mean:.2f}, largest {radius.largest:.2f}"
        known += f" ({record.unsettled} not settled)" if record.unsettled else ""
    if adjoint.mean is not None:
        known += f"; adjoint residual: mean {adjoint.mean:.2e}, largest {adjoint.largest:.2e}"
    return known
