"""Each file imports only from lower layers; jaxopt and pmap have one place each."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deq_jax"
LAYERS = [
    ["types", "compilation"],
    ["cells"],
    ["losses", "solvers", "sanity", "environment", "box"],
    ["carries", "readouts", "regularizers", "models.layers"],
    ["gradients", "models.mdeq", "models.resnet", "models.small", "models.wide_resnet"],
    ["classifiers"],
    ["entropy", "normalized"],
    ["attacks", "data", "processes", "records", "torch_names"],
    ["objectives", "parallel", "state_dicts", "surrogates", "adaptive", "transfers"],
    ["config", "checkpoints"],
    ["evaluation", "trials", "meters", "runs", "steps"],
    ["training", "plots", "cli", "results", "comparisons", "briefs"],
    ["red_flags", "tables", "progress", "probes", "verdicts"],
    ["reports", "finished", "moments"],
    ["studies", "worst_case"],
    ["wording"],
    ["summaries"],
    ["pages"],
    ["train", "evaluate", "convert", "report"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def layer_of(module):
    """The layer of a dotted module name without the package; the attacks are one layer, ordered inside."""
    return LAYER[module if module in LAYER else module.split(".")[0]]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path):
    own = module_name(path)
    for name in imports(path):
        if name.startswith("deq_jax."):
            other = name.removeprefix("deq_jax.")
            same_package = own.startswith("attacks.") and other.startswith("attacks.")
            assert same_package or layer_of(other) < layer_of(own), f"{own} imports {other}"


DISTRIBUTIONS = {"orbax": "orbax-checkpoint", "tensorflow_datasets": "tensorflow-datasets"}


def test_what_is_imported_is_declared():
    config = configparser.ConfigParser(interpolation=None)
    config.read(PACKAGE.parent / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    declared = {re.split(r"[<>=\[;]", line)[0].strip() for text in lists for line in text.splitlines()}
    packages = {name.split(".")[0] for path in FILES for name in imports(path)}
    others = packages - {"deq_jax"} - sys.stdlib_module_names
    assert {DISTRIBUTIONS.get(name, name) for name in others} - declared == set()


def test_jaxopt_is_imported_in_one_file():
    assert [module_name(path) for path in FILES if "jaxopt" in imports(path)] == ["solvers"]


def test_pmap_is_called_in_one_file():
    assert [module_name(path) for path in FILES if "jax.pmap(" in path.read_text()] == ["parallel"]


def test_every_public_function_has_a_docstring():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                exempt = isinstance(node, ast.ClassDef) and node.name.endswith("Memory")
                assert exempt or ast.get_docstring(node), f"{path.name}: {node.name}"
