"""Settings have ranges: its ends are allowed, and the next value beyond them is refused by name."""

import pytest

from deq_jax import InputError


def assert_range(make, setting, allowed, refused):
    """`make(setting=value)` works with each allowed value, and refuses the others in a line with the setting's name."""
    for value in allowed:
        assert make(**{setting: value}) is not None
    for value in refused:
        with pytest.raises(InputError, match=rf"\b{setting}\b.*got"):
            make(**{setting: value})
