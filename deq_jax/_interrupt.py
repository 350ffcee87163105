"""Ctrl-C in ``python -m deq_jax.COMMAND``: no traceback while it imports, which takes seconds, and not lost later."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MOMENT = 0.01  # s; a callback of the garbage collector takes less


def end_at_once() -> None:
    """In such a process, SIGINT ends it without a word; call `raise_again` once it has imported all."""
    is_command = sys.argv[:1] == ["-m"] and any(argument.startswith("deq_jax.") for argument in sys.orig_argv)
    if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_again() -> None:
    """SIGINT is KeyboardInterrupt again, where `end_at_once` has changed it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def never_lost() -> Iterator[None]:
    """Where KeyboardInterrupt cannot be raised, as in a callback of the garbage collector, it is raised soon after."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.main_thread().ident, signal.SIGINT
            threading.Timer(MOMENT, signal.pthread_kill, again).start()
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


end_at_once()
