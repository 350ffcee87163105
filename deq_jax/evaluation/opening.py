"""Checks before an evaluation begins, and the claim of its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from deq_jax.attacks.inputs import check_oracle
from deq_jax.core.errors import InputError, require
from deq_jax.core.readouts import IntermediateState
from deq_jax.data.datasets import Images
from deq_jax.defences.states import deployed
from deq_jax.evaluation.folder import EvaluationFolder
from deq_jax.evaluation.plan import REFERENCE, EarlyState, EvalConfig
from deq_jax.evaluation.transfers import Transfer, read_manifest
from deq_jax.models.base import Classifier, Variables
from deq_jax.parallel.processes import agreed, in_primary, is_primary
from deq_jax.storage.files import write_json
from deq_jax.storage.locks import fellow_writer, make_or_wait, sole_writer
from deq_jax.storage.trees import first_difference
from deq_jax.surrogates.base import Direct, judged


def check_trials(config: EvalConfig, classifier: Classifier, variables: Variables, images: Images) -> None:
    """Checks that every surrogate fits the deployed predictor, and that its logits fit the images and all labels."""
    predictor = config.predictor or classifier
    if isinstance(predictor, EarlyState):
        predictor = deployed(predictor.classifier or classifier, IntermediateState(1))
    check_oracle(judged(Direct(), predictor, variables, config.draws), images.x, images.y)
    for trial in config.all_trials:
        try:
            trial.surrogate(predictor, variables)
        except InputError as error:
            raise InputError(f"trial {trial.name}: {error}") from None


def check_reference(config: EvalConfig, variables: str) -> None:
    """Refuses reference images that were made against another predictor than the undefended one."""
    for trial in config.trials:
        made = trial.attack.manifest if isinstance(trial.attack, Transfer) and trial.suite == REFERENCE else None
        undefended = made is None or (
            made["config"].get("predictor", "") is None and made.get("variables") == variables
        )
        expected = "expected images made against the undefended predictor of this run and checkpoint"
        require(undefended, f"trial {trial.name}: {expected}, but its evaluation attacked another one")


@contextmanager
def claimed(out: Path | None, manifest: dict[str, Any], *, share: bool) -> Iterator[None]:
    """Within it, the folder is this evaluation's; refuses a folder of another one, naming the first difference.

    With `share` other processes that share the same evaluation are let in.
    """
    if out is None:
        yield
        return
    path = EvaluationFolder(out).manifest
    with in_primary(fellow_writer(out) if share else sole_writer(out)):
        with agreed():
            if share:
                make_or_wait(path, partial(write_json, path, manifest))
            if path.exists():
                old = {"settings": manifest["settings"], **read_manifest(path)}  # older ones do not tell
                difference = first_difference(old, manifest)
                advice = "choose another folder (--out)"
                require(difference is None, f"{out} holds another evaluation: {difference}; {advice}")
            elif is_primary():
                write_json(path, manifest)
        yield
