"""One page on many evaluations: what is robust, what a defence changes, and whether the numbers can be trusted.

python -m deq_jax.report runs/a-0 runs/a-1 runs/a-2 --out report
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from deq_jax._cli import command_line, console
from deq_jax.reporting.archive import read_evaluations, unfinished
from deq_jax.reporting.page import report_files
from deq_jax.storage.files import make_folder

EPILOG = """\
Writes index.html, one page that needs no network, no script and no other file, and the figures and tables on it as
PNG and CSV files. Trainings that differ in their seed alone become one row; defences and trainings are compared seed
by seed and image by image. All intervals are 95 % confidence intervals for other training seeds and other images. A
robust accuracy is marked as not trustworthy where an evaluation has raised a red flag.

examples:
  python -m deq_jax.report runs/a --out report
  python -m deq_jax.report runs/a-* runs/b-* --out report
  python -m deq_jax.report runs/a-*/evaluation/test-eval_auto_attack --out report
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    with command_line():
        evaluations, missing = read_evaluations(options.runs), unfinished(options.runs)
        files = report_files(evaluations, missing)
        out = make_folder(options.out)
        for name, content in files.items():
            (out / name).write_bytes(content)
        if missing:
            console.print(f"not evaluated: {', '.join(map(str, missing))}")
        console.print(f"report: {out / 'index.html'}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deq_jax.report",
        description="One HTML page on the finished evaluations of one or several trainings.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help = "folder of a training, all of whose finished evaluations are taken, or of one evaluation"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=help)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the page and its files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
