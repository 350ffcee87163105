"""Questions to a deployed predictor beside the attacks: the same images in several ways, and timed."""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.core.keys import Keys, Purpose, prng_key
from deq_jax.core.types import Array
from deq_jax.models.base import Classifier, Variables

TIMED = 5  # predictions that are timed

PROBED = 16  # images on which the predictor is asked in several ways


def several_answers(predictor: Classifier, variables: Variables, x: np.ndarray, random: bool) -> dict[str, np.ndarray]:
    """The fields of a `results.Probe`; with random, the predictor draws from keys."""

    @jax.jit
    def ask(variables: Variables, x: Array, number: Array, seed: int) -> Array:
        keys = Keys(prng_key(seed), number).fold(Purpose.DEPLOYED)
        return predictor(variables, x, keys=keys if random else None).logits

    x, number = x[:PROBED], np.arange(len(x[:PROBED]), dtype=np.int32)
    logits = partial(ask, variables)
    return {
        "whole": np.asarray(logits(x, number, 0)),
        "reverse": np.asarray(logits(x[::-1], number[::-1], 0))[::-1],
        "alone": np.concatenate([logits(x[i : i + 1], number[i : i + 1], 0) for i in number]),
        "other_key": np.asarray(logits(x, number, 1)),
    }


def timed_answers(
    predictor: Classifier, variables: Variables, x: np.ndarray, random: bool, *, batch_size: int, seed: int
) -> dict[str, np.ndarray]:
    """The fields of a `results.Cost`, of one batch; with random, the predictor draws from keys."""

    @jax.jit
    def predict(variables: Variables, x: Array, keys: Keys | None) -> tuple[Array, Array]:
        logits, _, solution, *_ = predictor(variables, x, keys=keys)
        unknown = jnp.full(len(x), jnp.nan)
        return logits, unknown if solution is None else solution.evaluations.astype(float)

    number = np.resize(np.arange(len(x), dtype=np.int32), batch_size)
    keys = Keys(prng_key(seed), jnp.asarray(number)).fold(Purpose.DEPLOYED)
    query = x[number], keys if random else None
    _, evaluations = predict(variables, *query)
    seconds = []
    for _ in range(TIMED):
        started = time.perf_counter()
        jax.block_until_ready(predict(variables, *query))
        seconds.append((time.perf_counter() - started) / len(number))
    return {"evaluations": np.asarray(evaluations)[:PROBED], "seconds": np.array(seconds)}
