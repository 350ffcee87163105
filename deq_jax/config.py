"""Configurations: frozen objects, built by a Python file's ``get_config()``.

A config holds objects, never strings to be parsed. `to_tree` writes any of them as plain JSON data and
`from_tree` builds it again, so that a run directory is all that evaluation needs.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

import flax.linen as nn
import optax

from deq_jax.attacks.pgd import PGD
from deq_jax.attacks.threat import Linf
from deq_jax.classifiers import Equilibrium, Explicit
from deq_jax.data import CropFlip, Dataset
from deq_jax.gradients import Unrolled
from deq_jax.objectives import Objective, Standard
from deq_jax.readouts import FinalState
from deq_jax.types import Attack, InputError, Optimizer, Readout, require

Config = TypeVar("Config")
MISTAKES = (ImportError, TypeError, NameError, AttributeError)  # of whoever wrote a config file


@dataclass(frozen=True)
class AdamCosine:
    """Adam whose learning rate falls along a cosine, step by step.

    Attributes:
      learning_rate: at the first step.
      final_learning_rate: at the last step.
    """

    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6

    def __post_init__(self):
        rates = 0 <= self.final_learning_rate <= self.learning_rate and self.learning_rate > 0
        message = "AdamCosine: expected 0 <= final_learning_rate <= learning_rate and learning_rate > 0, got "
        require(rates, f"{message}{self.final_learning_rate!r} and {self.learning_rate!r}")

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each step, from 0, of a run of `steps` steps."""
        alpha = self.final_learning_rate / self.learning_rate
        return optax.cosine_decay_schedule(self.learning_rate, steps, alpha)

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optax optimiser of a run of `steps` steps."""
        return optax.adam(self.schedule(steps))


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training.

    Attributes:
      classifier: `Equilibrium` or `Explicit`.
      objective: what is minimised.
      dataset: where the images come from.
      validation_attack: crafts the images on which the best checkpoint is chosen, on held-out
        training images.
      optimizer: `AdamCosine`, or one of your own; see `Optimizer`.
      batch_size: images per step, over all devices.
      accumulate: parts into which each device divides its images of a step, one after the other, to save memory;
        their gradients are averaged, and each part is normalised by its own statistics.
      epochs: passes over the training images.
      pretrain_steps: first steps, clean and shallow: z = f^T(0), plain backpropagation.
      augmentation: of training images; None for none.
      seed: of initialisation, data order and all randomness.
      log_every: steps between two lines of training metrics.
      checkpoint_every: steps between two checkpoints; None for every epoch.
    """

    classifier: Equilibrium | Explicit
    objective: Objective
    dataset: Dataset
    validation_attack: Attack = PGD(Linf(8 / 255), steps=10)
    optimizer: Optimizer = field(default_factory=AdamCosine)
    batch_size: int = 96
    accumulate: int = 1
    epochs: int = 220
    pretrain_steps: int = 0
    augmentation: CropFlip | None = None
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int | None = None

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "epochs", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"TrainConfig: {name} must be a positive integer, got {value!r}")
        for name in ("pretrain_steps", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"TrainConfig: {name} must be >= 0, got {value!r}")
        divides = self.batch_size % self.accumulate == 0
        parts = f"accumulate = {self.accumulate} parts"
        require(divides, f"TrainConfig: batch_size {self.batch_size} does not divide into {parts}")
        every = self.checkpoint_every
        require(
            every is None or every >= 1,
            f"TrainConfig: checkpoint_every must be positive or None, got {every!r}",
        )
        if self.pretrain_steps > 0:
            self.pretraining()  # checks that there is a solver

    def pretraining(self) -> TrainConfig:
        """The config of the pre-training phase: standard training of the cell applied T times to 0."""
        solver = self.classifier.dynamics.solver if isinstance(self.classifier, Equilibrium) else None
        if solver is None:
            raise InputError("TrainConfig: pretrain_steps are for an Equilibrium with a solver")
        classifier = cast(Equilibrium, self.classifier)
        gradient = Unrolled(solver.steps)
        shallow = classifier.with_dynamics(solver=None, readout=FinalState(), gradient=gradient)
        shallow = dataclasses.replace(shallow, jacobian=None)
        return dataclasses.replace(self, classifier=shallow, objective=Standard(), pretrain_steps=0)

    def at(self, step: int, steps_per_epoch: int) -> TrainConfig:
        """The config of training step `step` (from 0): of pre-training, or with the penalty only where it is drawn."""
        if step < self.pretrain_steps:
            return self.pretraining()
        classifier = self.classifier
        if not isinstance(classifier, Equilibrium) or classifier.jacobian is None:
            return self
        if classifier.jacobian.is_drawn(self.seed, step, step // steps_per_epoch):
            return self
        return dataclasses.replace(self, classifier=dataclasses.replace(classifier, jacobian=None))


def with_readout(config: TrainConfig, readout: Readout) -> TrainConfig:
    """The config with another readout of the equilibrium's dynamics."""
    classifier = config.classifier
    if not isinstance(classifier, Equilibrium):
        raise InputError(f"with_readout: expected an Equilibrium, got {type(classifier).__name__}")
    return dataclasses.replace(config, classifier=classifier.with_dynamics(readout=readout))


def load_config(
    path: str | Path,
    kind: type[Config],
    *arguments: Any,
) -> Config:
    """The object returned by ``get_config(*arguments)`` in the Python file at `path`.

    Args:
      path: of the file.
      kind: class of the object.
      *arguments: of get_config.

    Raises:
      InputError: if there is no such file, it cannot be run, or it returns something else.
    """
    path = Path(path)
    require(path.is_file(), f"{path}: no such config file")
    module = _run_module(path)
    require(hasattr(module, "get_config"), f"{path}: expected a function get_config(), found none")
    try:
        config = module.get_config(*arguments)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except MISTAKES as error:  # an unknown or a missing field
        raise InputError(f"{path}: get_config() failed: {error}") from None
    is_config = isinstance(config, kind)
    require(is_config, f"{path}: get_config() must return a {kind.__name__}, got {type(config).__name__}")
    return config


def _run_module(path: Path):
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: a config must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    for folder in (str(path.resolve().parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{error.filename}: line {error.lineno}: {error.msg}") from None
    except (InputError, *MISTAKES) as error:
        raise InputError(f"{path}: {error}{_advice(error)}") from None
    return module


def _advice(error: Exception) -> str:
    """What to do about a name of the clone's folder configs/ that cannot be imported."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ImportError) or package != "configs":
        return ""
    return "; configs/ is not installed with deq_jax: run in the folder of its clone, or add that to PYTHONPATH"


def _module_name(path: Path) -> str:
    """As Python would import it from the current folder, so that evaluation finds what the file defines."""
    path, folder = path.resolve().with_suffix(""), Path.cwd().resolve()
    return ".".join(path.relative_to(folder).parts) if path.is_relative_to(folder) else path.name


def set_fields(config: Any, assignments: list[str]) -> Any:
    """Replaces scalar fields: ``set_fields(config, ["seed=1", "objective.attack.threat.epsilon=0.2"])``.

    Raises:
      InputError: for an unknown name (with the valid ones), a value of the wrong type, or a value that
        the object itself refuses.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        require(bool(equals), f"--set {assignment}: expected NAME=VALUE")
        try:
            config = _set_field(config, name.strip(), name.strip().split("."), text.strip())
        except InputError as error:
            raise InputError(f"--set {assignment}: {error}") from None
    return config


def _set_field(node: Any, whole: str, names: list[str], text: str) -> Any:
    name, *rest = names
    fields = fields_of(node) if dataclasses.is_dataclass(node) else {}
    prefix = whole[: len(whole) - len(".".join(names))]
    if name not in fields:
        valid = ", ".join(prefix + path for path in scalar_paths(node)) or "none"
        raise InputError(f"no field {prefix + name}; valid names: {valid}")
    current = fields[name]
    if rest:
        return _replaced(node, name, _set_field(current, whole, rest, text))
    require(is_scalar(current), f"{whole} is an object, not a scalar; {_instead(whole, current)}")
    return _replaced(node, name, _parse(text, _field_types(node, name), current))


def _instead(name: str, current: Any) -> str:
    """What to do where an object was to be set."""
    paths = scalar_paths(current)
    example = f"set one of its fields, such as --set {name}.{paths[0]}=VALUE, or " if paths else ""
    return f"{example}replace it in a config file: replace(config, ...)"


def _parse(text: str, types: tuple[type, ...], current: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = text
    if float in types and type(value) is int and int not in types:
        value = float(value)
    expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
    require(type(value) in types, f"expected {expected} (now {current!r}), got {text!r}")
    return value


def _field_types(node: Any, name: str) -> tuple[type, ...]:
    hint = typing.get_type_hints(type(node))[name]
    return typing.get_args(hint) or (hint,)


def _replaced(node: Any, name: str, value: Any) -> Any:
    return node.clone(**{name: value}) if isinstance(node, nn.Module) else dataclasses.replace(node, **{name: value})


def fields_of(node: Any) -> dict[str, Any]:
    """The fields of a config object by name, those that Flax adds to modules excepted."""
    hidden = ("parent", "name") if isinstance(node, nn.Module) else ()
    return {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init and f.name not in hidden}


def scalar_paths(node: Any) -> list[str]:
    """Dotted names of all scalar fields below a config object."""
    paths = []
    for name, value in fields_of(node).items() if dataclasses.is_dataclass(node) else ():
        paths += [name] if is_scalar(value) else [f"{name}.{path}" for path in scalar_paths(value)]
    return paths


def is_scalar(value: Any) -> bool:
    """Whether a field is a number, a string or None, and so can be set by name."""
    return value is None or isinstance(value, bool | int | float | str)


def to_tree(node: Any) -> Any:
    """A config object as JSON data: objects as ``{"class": name, field: value}``, functions by name."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {"class": _name(type(node))} | {name: to_tree(value) for name, value in fields_of(node).items()}
    if isinstance(node, FunctionType | type) and "<" not in node.__qualname__:
        return {"name": _name(node)}
    if isinstance(node, tuple | list):
        return [to_tree(item) for item in node]
    expected = "expected numbers, strings, named functions or frozen dataclasses"
    require(is_scalar(node), f"a config cannot hold {node!r}: {expected}")
    return node


def from_tree(tree: Any) -> Any:
    """The object that `to_tree` wrote. Only dataclasses are called; lists become tuples.

    Raises:
      InputError: if a name cannot be imported or does not fit.
    """
    if isinstance(tree, list):
        return tuple(from_tree(item) for item in tree)
    if not isinstance(tree, dict):
        return tree
    tree = _upgraded(tree)
    if set(tree) == {"name"}:
        return _import_name(tree["name"])
    kind = _import_name(tree.get("class", ""))
    is_dataclass = inspect.isclass(kind) and dataclasses.is_dataclass(kind)
    require(is_dataclass, f"config: {tree.get('class')} is not a config class")
    fields = {name: from_tree(value) for name, value in tree.items() if name != "class"}
    try:
        return kind(**fields)
    except TypeError as error:
        raise InputError(f"config: {tree['class']} of this version takes other fields ({error})") from None


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Dotted name and values of the first field in which two config trees differ, or None."""
    old = _upgraded(old) if isinstance(old, dict) else old
    are_mappings = isinstance(old, dict) and isinstance(new, dict) and old.keys() != {"name"}  # which is a function
    if are_mappings and old.get("class") == new.get("class"):
        for name in old | new:
            below = f"{path}.{name}" if path else name
            difference = first_difference(old.get(name), new.get(name), below)
            if difference:
                return difference
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        differences = (first_difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next(filter(None, differences), None)
    return None if old == new else f"{path} was {_brief(old)}, now {_brief(new)}"


def _upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """An object's tree as an older version wrote it, as this version writes it."""
    if tree.get("class") == "deq_jax.attacks.pgd.PGD" and "epsilon" in tree:
        ball = {"class": "deq_jax.attacks.threat.Linf", "epsilon": tree["epsilon"]}
        others = {name: value for name, value in tree.items() if name != "epsilon"}
        return {"class": tree["class"], "threat": ball} | others
    return tree


def _brief(tree: Any) -> str:
    if isinstance(tree, list):
        return f"a list of {len(tree)}"
    return str(tree.get("class", tree.get("name", "an object"))) if isinstance(tree, dict) else repr(tree)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _import_name(name: str) -> Any:
    module, _, attribute = str(name).rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        message = f"config: cannot import {name!r}; run from the folder in which the training was started"
        raise InputError(message) from None
