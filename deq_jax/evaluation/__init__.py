"""Classifiers under attack: the worst case of many trials for each image, with red flags."""

from deq_jax.evaluation.assess import assess
from deq_jax.evaluation.budgets import BUDGETS, default_trials, white_box_trials
from deq_jax.evaluation.classes import ClassAccuracy, class_accuracies
from deq_jax.evaluation.early_state import choose_early_state
from deq_jax.evaluation.engine import worst_case
from deq_jax.evaluation.files import write_evaluation
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.evaluation.measure import evaluator, measure
from deq_jax.evaluation.moments import Moment
from deq_jax.evaluation.plan import (
    Diagnostics,
    EarlyState,
    EvalConfig,
    Trial,
    auto_attack_trials,
    diagnostics,
    with_surrogates,
    with_transfers,
)
from deq_jax.evaluation.predictor import Predictor
from deq_jax.evaluation.record import EvaluationRecord, PredictionCost, Provenance, TrialRecord, read_record
from deq_jax.evaluation.red_flags import red_flags
from deq_jax.evaluation.results import Attempt, Cost, Flag, Probe, WorstCase
from deq_jax.evaluation.rows import (
    Means,
    Measured,
    Outcomes,
    Row,
    RowMeans,
    Rows,
    Spread,
    correctness,
    is_correct,
    named,
    summary,
)
from deq_jax.evaluation.sanity import plain_warnings
from deq_jax.evaluation.transfers import Transfer
from deq_jax.evaluation.verdicts import exact_interval
from deq_jax.evaluation.verification import Check, verify
from deq_jax.evaluation.wording import headline

__all__ = [
    "BUDGETS",
    "Attempt",
    "Check",
    "ClassAccuracy",
    "Cost",
    "Diagnostics",
    "EarlyState",
    "EvalConfig",
    "EvaluationFolder",
    "EvaluationRecord",
    "Flag",
    "Means",
    "Measured",
    "Moment",
    "Outcomes",
    "PredictionCost",
    "Predictor",
    "Probe",
    "Provenance",
    "Row",
    "RowMeans",
    "Rows",
    "Spread",
    "Transfer",
    "Trial",
    "TrialRecord",
    "WorstCase",
    "assess",
    "auto_attack_trials",
    "choose_early_state",
    "class_accuracies",
    "correctness",
    "default_trials",
    "diagnostics",
    "evaluator",
    "exact_interval",
    "headline",
    "is_correct",
    "measure",
    "named",
    "plain_warnings",
    "read_record",
    "red_flags",
    "summary",
    "verify",
    "white_box_trials",
    "with_surrogates",
    "with_transfers",
    "worst_case",
    "write_evaluation",
]
