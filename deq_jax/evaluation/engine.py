"""The worst case over many trials for each image, kept batch by batch, so that it can be resumed at any moment.

Each batch of each trial is kept whole or not at all, in a folder as a file; what is kept is never computed again. What
an evaluation consists of is in `evaluation.plan`.
"""

from __future__ import annotations

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

from deq_jax.attacks.inputs import check_oracle
from deq_jax.attacks.oracles import Attack
from deq_jax.core.errors import InputError, require
from deq_jax.core.losses import cross_entropy
from deq_jax.core.readouts import IntermediateState
from deq_jax.core.types import Array, Keys, Purpose, prng_key
from deq_jax.data.batches import EvaluationBatch, to_unit
from deq_jax.data.datasets import Images
from deq_jax.defences.states import deployed
from deq_jax.evaluation.early_state import choose_early_state
from deq_jax.evaluation.measure import (
    Measured,
    adjoint_residuals,
    attack_batch,
    from_columns,
    is_correct,
    measure,
    replaced,
    spectral_radii,
    to_columns,
)
from deq_jax.evaluation.moments import Moment, Watch
from deq_jax.evaluation.plan import REFERENCE, EarlyState, EvalConfig, Trial
from deq_jax.evaluation.probes import several_answers, timed_answers
from deq_jax.evaluation.red_flags import ZERO_GRADIENTS, is_white_box, red_flags
from deq_jax.evaluation.results import Attempt, Cost, Probe, WorstCase, worst_of
from deq_jax.evaluation.store import Store
from deq_jax.evaluation.transfers import Transfer, check_radius, is_within
from deq_jax.models.base import Classifier, Variables
from deq_jax.parallel.devices import check_batch_size, replicate_and_split
from deq_jax.parallel.processes import agreed, is_primary
from deq_jax.storage.environment import decisive_settings
from deq_jax.storage.files import digest, make_folder, read_json, write_json
from deq_jax.storage.trees import first_difference, to_tree
from deq_jax.surrogates.base import Direct, Surrogate, judged

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
    report: Report = lambda moment: None,
) -> WorstCase:
    """Attacks the deployed predictor with all trials, or resumes what `out` holds of the same evaluation.

    Args:
      config: what is done.
      classifier: as trained.
      variables: of the classifier.
      images: to be attacked.
      out: folder of the results: manifest.json, and trials/NAME/batch-NNNN.npz for each trial and "clean". None keeps
        all of it in memory.
      validation: held-out training images, on which an early state is chosen.
      about: further JSON data that must be the same when an evaluation is resumed.
      report: called before what takes long, and after every batch.

    Raises:
      InputError: `out` holds another evaluation; the trials do not fit the classifier; the batch does not divide
        among the devices; logits that are not finite; transferred images that are not of these images.
    """
    check_batch_size(config.batch_size)
    images = Images(images.x[: config.max_images], images.y[: config.max_images])
    x = np.asarray(to_unit(jnp.asarray(images.x)))
    transfers = {
        trial.name: digest(trial.attack.load(images, x, config.threat))
        for trial in config.trials
        if isinstance(trial.attack, Transfer)
    }
    _check_trials(config, classifier, variables, Images(x[:1], images.y))
    digests = {"variables": digest(variables), "images": digest(images), "transfers": transfers}
    versions = {name: version(name) for name in ("deq_jax", "jax")}
    _check_reference(config, digest(variables))
    known = {**(about or {}), "config": to_tree(config), **digests, **versions, "settings": decisive_settings()}
    if out is not None:
        _claim(out, {"class": "evaluation", **known})
    store = Store(out)
    predictor, early_state = _predictor(config, classifier, variables, validation, store, report)
    run = _Run(config, classifier, predictor, variables, images, x, store, report)
    found = replace(run.all(), early_state=early_state)
    return replace(found, red_flags=tuple(red_flags(found)) if found.attempts else ())


class _Run:
    """One evaluation: what it asks of the devices, unless it is on disk already."""

    def __init__(self, config, trained, predictor, variables, images, x, store, report):
        self.config: EvalConfig = config
        self.trained: Classifier = trained
        self.predictor: Classifier = predictor
        self.variables: Variables = variables
        self.images: Images = images
        self.x: np.ndarray = x
        self.store: Store = store
        self.report: Report = report
        self.stages = ["clean", *(trial.name for trial in (*config.trials, *config.extra_trials))]
        self.attackers: dict[tuple[Attack | Transfer, bool], Callable] = {}

    def all(self) -> WorstCase:
        y, every = self.images.y, np.arange(len(self.images.y))
        stage = self._stage("clean", every, self._clean_stage(), np.ones(len(y), bool))
        clean = from_columns(stage)
        bad = np.flatnonzero(~np.isfinite(clean.deployed.margin))
        require(len(bad) == 0, f"the logits of {len(bad)} clean images are not finite (first: image {bad[:1]})")
        correct = is_correct(clean, y).deployed
        withstood = correct
        attempts: dict[str, Attempt] = {}
        for trial in self.config.trials:
            rows, before = (every[withstood], withstood) if self.config.skip_broken else (every, correct)
            start = worst_of(self.x, y, clean, attempts)[0] if trial.from_worst else None
            found = self._attempt(trial, rows, clean, before, start)
            if not found.inside.all():
                check_radius(f"trial {trial.name}", found.x_adv, self.x, self.config.threat)
            withstood = withstood & is_correct(found.measured, y).deployed
            attempts[trial.name] = found
        for trial in self.config.extra_trials:
            attempts[trial.name] = self._attempt(trial, every, clean, correct)
        x_adv, worst = worst_of(self.x, y, clean, attempts)
        zero, radius = self._stuck(stage["zero_gradient"]), stage["spectral_radius"]
        found = WorstCase(self.config, y, clean, zero, radius, *self._asked(), attempts, x_adv, worst)
        settled, adjoint = stage.get("radius_settled"), stage.get("adjoint_residual")
        return replace(found, radius_settled=settled, adjoint_residual=adjoint)

    def _attempt(
        self, trial: Trial, rows: np.ndarray, clean: Measured, before: np.ndarray, start: np.ndarray | None = None
    ) -> Attempt:
        attacked, inside = np.zeros(len(self.x), bool), np.ones(len(self.x), bool)
        read = partial(self.store.x_adv, trial.name, self.x)
        if len(rows) == 0:
            self.report(self._watch(trial.name, rows, before).now())
            return Attempt(self.x.copy, clean, attacked, inside, 0.0)
        is_transfer = isinstance(trial.attack, Transfer)
        stage = self._transfer_stage(trial) if is_transfer else self._attack_stage(trial, start)
        found = self._stage(trial.name, rows, stage, before, getattr(trial.attack, "gradient_queries", None))
        attacked[rows], seconds = True, float(np.sum(found["seconds"]))
        inside[rows] = is_within(found["x_adv"], self.x[rows], self.config.threat)
        measured = replaced(clean, rows, from_columns(found))
        return Attempt(read, measured, attacked, inside, seconds)

    def _stage(
        self,
        name: str,
        rows: np.ndarray,
        run: Callable[[EvaluationBatch], dict],
        before: np.ndarray,
        queries: int | None = None,
    ) -> dict[str, np.ndarray]:
        """The results of all batches of a trial, one below the other, in the order of `rows`.

        What counts as correct `before` it, [N] bool, and its `queries` are for the report.
        """
        correct, watch = before.copy(), self._watch(name, rows, before, queries)
        parts: list[dict[str, np.ndarray]] = []
        compiled = False
        for number, start in enumerate(range(0, len(rows), self.config.batch_size)):
            part = f"trials/{name}/batch-{number:04d}"
            own = rows[start : start + self.config.batch_size]
            if not (compiled or part in self.store):
                self.report(watch.begins())
                compiled = True
            parts.append(self.store.get(part, partial(self._batch, run, own)))
            correct[own] &= is_correct(from_columns(parts[-1]), self.images.y[own]).deployed
            watch = watch.after(len(own), float(np.mean(correct)), float(np.sum(parts[-1]["seconds"])))
            self.report(watch.now())
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _watch(self, name: str, rows: np.ndarray, before: np.ndarray, queries: int | None = None) -> Watch:
        return Watch(name, 1 + self.stages.index(name), len(self.stages), len(rows), float(np.mean(before)), queries)

    def _batch(self, run: Callable[[EvaluationBatch], dict], rows: np.ndarray) -> dict[str, np.ndarray]:
        """What `run` finds for these images, in a batch that they fill by repetition."""
        started = time.perf_counter()
        number = np.resize(rows, self.config.batch_size).astype(np.int32)
        is_padding = np.arange(len(number)) >= len(rows)
        found = run(EvaluationBatch(self.images.x[number], self.images.y[number], number, is_padding))
        found = dict(found)
        if "measured" in found:
            found = to_columns(jax.tree.map(np.asarray, found.pop("measured"))) | found
        found = {key: np.asarray(values)[: len(rows)] for key, values in found.items()}
        return {"number": number[: len(rows)], **found, "seconds": np.array([time.perf_counter() - started])}

    def _clean_stage(self) -> Callable[[EvaluationBatch], dict]:
        def on_device(variables: Variables, batch: EvaluationBatch) -> dict[str, Any]:
            x, keys = to_unit(batch.x), Keys(prng_key(self.config.seed), batch.number)
            measured = measure(self.predictor, variables, x, batch.y, self._draw_from(keys))
            radius, settled = spectral_radii(self.trained, variables, x, keys)
            adjoint = adjoint_residuals(self.trained, variables, x, batch.y)
            still = self._is_still(variables, Direct(), batch)
            found = {"zero_gradient": still, "spectral_radius": radius, "radius_settled": settled}
            return {"measured": measured, **found, **({} if adjoint is None else {"adjoint_residual": adjoint})}

        return partial(replicate_and_split(on_device, joint=False), self.variables)

    def _is_still(self, variables: Variables, surrogate: Surrogate, batch: EvaluationBatch) -> Array:
        """[B] bool, whether the surrogate's gradient at the images is 0 or NaN, so that attacks stand still."""
        x, keys = to_unit(batch.x), Keys(prng_key(self.config.seed), batch.number)
        oracle = judged(surrogate, self.predictor, variables, self.config.draws)
        gradient = oracle.grad(cross_entropy, x, batch.y, keys.fold(Purpose.QUERY))[2]
        return jnp.all((gradient == 0) | jnp.isnan(gradient), axis=(1, 2, 3))

    def _stuck(self, still: np.ndarray) -> np.ndarray:
        """[N] bool, where the gradients of all white-box trials vanish, given where the predictor's own does."""

        def on_device(state: tuple[Variables, Surrogate], batch: EvaluationBatch) -> dict[str, Any]:
            return {"zero_gradient": self._is_still(*state, batch)}

        run, still = replicate_and_split(on_device, joint=False), still.copy()
        white = [trial for trial in (*self.config.trials, *self.config.extra_trials) if is_white_box(trial)]
        for surrogate in dict.fromkeys(trial.surrogate for trial in white if not isinstance(trial.surrogate, Direct)):
            if np.mean(still) <= ZERO_GRADIENTS:
                break
            ask = partial(run, (self.variables, jax.tree.map(np.asarray, surrogate)))
            rows = np.flatnonzero(still)
            for own in np.split(rows, range(self.config.batch_size, len(rows), self.config.batch_size)):
                still[own] = self._batch(ask, own)["zero_gradient"]
        return still

    def _transfer_stage(self, trial: Trial) -> Callable[[EvaluationBatch], dict]:
        def on_device(variables: Variables, batch: EvaluationBatch) -> dict[str, Any]:
            keys = self._draw_from(Keys(prng_key(self.config.seed), batch.number))
            return {"x_adv": batch.x, "measured": measure(self.predictor, variables, batch.x, batch.y, keys)}

        run = replicate_and_split(on_device, joint=False)
        images = cache(partial(cast(Transfer, trial.attack).load, self.images, self.x, self.config.threat))
        return lambda batch: run(self.variables, batch._replace(x=images()[batch.number]))

    def _attack_stage(self, trial: Trial, start: np.ndarray | None) -> Callable[[EvaluationBatch], dict]:
        attack, kind = cast(Attack, trial.attack), (trial.attack, trial.from_worst)

        def on_device(
            state: tuple[Variables, Surrogate], parts: tuple[EvaluationBatch, Array | None]
        ) -> dict[str, Any]:
            (variables, surrogate), (batch, start) = state, parts
            attacked = partial(attack_batch, seed=self.config.seed, surrogate=surrogate, draws=self.config.draws)
            begun = attack if start is None else partial(attack, start=start)
            x_adv, measured = attacked(self.predictor, variables, begun, batch)
            return {"x_adv": x_adv, "measured": measured}

        if kind not in self.attackers:
            self.attackers[kind] = replicate_and_split(on_device, joint=False)
        run, state = self.attackers[kind], (self.variables, jax.tree.map(np.asarray, trial.surrogate))
        return lambda batch: run(state, (batch, None if start is None else start[batch.number]))

    def _asked(self) -> tuple[Probe, Cost]:
        """What the deployed predictor answers in several ways, and what that costs."""
        config = self.config
        query = self.predictor, self.variables, self.x, config.draws is not None
        timed = partial(timed_answers, *query, batch_size=config.batch_size, seed=config.seed)
        self.report(Moment("checks", 1.0, "checks: the deployed predictor is asked in several ways, and timed", True))
        probe = self.store.get("probe", partial(several_answers, *query))
        return Probe(**probe), Cost(**self.store.get("cost", timed))

    def _draw_from(self, keys: Keys) -> Keys | None:
        """What the deployed predictor draws from; nothing unless it is random."""
        return None if self.config.draws is None else keys


def _check_trials(config: EvalConfig, classifier: Classifier, variables: Variables, images: Images) -> None:
    """Has every surrogate check that it fits what is deployed, whose logits must fit the images and all labels."""
    predictor = config.predictor or classifier
    if isinstance(predictor, EarlyState):
        predictor = deployed(predictor.classifier or classifier, IntermediateState(1))
    check_oracle(judged(Direct(), predictor, variables, config.draws), images.x, images.y)
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
    config: EvalConfig,
    classifier: Classifier,
    variables: Variables,
    validation: Images | None,
    store: Store,
    report: Report,
) -> tuple[Classifier, list[float] | None]:
    """What is deployed, and the accuracies by which an early state was chosen."""
    early = config.predictor
    if not isinstance(early, EarlyState):
        return early or classifier, None
    if validation is None:
        raise InputError("an early state is chosen on held-out training images, expected validation images")
    source = early.classifier or classifier
    choose = partial(choose_early_state, batch_size=config.batch_size, seed=config.seed)

    def tell(t: int, states: int, accuracy: float | None) -> None:
        found = "compiling" if accuracy is None else f"{100 * accuracy:.2f} % correct under attack"
        report(Moment("early state", 0.0, f"early state: z_{t} of {states} on held-out images: {found}", True))

    def accuracies() -> dict[str, np.ndarray]:
        return {"accuracy": np.array(choose(source, variables, validation, early.attack, report=tell))}

    accuracy = store.get("early_state", accuracies)["accuracy"]
    return deployed(source, IntermediateState(1 + int(np.argmax(accuracy)))), accuracy.tolist()


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder this evaluation's; refuses that of another one, naming the first difference."""
    path = out / "manifest.json"
    with agreed():
        if path.exists():
            old = {"settings": manifest["settings"], **read_json(path)}  # older ones do not tell
            difference = first_difference(old, manifest)
            require(difference is None, f"{out} holds another evaluation: {difference}; choose another folder (--out)")
        elif is_primary():
            write_json(make_folder(out) / "manifest.json", manifest)
