"""A report as one self-contained HTML page, and as the files with the same figures and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from deq_jax.reporting.archive import Evaluation
from deq_jax.reporting.report import Report

ESCAPES = "backslashreplace"  # what UTF-8 lacks, of a file's name


def report_files(evaluations: Sequence[Evaluation], missing: Sequence[Path] = ()) -> dict[str, bytes]:
    """The page, as index.html, and the PNG and CSV files of its figures and tables: name -> content.

    Args:
      evaluations: as `read_evaluations` gives them.
      missing: folders to be named as not evaluated; see `unfinished`.

    Examples:
      >>> from deq_jax.reporting import report_files
      >>> list(report_files([]))
      ['index.html']
    """
    report = Report.of(evaluations, missing)
    files = {f"{table.name}.csv": table.csv().encode(errors=ESCAPES) for table in report.tables}
    files |= {f"{picture.name}.png": picture.png for picture in report.pictures}
    return files | {"index.html": render(report).encode(errors=ESCAPES)}


def render(report: Report) -> str:
    """The page, which needs no network, no script and no other file.

    Examples:
      >>> from deq_jax.reporting import Report, render
      >>> render(Report.of([])).startswith("<!")
      True
    """
    environment = Environment(
        loader=PackageLoader("deq_jax.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(vars(report))
