"""How a run ends before its last step."""

from __future__ import annotations


class Interrupted(Exception):
    """The run was asked to stop, and has saved its state if it has a workdir.

    It carries the signal, SIGINT or SIGTERM, or SIGALRM if the time was over (see `minutes` of `fit`), and the step.

    Examples:
      >>> from deq_jax.training import Interrupted
      >>> Interrupted(2, 100).args  # the signal, and the steps that were done
      (2, 100)
    """


class NonFiniteLoss(Exception):
    """The loss is no longer a finite number; the message names the step and the last good checkpoint.

    Examples:
      >>> from deq_jax.training import NonFiniteLoss
      >>> try:
      ...     raise NonFiniteLoss("the loss is nan at step 7 of 100")  # as fit does
      ... except NonFiniteLoss as error:
      ...     print(error)
      the loss is nan at step 7 of 100
    """
