"""Shared by the command lines: errors in one line, the compilation cache, the console."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from deq_jax._interrupt import never_lost, raise_again
from deq_jax.core.errors import InputError, WriteError, escaped
from deq_jax.parallel.processes import connect, end_without_others, is_primary


class PlainConsole(Console):
    """A console that shows texts literally: names in files have no markup, and do not steer the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, for `print` and the cells of tables."""
        return super().render_str(escaped(text), **options)


# Into a file or a pipe tables are written whole, at their own width.
console = PlainConsole(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)


def add_set_option(parser: argparse.ArgumentParser, text: str) -> None:
    """The repeatable option ``--set NAME=VALUE``, kept as a list of `assignments`, with its help."""
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="assignments", help=text)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that connect several processes."""
    several = parser.add_argument_group("several processes", "detected automatically on TPU pods and in SLURM steps")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument(
        "--processes", type=int, metavar="N", help="number of processes; default: detect; 1 disables detection"
    )
    several.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


def join(options: argparse.Namespace) -> None:
    """Joins the other processes of the job. Only the primary one prints."""
    connect(options.coordinator, options.processes, options.process)
    console.quiet = not is_primary()


@contextmanager
def command_line() -> Iterator[None]:
    """Runs a command: a user's error becomes one line on stderr and exit code 2; compiled code is kept.

    A file that cannot be written becomes one line and exit code 74, an interruption from the keyboard one and 130, the
    loss of another process of the job one and 134.
    """
    raise_again()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deq_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        with never_lost():
            yield
    except InputError as error:
        fail(str(error), 2)
    except WriteError as error:
        fail(str(error), os.EX_IOERR)
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX has both for a lost connection
        end_without_others(error)
        raise
    except KeyboardInterrupt:
        fail("interrupted", 128 + signal.SIGINT)


def note(text: str) -> None:
    """Prints a line that the user should know of."""
    console.print(f"note: {text}")


def fail(message: str, code: int) -> None:
    """Exits with one line on stderr."""
    sys.stderr.write("error: " + escaped(" ".join(message.split())) + "\n")  # whole, as compiled code writes, too
    sys.stderr.flush()
    raise SystemExit(code)
