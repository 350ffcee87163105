"""What a classifier does under attack: the worst case of many trials for each image, with red flags."""

from deq_jax.evaluation.assess import assess
from deq_jax.evaluation.budgets import BUDGETS, default_trials
from deq_jax.evaluation.early_state import choose_early_state
from deq_jax.evaluation.engine import worst_case
from deq_jax.evaluation.measure import (
    Measured,
    Outcomes,
    correctness,
    evaluator,
    is_correct,
    measure,
    row_names,
    summary,
)
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
from deq_jax.evaluation.record import headline, report_of, write_report
from deq_jax.evaluation.red_flags import red_flags
from deq_jax.evaluation.results import Attempt, Cost, Flag, Probe, WorstCase
from deq_jax.evaluation.sanity import plain_warnings
from deq_jax.evaluation.transfers import Transfer
from deq_jax.evaluation.verdicts import exact_interval

__all__ = [
    "BUDGETS",
    "Attempt",
    "Cost",
    "Diagnostics",
    "EarlyState",
    "EvalConfig",
    "Flag",
    "Measured",
    "Moment",
    "Outcomes",
    "Predictor",
    "Probe",
    "Transfer",
    "Trial",
    "WorstCase",
    "assess",
    "auto_attack_trials",
    "choose_early_state",
    "correctness",
    "default_trials",
    "diagnostics",
    "evaluator",
    "exact_interval",
    "headline",
    "is_correct",
    "measure",
    "plain_warnings",
    "red_flags",
    "report_of",
    "row_names",
    "summary",
    "with_surrogates",
    "with_transfers",
    "worst_case",
    "write_report",
]
