"""Config objects as JSON data, back again, and the first difference of two."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, TypeAlias

from deq_jax.core.errors import InputError, described, first_line, require
from deq_jax.storage.configs import fields_of, is_scalar
from deq_jax.storage.moves import upgraded

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


def to_tree(node: Any, path: str = "") -> Any:
    """A config object as JSON data: objects as ``{"class": name, field: value}``, functions by name.

    Args:
      node: numbers, strings, None, named functions and frozen dataclasses of these, or tuples of them.
      path: name of the place in the whole config.

    Raises:
      InputError: anything else is in it; names the place.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.storage import to_tree
      >>> to_tree(Linf(0.1))
      {'class': 'deq_jax.attacks.Linf', 'epsilon': 0.1}
    """
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        below = {name: to_tree(value, f"{path}.{name}" if path else name) for name, value in fields_of(node).items()}
        return {"class": public_name(type(node))} | below
    if isinstance(node, FunctionType | type) and "<" not in node.__qualname__:
        return {"name": public_name(node)}
    if isinstance(node, tuple | list):
        return [to_tree(item, f"{path}[{i}]") for i, item in enumerate(node)]
    where = f" in {path}" if path else ""
    expected = "expected numbers, strings, named functions or frozen dataclasses of these"
    require(is_scalar(node), f"a config cannot hold {described(node)}{where}: {expected}")
    return node


def from_tree(tree: Any) -> Any:
    """The object that `to_tree` wrote. Only dataclasses are called; lists become tuples.

    The modules of its names are imported, but none of Python's own.

    Raises:
      InputError: if a name cannot be imported or does not fit.

    Examples:
      >>> from deq_jax.storage import from_tree
      >>> from_tree({"class": "deq_jax.attacks.Linf", "epsilon": 0.1})
      Linf(epsilon=0.1)
    """
    if isinstance(tree, list):
        return tuple(from_tree(item) for item in tree)
    if not isinstance(tree, dict):
        return tree
    tree = upgraded(tree)
    if set(tree) == {"name"}:
        named = _import_name(tree["name"])
        require(isinstance(named, FunctionType | type), f"config: {tree['name']} is not a function or class")
        return named
    kind = _import_name(tree.get("class", ""))
    is_dataclass = inspect.isclass(kind) and dataclasses.is_dataclass(kind)
    require(is_dataclass, f"config: {tree.get('class')} is not a config class; expected a frozen dataclass")
    fields = {name: from_tree(value) for name, value in tree.items() if name != "class"}
    try:
        return kind(**fields)
    except InputError:
        raise
    except Exception as error:  # a class of someone's own, or of Flax, may raise any
        raise InputError(f"config: {tree['class']} of this version takes other fields ({first_line(error)})") from None


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Dotted name and values of the first field in which two config trees differ, or None.

    Args:
      old: a config tree, also of an older version.
      new: a config tree of this version, see `to_tree`.
      path: name of the place in the whole config.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.storage import first_difference, to_tree
      >>> first_difference(to_tree(Linf(0.1)), to_tree(Linf(0.2)))
      'epsilon was 0.1, now 0.2'
    """
    old = upgraded(old) if isinstance(old, dict) else old
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


def _brief(tree: Any) -> str:
    if isinstance(tree, list):
        return f"a list of {len(tree)}"
    return str(tree.get("class", tree.get("name", "an object"))) if isinstance(tree, dict) else repr(tree)


def public_name(thing: Any) -> str:
    """The name under which a class or function is imported: from the room that shows it, else from its module.

    Examples:
      >>> from deq_jax.attacks import Linf
      >>> from deq_jax.storage import public_name
      >>> public_name(Linf)
      'deq_jax.attacks.Linf'
    """
    room = ".".join(thing.__module__.split(".")[:2])
    is_public = room.startswith("deq_jax.") and getattr(sys.modules.get(room), thing.__qualname__, None) is thing
    return f"{room if is_public else thing.__module__}.{thing.__qualname__}"


def _import_name(name: str) -> Any:
    module, _, attribute = str(name).rpartition(".")
    standard = module.partition(".")[0] in sys.stdlib_module_names  # some of these act when they are imported
    require(not standard, f"config: {name} is not a config class or function: Python's own modules have none")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        message = f"config: cannot import {name!r}; run from the folder in which training was started"
        raise InputError(message) from None
    except (Exception, SystemExit) as error:
        message = f"config: cannot import {name!r}: its module fails ({type(error).__name__}: {first_line(error)})"
        raise InputError(message) from None
