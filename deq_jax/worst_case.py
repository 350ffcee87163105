"""The worst case over many trials for each image, on disk batch by batch, so that it can be resumed at any moment.

Each batch of each trial is a file, written whole or not at all; what is written is never computed again. What
an evaluation consists of is in `deq_jax.trials`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax.attacks import PGD
from deq_jax.config import first_difference, to_tree
from deq_jax.data import EvaluationBatch, Images, to_unit
from deq_jax.evaluation import Measured, attack_batch, choose_early_state, is_correct, measure, spectral_radii
from deq_jax.losses import cross_entropy
from deq_jax.parallel import check_batch_size, replicate_and_split
from deq_jax.processes import agreed, from_primary, is_primary
from deq_jax.readouts import IntermediateState
from deq_jax.records import make_folder, read_json, write_json, write_npz
from deq_jax.results import Attempt, Cost, Probe, WorstCase, worst_of
from deq_jax.surrogates import Direct, Surrogate, deployed, judged
from deq_jax.transfers import Transfer, check_radius, is_within, read_npz, read_trial
from deq_jax.trials import REFERENCE, EarlyState, EvalConfig, Trial
from deq_jax.types import Array, Attack, Classifier, InputError, Keys, PyTree, Variables, require

TIMED = 5  # predictions that are timed
PROBED = 16  # images on which the predictor is asked in several ways
Report = Callable[[str, float], None]
"""``(name of the trial, share of the whole evaluation that is done)``."""


def worst_case(
    config: EvalConfig,
    classifier: Classifier,
    variables: Variables,
    images: Images,
    out: Path,
    *,
    validation: Images | None = None,
    about: dict[str, Any] | None = None,
    report: Report = lambda name, share: None,
) -> WorstCase:
    """Attacks the deployed predictor with all trials, or goes on where `out` was left.

    Args:
      config: what is done.
      classifier: as trained.
      variables: of the classifier.
      images: to be attacked.
      out: folder of the results: manifest.json, and trials/NAME/batch-NNNN.npz for each trial and "clean".
      validation: held-out training images, on which an early state is chosen.
      about: further JSON data that must be the same when an evaluation is resumed.
      report: called after every batch.

    Raises:
      InputError: `out` holds another evaluation; the trials do not fit the classifier; the batch does not divide
        among the devices; logits that are not finite; transferred images that are not of these images.
    """
    check_batch_size(config.batch_size)
    images = Images(images.x[: config.max_images], images.y[: config.max_images])
    x = np.asarray(to_unit(jnp.asarray(images.x)))
    transfers = {
        trial.name: _digest(trial.attack.load(images, x, config.threat))
        for trial in config.trials
        if isinstance(trial.attack, Transfer)
    }
    _check_trials(config, classifier, variables)
    digests = {"variables": _digest(variables), "images": _digest(images), "transfers": transfers}
    versions = {name: version(name) for name in ("deq_jax", "jax")}
    _check_reference(config, _digest(variables))
    _claim(out, {"class": "evaluation", **(about or {}), "config": to_tree(config), **digests, **versions})
    predictor, early_state = _predictor(config, classifier, variables, validation, out)
    run = _Run(config, classifier, predictor, variables, images, x, out, report)
    return replace(run.all(), early_state=early_state)


class _Run:
    """One evaluation: what it asks of the devices, unless it is on disk already."""

    def __init__(self, config, trained, predictor, variables, images, x, out, report):
        self.config: EvalConfig = config
        self.trained: Classifier = trained
        self.predictor: Classifier = predictor
        self.variables: Variables = variables
        self.images: Images = images
        self.x: np.ndarray = x
        self.out: Path = out
        self.report: Report = report
        self.stages = ["clean", *(trial.name for trial in (*config.trials, *config.extra_trials))]
        self.attackers: dict[tuple[Attack | Transfer, bool], Callable] = {}

    def all(self) -> WorstCase:
        y, every = self.images.y, np.arange(len(self.images.y))
        stage = self._stage("clean", every, self._clean_stage())
        clean = _measured(stage)
        bad = np.flatnonzero(~np.isfinite(clean.margin[:, -1]))
        require(len(bad) == 0, f"the logits of {len(bad)} clean images are not finite (first: image {bad[:1]})")
        correct = is_correct(clean, y)[:, -1]
        attempts: dict[str, Attempt] = {}
        for trial in self.config.trials:
            rows = every[correct] if self.config.skip_broken else every
            start = worst_of(self.x, y, clean, attempts)[0] if trial.from_worst else None
            found = self._attempt(trial, rows, clean, start)
            if not found.inside.all():
                check_radius(f"trial {trial.name}", found.x_adv, self.x, self.config.threat)
            correct = correct & is_correct(found.measured, y)[:, -1]
            attempts[trial.name] = found
        for trial in self.config.extra_trials:
            attempts[trial.name] = self._attempt(trial, every, clean)
        x_adv, worst = worst_of(self.x, y, clean, attempts)
        zero, radius = stage["zero_gradient"], stage["spectral_radius"]
        return WorstCase(self.config, y, clean, zero, radius, self._probe(), self._cost(), attempts, x_adv, worst)

    def _attempt(self, trial: Trial, rows: np.ndarray, clean: Measured, start: np.ndarray | None = None) -> Attempt:
        measured, seconds = Measured(*(part.copy() for part in clean)), 0.0
        attacked, inside = np.zeros(len(self.x), bool), np.ones(len(self.x), bool)
        read = partial(read_trial, self.out / "trials" / trial.name, self.x)
        if len(rows) == 0:
            return Attempt(self.x.copy, measured, attacked, inside, seconds)
        is_transfer = isinstance(trial.attack, Transfer)
        stage = self._transfer_stage(trial) if is_transfer else self._attack_stage(trial, start)
        found = self._stage(trial.name, rows, stage)
        attacked[rows], seconds = True, float(np.sum(found["seconds"]))
        inside[rows] = is_within(found["x_adv"], self.x[rows], self.config.threat)
        for whole, part in zip(measured, _measured(found), strict=True):
            whole[rows] = part
        return Attempt(read, measured, attacked, inside, seconds)

    def _stage(self, name: str, rows: np.ndarray, run: Callable[[EvaluationBatch], dict]) -> dict[str, np.ndarray]:
        """The results of all batches of a trial, one below the other, in the order of `rows`."""
        starts = range(0, len(rows), self.config.batch_size)
        parts = []
        for number, start in enumerate(starts):
            path = self.out / "trials" / name / f"batch-{number:04d}.npz"
            own = rows[start : start + self.config.batch_size]
            parts.append(_stored(path, partial(self._batch, run, own)))
            done = self.stages.index(name) + (number + 1) / len(starts)
            self.report(name, done / len(self.stages))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _batch(self, run: Callable[[EvaluationBatch], dict], rows: np.ndarray) -> dict[str, np.ndarray]:
        """What `run` finds for these images, in a batch that they fill by repetition."""
        started = time.perf_counter()
        number = np.resize(rows, self.config.batch_size).astype(np.int32)
        is_padding = np.arange(len(number)) >= len(rows)
        found = run(EvaluationBatch(self.images.x[number], self.images.y[number], number, is_padding))
        found = {key: np.asarray(values)[: len(rows)] for key, values in found.items()}
        return {"number": number[: len(rows)], **found, "seconds": np.array([time.perf_counter() - started])}

    def _clean_stage(self) -> Callable[[EvaluationBatch], dict]:
        def on_device(variables: Variables, batch: EvaluationBatch) -> dict[str, Array]:
            x, keys = to_unit(batch.x), Keys(jax.random.key(self.config.seed), batch.number)
            oracle = judged(Direct(), self.predictor, variables, self.config.draws)
            gradient = oracle.grad(cross_entropy, x, batch.y, keys)[2]
            measured = measure(self.predictor, variables, x, batch.y, self._draw_from(keys))
            radius = spectral_radii(self.trained, variables, x, keys)
            is_zero = jnp.all((gradient == 0) | jnp.isnan(gradient), axis=(1, 2, 3))  # attacks stand still at NaN
            return {**measured._asdict(), "zero_gradient": is_zero, "spectral_radius": radius}

        return partial(replicate_and_split(on_device, joint=False), self.variables)

    def _transfer_stage(self, trial: Trial) -> Callable[[EvaluationBatch], dict]:
        def on_device(variables: Variables, batch: EvaluationBatch) -> dict[str, Array]:
            keys = self._draw_from(Keys(jax.random.key(self.config.seed), batch.number))
            return {"x_adv": batch.x, **measure(self.predictor, variables, batch.x, batch.y, keys)._asdict()}

        run = replicate_and_split(on_device, joint=False)
        images = cache(partial(cast(Transfer, trial.attack).load, self.images, self.x, self.config.threat))
        return lambda batch: run(self.variables, batch._replace(x=images()[batch.number]))

    def _attack_stage(self, trial: Trial, start: np.ndarray | None) -> Callable[[EvaluationBatch], dict]:
        attack, kind = cast(Attack, trial.attack), (trial.attack, trial.from_worst)

        def on_device(
            state: tuple[Variables, Surrogate], parts: tuple[EvaluationBatch, Array | None]
        ) -> dict[str, Array]:
            (variables, surrogate), (batch, start) = state, parts
            attacked = partial(attack_batch, seed=self.config.seed, surrogate=surrogate, draws=self.config.draws)
            begun = attack if start is None else replace(cast(PGD, attack), start=lambda *_: start)
            x_adv, measured = attacked(self.predictor, variables, begun, batch)
            return {"x_adv": x_adv, **measured._asdict()}

        if kind not in self.attackers:
            self.attackers[kind] = replicate_and_split(on_device, joint=False)
        run, state = self.attackers[kind], (self.variables, jax.tree.map(np.asarray, trial.surrogate))
        return lambda batch: run(state, (batch, None if start is None else start[batch.number]))

    def _probe(self) -> Probe:
        @jax.jit
        def ask(variables: Variables, x: Array, number: Array, seed: int) -> Array:
            keys = self._draw_from(Keys(jax.random.key(seed), number))
            return self.predictor(variables, x, keys=keys).logits

        def answers() -> dict[str, np.ndarray]:
            x, number = self.x[:PROBED], np.arange(len(self.x[:PROBED]), dtype=np.int32)
            logits = partial(ask, self.variables)
            return {
                "whole": np.asarray(logits(x, number, 0)),
                "reverse": np.asarray(logits(x[::-1], number[::-1], 0))[::-1],
                "alone": np.concatenate([logits(x[i : i + 1], number[i : i + 1], 0) for i in number]),
                "other_key": np.asarray(logits(x, number, 1)),
            }

        return Probe(**_stored(self.out / "probe.npz", answers))

    def _cost(self) -> Cost:
        @jax.jit
        def predict(variables: Variables, x: Array, keys: Keys | None) -> tuple[Array, Array]:
            logits, _, solution, *_ = self.predictor(variables, x, keys=keys)
            unknown = jnp.full(len(x), jnp.nan)
            return logits, unknown if solution is None else solution.evaluations.astype(float)

        def timed() -> dict[str, np.ndarray]:
            number = np.resize(np.arange(len(self.x), dtype=np.int32), self.config.batch_size)
            query = self.x[number], self._draw_from(Keys(jax.random.key(self.config.seed), jnp.asarray(number)))
            _, evaluations = predict(self.variables, *query)
            seconds = []
            for _ in range(TIMED):
                started = time.perf_counter()
                jax.block_until_ready(predict(self.variables, *query))
                seconds.append((time.perf_counter() - started) / len(number))
            return {"evaluations": np.asarray(evaluations)[:PROBED], "seconds": np.array(seconds)}

        return Cost(**_stored(self.out / "cost.npz", timed))

    def _draw_from(self, keys: Keys) -> Keys | None:
        """What the deployed predictor draws from; nothing unless it is random."""
        return None if self.config.draws is None else keys


def _stored(path: Path, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the file holds; where there is none it is computed and written. All processes see the same folder."""
    if from_primary(np.array(path.exists())):
        return read_npz(path)
    arrays = compute()
    if is_primary():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_npz(path, arrays)
    return arrays


def _measured(arrays: dict[str, np.ndarray]) -> Measured:
    return Measured(**{name: arrays[name] for name in Measured._fields})


def _check_trials(config: EvalConfig, classifier: Classifier, variables: Variables) -> None:
    """Has every surrogate check that it fits what is deployed."""
    predictor = config.predictor or classifier
    if isinstance(predictor, EarlyState):
        predictor = deployed(predictor.classifier or classifier, IntermediateState(1))
    for trial in (*config.trials, *config.extra_trials):
        try:
            trial.surrogate(predictor, variables)
        except InputError as error:
            raise InputError(f"trial {trial.name}: {error}") from None


def _check_reference(config: EvalConfig, variables: str) -> None:
    """Refuses images as those of the undefended predictor that were made against another one."""
    for trial in config.trials:
        made = trial.attack.manifest if isinstance(trial.attack, Transfer) and trial.suite == REFERENCE else None
        undefended = made is None or (made["config"]["predictor"] is None and made["variables"] == variables)
        expected = "expected images made against the undefended predictor of this training and checkpoint"
        require(undefended, f"trial {trial.name}: {expected}, but its evaluation attacked another one")


def _predictor(
    config: EvalConfig, classifier: Classifier, variables: Variables, validation: Images | None, out: Path
) -> tuple[Classifier, list[float] | None]:
    """What is deployed, and the accuracies by which an early state was chosen."""
    early = config.predictor
    if not isinstance(early, EarlyState):
        return early or classifier, None
    if validation is None:
        raise InputError("an early state is chosen on held-out training images, expected validation images")
    source = early.classifier or classifier
    choose = partial(choose_early_state, batch_size=config.batch_size, seed=config.seed)

    def accuracies() -> dict[str, np.ndarray]:
        return {"accuracy": np.array(choose(source, variables, validation, early.attack))}

    accuracy = _stored(out / "early_state.npz", accuracies)["accuracy"]
    return deployed(source, IntermediateState(1 + int(np.argmax(accuracy)))), accuracy.tolist()


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder this evaluation's; refuses that of another one, naming the first difference."""
    path = out / "manifest.json"
    with agreed():
        if path.exists():
            difference = first_difference(read_json(path), manifest)
            require(difference is None, f"{out} holds another evaluation: {difference}; choose another folder (--out)")
        elif is_primary():
            write_json(make_folder(out) / "manifest.json", manifest)


def _digest(tree: PyTree) -> str:
    """SHA-256 of all arrays and of where they are."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()[:16]
