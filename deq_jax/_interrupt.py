"""Ctrl-C while ``python -m deq_jax.COMMAND`` imports, which takes seconds: no traceback, as at SIGTERM."""

import signal
import sys


def end_at_once() -> None:
    """In such a process, SIGINT ends it without a word; call `raise_again` once it has imported all."""
    is_command = sys.argv[:1] == ["-m"] and any(argument.startswith("deq_jax.") for argument in sys.orig_argv)
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """SIGINT is KeyboardInterrupt again, where `end_at_once` has changed it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


end_at_once()
