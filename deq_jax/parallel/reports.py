"""What JAX's compiled code reports about a lost process: one line on stderr in place of many.

The process that reports is aborted in the same moment. So this file is run as a script beside it, which takes in its
stderr and outlives it: ``python reports.py <reports``. Nothing is imported that takes time.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator

REPORT = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ (\w+)\.(?:cc|h):\d+\] ")  # first line of a report, and its source
ABOUT_PROCESSES = re.compile(r"preemption_\w+|coordination_\w+|client")
OWN = re.compile(r"error: |Traceback |\S+:\d+: \w*Warning: ")  # Python's first lines
FATAL = "JAX distributed service detected fatal errors"
MISSING = re.compile(
    r"(?:stopped sending heartbeats\)|timed out task names):\s*(?:/job:\S*task:)?(\d+)\s*$", re.MULTILINE
)
NO_ANSWER = re.compile(r"leader task|CoordinationService/Heartbeat")  # of process 0, where the service is


def readable(lines: Iterable[str]) -> Iterator[str]:
    """The lines without reports about processes of the job; a lost one is told at the end.

    Args:
      lines: stderr of a process, each line with its end.
    """
    hidden, has_failed, reports = False, False, ""
    for line in lines:
        report = REPORT.match(line)
        if report:
            hidden = ABOUT_PROCESSES.fullmatch(report[1]) is not None
        elif OWN.match(line):
            hidden = False
        if hidden:
            reports += line
        else:
            has_failed |= line.startswith("error: ")
            yield line
    if FATAL in reports and not has_failed:
        yield f"error: {lost_line(_missing(reports))}\n"


def lost_line(number: int | None) -> str:
    """The message on a lost process of the job; None where its number is not known."""
    who = "another process" if number is None else f"process {number}"
    return f"{who} of the job was lost; the same command resumes"


def _missing(reports: str) -> int | None:
    found = MISSING.search(reports)
    if found:
        return int(found[1])
    return 0 if NO_ANSWER.search(reports) else None


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # to all processes of a job: the other one reports on them
        signal.signal(number, signal.SIG_IGN)
    with open(0, errors="surrogateescape") as errors, open(1, "w", errors="surrogateescape", buffering=1) as out:
        out.writelines(readable(errors))
