"""Configs from Python files, and their scalar fields set by dotted name."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import sys
import traceback
import typing
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import flax.linen as nn

from deq_jax.core.errors import InputError, first_line, require

Config = TypeVar("Config")

OF_THE_CLONE = "; configs/ is not installed with deq_jax: run in the folder of its clone"


def load_config(
    path: str | Path,
    kind: type[Config],
    *arguments: Any,
) -> Config:
    """The object returned by ``get_config(*arguments)`` in the Python file at `path`.

    Args:
      path: the file.
      kind: class of the object.
      *arguments: arguments of get_config.

    Raises:
      InputError: the file does not exist, cannot be run, or returns something else.

    Examples:
      >>> from deq_jax import TrainConfig
      >>> from deq_jax.storage import load_config
      >>> load_config("configs/none.py", TrainConfig)
      Traceback (most recent call last):
          ...
      deq_jax.core.errors.InputError: configs/none.py: no such config file
    """
    path = Path(path)
    outside = path.parts[:1] == ("configs",) and not Path("configs").exists()
    require(path.is_file(), f"{path}: no such config file{OF_THE_CLONE if outside else ''}")
    module = _run_module(path)
    require(hasattr(module, "get_config"), f"{path}: expected a function get_config(), found none")
    try:
        config = module.get_config(*arguments)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:  # such as an unknown or a missing field
        raise InputError(f"{path}: {_line(path, error)}get_config() failed: {_brief(error)}") from None
    if not isinstance(config, kind):
        raise InputError(f"{path}: get_config() must return a {kind.__name__}, got {type(config).__name__}")
    return config


def _run_module(path: Path) -> ModuleType:
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
        where = f"{error.filename}: line {error.lineno}" if error.filename else str(path)
        raise InputError(f"{where}: {error.msg}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: {_line(path, error)}{_brief(error)}{_advice(error)}") from None
    return module


def _line(path: Path, error: BaseException) -> str:
    """The last line of the file that ran before the error."""
    frames, file = traceback.walk_tb(error.__traceback__), str(path.absolute())
    lines = [line for frame, line in frames if os.path.abspath(frame.f_code.co_filename) == file]
    return f"line {lines[-1]}: " if lines else ""


def _brief(error: BaseException) -> str:
    """Its message, and its name where Python does not say the mistake in words."""
    spoken = isinstance(error, ImportError | TypeError | NameError | AttributeError)
    return str(error) if spoken else f"{type(error).__name__}: {first_line(error)}"


def _advice(error: BaseException) -> str:
    """Advice on a name of the clone's folder configs/ that cannot be imported."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ImportError) or package != "configs":
        return ""
    return f"{OF_THE_CLONE}, or add that to PYTHONPATH"


def _module_name(path: Path) -> str:
    """Name under which Python would import it from the current folder, so that evaluation finds its definitions."""
    path, folder = path.resolve().with_suffix(""), Path.cwd().resolve()
    return ".".join(path.relative_to(folder).parts) if path.is_relative_to(folder) else path.name


def set_fields(config: Any, assignments: list[str]) -> Any:
    """Replaces scalar fields: ``set_fields(config, ["seed=1", "objective.attack.threat.epsilon=0.2"])``.

    Raises:
      InputError: for an unknown name (with the valid ones), a value of the wrong type, or a value that
        the object itself refuses.

    Examples:
      >>> from deq_jax.attacks import PGD, Linf
      >>> from deq_jax.storage import set_fields
      >>> set_fields(PGD(Linf(0.1)), ["threat.epsilon=0.2", "steps=20"]).threat
      Linf(epsilon=0.2)
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
    """Advice where an object was to be set."""
    paths = scalar_paths(current)
    example = f"set one of its fields, such as --set {name}.{paths[0]}=VALUE, or " if paths else ""
    return f"{example}replace it in a config file: replace(config, ...)"


def _parse(text: str, types: tuple[type, ...], current: Any) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # the last two: nested absurdly deep
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
