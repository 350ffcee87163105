"""Tables of texts, for pages and for CSV files, and how means and their intervals are written in them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from deq_jax.reporting.statistics import Estimate

INTERVAL = "", "95 % interval low", "95 % interval high"

AGREE = "no spread between seeds"

Form = Callable[[float], str]

T = TypeVar("T")


class Cell(NamedTuple):
    """Texts that become one cell of a page and as many of a CSV file.

    Attributes:
      parts: a text; or a mean and the ends of its interval.
      warning, note: beside them on the page, and in the last column of a CSV file.
    """

    parts: tuple[str, ...]
    warning: str = ""
    note: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.value, self.interval)))

    @property
    def value(self) -> str:
        """The text, or a dash for none."""
        return self.parts[0] or "–"

    @property
    def interval(self) -> str:
        """As ``[low, high]``; empty for none."""
        return f"[{', '.join(self.parts[1:])}]" if len(self.parts) > 1 else ""

    def csv(self, column: Column) -> tuple[str, ...]:
        """A text for each of the column's columns in a CSV file."""
        return (*self.parts, *[""] * (len(column.parts) - len(self.parts)))


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      name: its heading.
      parts: suffixes of its columns in a CSV file.
      kind: "text" or "number", and "main" for the number to look at.
    """

    name: str
    parts: tuple[str, ...] = ("",)
    kind: str = "number"


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its heading.

    Attributes:
      name: name of its CSV file.
      caption: a title for the page.
      section: heading of the sections' titles in a CSV file.
      columns: one per cell of a row.
      sections: title -> rows; a single section may have the title "".

    Examples:
      >>> from deq_jax.reporting import Table
      >>> Table("cost", "Cost of a prediction", section="setting", columns=(), sections={}).caption
      'Cost of a prediction'
    """

    name: str
    caption: str
    section: str
    columns: tuple[Column, ...]
    sections: dict[str, list[tuple[Cell, ...]]]

    def csv(self) -> str:
        """The table as CSV: every number in a column of its own, and remarks in the last one if there are any.

        A text that a spreadsheet would run as a formula begins with an apostrophe.
        """
        heads = [f"{column.name} {part}".strip() for column in self.columns for part in column.parts]
        lines = [
            [title, *(part for cell, column in zip(row, self.columns, strict=True) for part in cell.csv(column))]
            for title, rows in self.sections.items()
            for row in rows
        ]
        remarks = [self._remarks(row) for rows in self.sections.values() for row in rows]
        table = [[self.section, *heads, "remarks"]] + [[*line, text] for line, text in zip(lines, remarks, strict=True)]
        first, last = (0 if any(self.sections) else 1), (None if any(remarks) else -1)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(_inert, line[first:last]) for line in table)
        return text.getvalue()

    def _remarks(self, row: tuple[Cell, ...]) -> str:
        marked = zip(self.columns, row, strict=True)
        return "; ".join(f"{column.name}: {text}" for column, cell in marked for text in cell[1:] if text)


def _inert(text: str) -> str:
    """The text, with an apostrophe before it where a spreadsheet would run it as a formula."""
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


@dataclass(frozen=True)
class Field(Generic[T]):
    """A column, and the cell that a row's thing has in it."""

    column: Column
    cell: Callable[[T], Cell]


def filled(
    name: str, caption: str, section: str, fields: Sequence[Field[T]], sections: Mapping[str, Sequence[T]]
) -> Table:
    """The table with a row for each thing; see `Table`.

    Args:
      name, caption, section: as in `Table`.
      fields: its columns.
      sections: title -> things.
    """
    rows = {title: [tuple(field.cell(one) for field in fields) for one in things] for title, things in sections.items()}
    return Table(name, caption, section, tuple(field.column for field in fields), rows)


def sectioned(things: Iterable[T], title: Callable[[T], str]) -> dict[str, list[T]]:
    """The things under their titles, in the order in which these first appear."""
    sections: dict[str, list[T]] = {}
    for one in things:
        sections.setdefault(title(one), []).append(one)
    return sections


def text_cell(text: str) -> Cell:
    """A text, or a number in its written form."""
    return Cell((text,))


def estimate_cell(estimate: Estimate | None, form: Form = "{:.2f}".format, value_form: Form | None = None) -> Cell:
    """A mean and, if there is one, its interval. The mean may have a form of its own."""
    if estimate is None:
        return text_cell("")
    ends = tuple(form(end) for end in estimate.interval or ())
    return Cell(((value_form or form)(estimate.value), *ends), note=AGREE if estimate.agree else "")


def difference_cell(difference: Estimate | None) -> Cell:
    """A difference with its sign and, if there is one, its interval."""
    return estimate_cell(difference, value_form="{:+.2f}".format)
