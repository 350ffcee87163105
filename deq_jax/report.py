"""One page on many evaluations: robust accuracies, the effect of defences, and whether to trust the numbers.

python -m deq_jax.report runs/a-0 runs/a-1 runs/a-2 --out report
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from deq_jax._cli import command_line, console
from deq_jax.reporting.archive import read_evaluations, unfinished
from deq_jax.reporting.page import report_files
from deq_jax.storage.files import make_folder, write_whole

DESCRIPTION = """\
Put the finished evaluations of one or several training runs on one HTML page.

examples:
  python -m deq_jax.report runs/a --out report
  python -m deq_jax.report runs/a-* runs/b-* --out report
  python -m deq_jax.report runs/a-*/evaluation/test-eval_auto_attack --out report
"""

EPILOG = """\
files that are written:
  index.html          one page that needs no network, no script and no other file
  *.png *.csv         its figures and tables

notes:
  Runs that differ only in their seed become one row. Defences and training methods are compared seed by seed and image
  by image. All intervals are 95 % confidence intervals for other training seeds and other images.
  A robust accuracy is marked as not trustworthy if its evaluation has raised a red flag.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    with command_line():
        evaluations, missing = read_evaluations(options.runs), unfinished(options.runs)
        files = report_files(evaluations, missing)
        out = make_folder(options.out)
        for name, content in files.items():
            write_whole(out / name, _writer(content))
        if missing:
            console.print(f"not evaluated: {', '.join(map(str, missing))}")
        console.print(f"report: {out / 'index.html'}")


def _writer(content: bytes) -> Callable[[BinaryIO], int]:
    return lambda file: file.write(content)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deq_jax.report",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    help = "folder of a training run, with all its finished evaluations, or of one evaluation"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=help)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the page and its files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
