"""The worst case over many trials for each image, kept batch by batch, so that it can be resumed at any moment.

Each batch of each trial is kept whole or not at all, in a folder as a file. A batch that is kept is never computed
again. The parts of an evaluation are in `evaluation.plan`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.core.errors import InputError, require
from deq_jax.core.readouts import IntermediateState
from deq_jax.data.batches import EvaluationBatch, to_unit
from deq_jax.data.datasets import Images, checked_images
from deq_jax.defences.states import deployed
from deq_jax.evaluation.early_state import choose_early_state
from deq_jax.evaluation.moments import Moment, Watch
from deq_jax.evaluation.opening import check_reference, check_trials, claimed
from deq_jax.evaluation.plan import EarlyState, EvalConfig
from deq_jax.evaluation.probes import several_answers, timed_answers
from deq_jax.evaluation.red_flags import ZERO_GRADIENTS, is_white_box, red_flags
from deq_jax.evaluation.results import Attempt, Cost, Probe, Worst, WorstCase
from deq_jax.evaluation.rows import Row, from_columns, is_correct, replaced, to_columns
from deq_jax.evaluation.stages import CLEAN, Stage, Stages
from deq_jax.evaluation.store import Arrays, Store
from deq_jax.evaluation.transfers import Transfer, check_radius, is_within
from deq_jax.models.base import Classifier, Variables, check_classifier
from deq_jax.parallel.devices import check_batch_size
from deq_jax.storage.environment import decisive_settings
from deq_jax.storage.files import digest
from deq_jax.storage.locks import POLL
from deq_jax.storage.trees import to_tree
from deq_jax.surrogates.base import Direct

Report = Callable[[Moment], None]


def worst_case(
    config: EvalConfig,
    classifier: Classifier,
    variables: Variables,
    images: Images,
    out: Path | None = None,
    *,
    validation: Images | None = None,
    about: dict[str, Any] | None = None,
    share: bool = False,
    report: Report = lambda moment: None,
) -> WorstCase:
    """Attacks the deployed predictor with all trials, or resumes the same evaluation in `out`.

    Args:
      config: the evaluation.
      classifier: as trained.
      variables: variables of the classifier.
      images: images to attack.
      out: folder of the results: manifest.json, and trials/NAME/batch-NNNN.npz for each trial and "clean". None keeps
        all of it in memory.
      validation: held-out training images, on which an early state is chosen.
      about: further JSON data that must be the same when an evaluation is resumed.
      share: other processes may do the same evaluation in `out` at the same time; one of them computes each batch.
      report: called before every long step, and after every batch.

    Raises:
      InputError: the images are not as in `Images`; `out` holds another evaluation, or another process writes there;
        the trials do not fit the classifier; the batch does not divide among the devices; logits that are not finite;
        transferred images that are not of these images.

    Examples:
      >>> import numpy as np
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.data import Images
      >>> from deq_jax.evaluation import EvalConfig, Trial, worst_case
      >>> from deq_jax.models import small_cnn
      >>> from deq_jax.surrogates import ThroughSolver
      >>> model, images = small_cnn(10, 4), Images(np.zeros((2, 8, 8, 1), np.float32), np.array([3, 4]))
      >>> config = EvalConfig(Linf(0.1), trials=(Trial("pgd", PGD(Linf(0.1)), ThroughSolver()),))
      >>> worst_case(config, model, model.init(0, images.x), images)
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: trial pgd: ThroughSolver: expected an Equilibrium with a solver, got an Explicit
    """
    check_batch_size(config.batch_size)
    alone = jax.process_count() == 1
    require(not share or (alone and out is not None), "share: expected a folder, and processes that are no one job")
    check_classifier("worst_case: classifier", classifier)
    if config.predictor is not None and not isinstance(config.predictor, EarlyState):
        check_classifier("EvalConfig: predictor", config.predictor)
    images = checked_images(images.x[: config.max_images], images.y[: config.max_images], "worst_case")
    x = np.asarray(to_unit(jnp.asarray(images.x)))
    transfers = {
        trial.name: digest(trial.attack.load(images, x, config.threat))
        for trial in config.trials
        if isinstance(trial.attack, Transfer)
    }
    check_trials(config, classifier, variables, Images(x[:1], images.y))
    digests = {"variables": digest(variables), "images": digest(images), "transfers": transfers}
    versions = {name: version(name) for name in ("deq_jax", "jax")}
    check_reference(config, digest(variables))
    known = {**(about or {}), "config": to_tree(config), **digests, **versions, "settings": decisive_settings()}
    with claimed(out, {"class": "evaluation", **known}, share=share):
        store = Store(out, is_shared=share)
        return folded(config, classifier, variables, images, store, validation, report)[0]


def folded(
    config: EvalConfig,
    classifier: Classifier,
    variables: Variables,
    images: Images,
    store: Store,
    validation: Images | None = None,
    report: Report = lambda moment: None,
) -> tuple[WorstCase, Stages]:
    """The worst case over all trials, and their programs; see `worst_case`. Batches in the store are not computed."""
    x = np.asarray(to_unit(jnp.asarray(images.x)))
    predictor, early_state = _predictor(config, classifier, variables, validation, store, report)
    stages = Stages(config, classifier, predictor, variables, images, x)
    names = (CLEAN, *(trial.name for trial in config.all_trials))
    batches = Batches(images, config.batch_size, store, names, report)
    found = _attacked(stages, batches, early_state)
    return replace(found, red_flags=tuple(red_flags(found)) if found.attempts else ()), stages


@dataclass(frozen=True)
class Batches:
    """Runs the stages of an evaluation, unless their results are kept.

    Attributes:
      images: images that are evaluated.
      size: images at a time; the last batch is filled by repetition.
      store: keeps the results of each batch.
      names: names of all stages in their order, for the report.
      report: called before the first batch that is computed, and after each.
    """

    images: Images
    size: int
    store: Store
    names: tuple[str, ...]
    report: Report

    def get(self, stage: Stage, rows: np.ndarray, before: np.ndarray) -> Arrays:
        """Results of a stage for some images, in their order.

        Args:
          stage: the stage.
          rows: numbers of the images.
          before: [N] bool, which images count as correct before it, for the report.

        Returns:
          Its arrays [len(rows), ...], with the number of each image, and the seconds of each batch. None without
          images.
        """
        place, correct = 1 + self.names.index(stage.name), before.copy()
        watch = Watch(stage.name, place, len(self.names), len(rows), float(np.mean(before)), stage.queries)
        if len(rows) == 0:
            self.report(watch.now())
        parts: dict[int, Arrays] = {}
        left, busy, compiled = deque(enumerate(self._split(rows))), 0, False
        while left:
            number, own = left.popleft()
            if not (compiled or self.store.has(stage.name, number)):
                self.report(watch.begins())
                compiled = True
            found = self.store.batch(stage.name, number, partial(self._run, stage, own))
            if found is None:  # another process computes it
                left.append((number, own))
                busy = (busy + 1) % len(left)
                if busy == 0:
                    self.report(watch.waits())
                    time.sleep(POLL)
                continue
            other = f"trial {stage.name}, batch {number}: the kept file is of other images or incomplete; delete it"
            require(self._fits(stage, own, found), other)
            parts[number], busy = found, 0
            correct[own] &= is_correct(from_columns(found), self.images.y[own]).deployed
            watch = watch.after(len(own), float(np.mean(correct)), float(np.sum(found["seconds"])))
            self.report(watch.now())
        return {key: np.concatenate([parts[number][key] for number in sorted(parts)]) for key in parts.get(0, ())}

    def asked(self, stage: Stage, rows: np.ndarray) -> Arrays:
        """Results of a stage that measures nothing; they are neither kept nor reported."""
        parts = [self._run(stage, own) for own in self._split(rows)]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _fits(self, stage: Stage, rows: np.ndarray, found: Arrays) -> bool:
        """Whether these are results of the stage for these images."""
        names = {*Row._fields, *stage.also, "number", "seconds"}
        if not (names <= found.keys() and np.array_equal(found["number"], rows)):
            return False
        columns = {found[name].shape for name in Row._fields}
        lengths = {values.shape[:1] for name, values in found.items() if name != "seconds"}
        images = found["x_adv"].shape[1:] if "x_adv" in found else self.images.x.shape[1:]
        numeric = all(values.dtype.kind in "biuf" for values in found.values())
        alike = len(columns) == 1 and {len(shape) for shape in columns} == {2} and lengths == {(len(rows),)}
        return numeric and alike and images == self.images.x.shape[1:]

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        return [rows[start : start + self.size] for start in range(0, len(rows), self.size)]

    def _run(self, stage: Stage, rows: np.ndarray) -> Arrays:
        started = time.perf_counter()
        number = np.resize(rows, self.size).astype(np.int32)
        is_padding = np.arange(len(number)) >= len(rows)
        found = stage.run(EvaluationBatch(self.images.x[number], self.images.y[number], number, is_padding))
        kept = {key: values[: len(rows)] for key, values in found.items()}
        return {"number": number[: len(rows)], **kept, "seconds": np.array([time.perf_counter() - started])}


def _attacked(stages: Stages, batches: Batches, early_state: list[float] | None) -> WorstCase:
    """The fold over all trials: each updates the worst case so far."""
    config, x, y = stages.config, stages.x, stages.images.y
    every = np.ones(len(y), bool)
    first = batches.get(stages.clean(), np.flatnonzero(every), every)
    clean = from_columns(first)
    bad = np.flatnonzero(~np.isfinite(clean.deployed.margin))
    require(len(bad) == 0, f"the logits of {len(bad)} clean images are not finite (first: image {bad[:1]})")
    correct = withstood = is_correct(clean, y).deployed
    untouched = worst = Worst(x, clean)
    attempts: dict[str, Attempt] = {}
    for trial in config.all_trials:
        is_cumulative = config.skip_broken and trial in config.trials
        left, before = (withstood, withstood) if is_cumulative else (every, correct)
        stage = stages.of(trial, worst.x_adv if trial.from_worst else None)
        attempt, x_adv = _attempt(stages, batches, stage, untouched, left, before)
        if trial in config.trials and not attempt.inside.all():
            check_radius(f"trial {trial.name}", x_adv, x, config.threat)
        withstood = withstood & is_correct(attempt.measured, y).deployed
        worst = worst.updated(y, x_adv, attempt.measured, attempt.inside)
        attempts[trial.name] = attempt
    return WorstCase(
        config,
        y,
        clean,
        _stuck(stages, batches, first["zero_gradient"]),
        first["spectral_radius"],
        *_answers(stages, batches),
        attempts,
        worst.x_adv,
        worst.measured,
        early_state=early_state,
        radius_settled=first.get("radius_settled"),
        adjoint_residual=first.get("adjoint_residual"),
    )


def _attempt(
    stages: Stages, batches: Batches, stage: Stage, untouched: Worst, left: np.ndarray, before: np.ndarray
) -> tuple[Attempt, np.ndarray]:
    """Result of a trial on the images that it attacks, and all its images; the others are clean.

    Args:
      stages, batches: all parts of the evaluation, and how their batches are kept.
      stage: the trial.
      untouched: clean images.
      left: [N] bool, images that are attacked.
      before: [N] bool, images that count as correct before it.
    """
    rows, inside, (x, clean) = np.flatnonzero(left), np.ones(len(left), bool), untouched
    found = batches.get(stage, rows, before)
    if not found:
        return Attempt(x.copy, clean, left.copy(), inside, 0.0), x
    x_adv = x.copy()
    x_adv[rows] = found["x_adv"]
    inside[rows] = is_within(x_adv[rows], x[rows], stages.config.threat)
    states = "a kept file has other states than the one of the clean images; delete it"
    require(found["label"].shape[1:] == to_columns(clean)["label"].shape[1:], f"trial {stage.name}: {states}")
    measured, seconds = replaced(clean, rows, from_columns(found)), float(np.sum(found["seconds"]))
    return Attempt(partial(batches.store.x_adv, stage.name, x), measured, left.copy(), inside, seconds), x_adv


def _stuck(stages: Stages, batches: Batches, still: np.ndarray) -> np.ndarray:
    """[N] bool, where the gradients of all white-box trials vanish, given where the predictor's own does."""
    still = still.copy()
    white = [trial.surrogate for trial in stages.config.all_trials if is_white_box(trial)]
    for surrogate in dict.fromkeys(surrogate for surrogate in white if not isinstance(surrogate, Direct)):
        if np.mean(still) <= ZERO_GRADIENTS:
            break
        rows = np.flatnonzero(still)
        still[rows] = batches.asked(stages.still(surrogate), rows)["zero_gradient"]
    return still


def _answers(stages: Stages, batches: Batches) -> tuple[Probe, Cost]:
    """Answers of the deployed predictor, asked in several ways, and their cost."""
    config, store = stages.config, batches.store
    query = stages.predictor, stages.variables, stages.x, config.draws is not None
    timed = partial(timed_answers, *query, batch_size=config.batch_size, seed=config.seed)
    batches.report(Moment("checks", 1.0, "checks: the deployed predictor is asked in several ways, and timed", True))
    probe = store.answers("probe", Probe._fields, partial(several_answers, *query))
    return Probe(**probe), Cost(**store.answers("cost", Cost._fields, timed))


def _predictor(
    config: EvalConfig,
    classifier: Classifier,
    variables: Variables,
    validation: Images | None,
    store: Store,
    report: Report,
) -> tuple[Classifier, list[float] | None]:
    """The deployed predictor, and the accuracies by which an early state was chosen."""
    early = config.predictor
    if not isinstance(early, EarlyState):
        return early or classifier, None
    if validation is None:
        raise InputError("EarlyState: chosen on held-out training images: expected validation=Images(...), got None")
    source = early.classifier or classifier
    choose = partial(choose_early_state, batch_size=config.batch_size, seed=config.seed)

    def tell(t: int, states: int, accuracy: float | None) -> None:
        found = "compiling" if accuracy is None else f"{100 * accuracy:.2f} % correct under attack"
        report(Moment("early state", 0.0, f"early state: z_{t} of {states} on held-out images: {found}", True))

    def accuracies() -> dict[str, np.ndarray]:
        return {"accuracy": np.array(choose(source, variables, validation, early.attack, report=tell))}

    accuracy = store.answers("early_state", ["accuracy"], accuracies)["accuracy"]
    return deployed(source, IntermediateState(1 + int(np.argmax(accuracy)))), accuracy.tolist()
