"""Progress of a command: a bar on a terminal, lines in a file or a pipe."""

from __future__ import annotations

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from deq_jax._cli import console


class Display:
    """Shows the progress of a command: a bar on a terminal, one line at a time elsewhere. Lines are written at once.

    Args:
      count: column that tells how much is done, such as rich's `MofNCompleteColumn()`.
      transient: whether the bar vanishes at the end.
    """

    def __init__(self, count: ProgressColumn, *, transient: bool = False):
        columns = TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn()
        self._bar = Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: float, total: float, text: str, line: str) -> None:
        """Moves the bar to `done` of `total`, with `text` beside it; elsewhere prints `line`."""
        self._bar.update(self._task, completed=done, total=total, description=text)
        if not console.is_terminal:
            console.print(line)

    def say(self, text: str) -> None:
        """Prints a line, above the bar."""
        console.print(text)
