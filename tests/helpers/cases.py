"""Which cases of a test are fast: each costs a compilation, and a few of a kind show most faults."""

import pytest


def mostly_slow(cases, *fast):
    """All cases for `parametrize`; those that are not at the positions `fast` are marked slow."""
    return [case if i in fast else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]
