"""Checkpoints give back what was saved, or name the first part that does not fit."""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deq_jax import InputError
from deq_jax.storage.checkpoints import Checkpoints


class State(NamedTuple):
    step: object
    params: object
    batch_stats: object
    opt_state: object


def state_of(optimizer):
    params = {"cell": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3, jnp.bfloat16)}, "norm": [jnp.ones(2), jnp.ones(())]}
    return State(jnp.int32(3), params, {}, optimizer.init(params))


OPTIMIZERS = {
    "adam": optax.adam(optax.constant_schedule(0.1)),
    "masked": optax.chain(optax.masked(optax.sgd(0.1, 0.9), {"cell": True, "norm": False}), optax.trace(0.9)),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=optax.cosine_decay_schedule(0.1, 10)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    Checkpoints(folder, keep=1).save(3, state_of(OPTIMIZERS["adam"]), {"note": [1, None]})
    return folder


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_state_is_restored_exactly(name, tmp_path):
    state = state_of(OPTIMIZERS[name])
    Checkpoints(tmp_path, keep=1).save(3, state, {"note": [1, None]})
    restored, meta = Checkpoints(tmp_path, keep=1).restore(jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state) and meta == {"note": [1, None]}
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


def without(params, name):
    return {"cell": {other: leaf for other, leaf in params["cell"].items() if other != name}, "norm": params["norm"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p | {"cell": p["cell"] | {"w": np.ones((2, 4), np.float32)}}, "w has shape (2, 3), expected (2, 4)"),
        (lambda p: p | {"cell": p["cell"] | {"w": np.ones((2, 3))}}, "w has dtype float32, expected float64"),
        (lambda p: p | {"cell": p["cell"] | {"b": np.ones(3, np.float32)}}, "b has dtype bfloat16, expected float32"),
        (lambda p: p | {"cell": p["cell"] | {"v": np.ones(3)}}, "has no params/cell/v"),
        (lambda p: without(p, "w"), "params/cell/w was not expected"),
        (lambda p: p | {"norm": p["norm"][:1]}, "params/norm/1 was not expected"),
    ],
    ids=["shape", "x64", "half", "more", "less", "list"],
)
def test_the_first_part_that_does_not_fit_is_named(saved, change, words):
    state = state_of(OPTIMIZERS["adam"])
    with pytest.raises(InputError) as raised:
        Checkpoints(saved, keep=1).restore(state._replace(params=change(state.params)))
    assert str(raised.value).startswith(f"checkpoint {saved / '3'} does not fit: ") and words in str(raised.value)


def test_a_failed_restore_leaves_no_hook_behind(tmp_path):
    """Tensorstore answers late reads for a moment after one failed; these are kept quiet, and nothing else is."""
    state = {f"w{number}": np.random.default_rng(number).normal(size=(100, 100)) for number in range(40)}
    Checkpoints(tmp_path, keep=1).save(3, state, {})
    for path in tmp_path.rglob("ocdbt*/d/*"):
        path.write_bytes(b"damaged")
    before = sys.unraisablehook
    seen: list[Any] = []
    sys.unraisablehook = mine = seen.append
    try:
        with pytest.raises(InputError, match="cannot be read; move it away"):
            Checkpoints(tmp_path, keep=1).restore(state)
        assert sys.unraisablehook is mine
    finally:
        sys.unraisablehook = before
    assert seen == []


def test_some_parts_alone_are_restored(saved):
    params = state_of(OPTIMIZERS["adam"]).params
    template = {"params": params, "batch_stats": {}}
    restored, _ = Checkpoints(saved, keep=1).restore(template, only=list(template))
    assert jax.tree.structure(restored) == jax.tree.structure(template)
    jax.tree.map(np.testing.assert_array_equal, restored, template)
    with pytest.raises(InputError, match="does not fit: params/cell/w was not expected"):
        Checkpoints(saved, keep=1).restore(template | {"params": without(params, "w")}, only=list(template))
