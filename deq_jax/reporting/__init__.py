"""Many evaluations on one page."""

from deq_jax.reporting.archive import Evaluation, Setting, read_evaluations, unfinished
from deq_jax.reporting.comparisons import Pair
from deq_jax.reporting.groups import Group, groups_of
from deq_jax.reporting.page import render, report_files
from deq_jax.reporting.report import Report
from deq_jax.reporting.statistics import Estimate, paired_difference, paired_quotient
from deq_jax.reporting.tables import Table

__all__ = [
    "Estimate",
    "Evaluation",
    "Group",
    "Pair",
    "Report",
    "Setting",
    "Table",
    "groups_of",
    "paired_difference",
    "paired_quotient",
    "read_evaluations",
    "render",
    "report_files",
    "unfinished",
]
