"""The house: which room may import which, what its face shows, and what has one place."""

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deq_jax

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deq_jax"
MAY_IMPORT = {
    "core": set(),
    "attacks": {"core"},
    "models": {"core"},
    "parallel": {"core"},
    "storage": {"core"},
    "data": {"core", "storage"},
    "defences": {"core", "models"},
    "surrogates": {"core", "attacks", "models", "defences"},
    "evaluation": {"core", "attacks", "models", "defences", "surrogates", "data", "parallel", "storage"},
    "training": {"core", "attacks", "models", "defences", "surrogates", "data", "parallel", "storage", "evaluation"},
    "reporting": {"core", "storage", "surrogates", "evaluation"},
    "interop": {"core", "models", "storage", "training"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
SLOW = {"orbax", "tensorflow_datasets", "tensorboardX", "matplotlib", "jinja2"}
OUTSIDE = [*ROOT.glob("configs/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("notebooks/*.ipynb")]
MADE_OF_PARTS = {"benchmarks/kernels.py", "benchmarks/auto_attack.py"}  # they time what is inside


def imports(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def module_name(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def inside(path):
    """Modules of the package that a file imports, without the package's name."""
    return {name.removeprefix("deq_jax.") for name in imports(path.read_text()) if name.startswith("deq_jax.")}


GRAPH = {module_name(path): inside(path) for path in FILES}


def test_there_are_no_other_rooms():
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE], ids=module_name)
def test_a_room_imports_only_the_files_of_rooms_that_it_may(path):
    for other in inside(path):
        assert other in GRAPH, f"{other} is no file"
        assert other.split(".")[0] in {path.parent.name, *MAY_IMPORT[path.parent.name]}, f"imports {other}"


def test_files_form_no_circle():
    done = set()

    def visit(name, above):
        assert name not in above, f"circle: {' -> '.join([*above, name])}"
        if name not in done:
            for other in sorted(GRAPH.get(name, ())):
                visit(other, [*above, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_face_shows_what_it_says(room):
    face = getattr(deq_jax, room)
    assert len(face.__all__) == len({*face.__all__})
    for name in face.__all__:
        thing = getattr(face, name)
        described = getattr(thing, "__module__", "").startswith("deq_jax.") and isinstance(thing, type | type(visit))
        assert not described or thing.__doc__, f"{name} has no docstring"


def visit():
    """A function, to know others by."""


def test_the_package_shows_what_it_says():
    assert {*MAY_IMPORT} <= {*deq_jax.__all__} <= {*dir(deq_jax)}
    for name in deq_jax.__all__:
        assert getattr(deq_jax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = deq_jax.nothing


def test_importing_the_package_loads_nothing_slow():
    code = f"import sys, deq_jax; deq_jax.attacks, deq_jax.models; print(sorted({SLOW} & {{*sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "[]\n", found.stdout + found.stderr


@pytest.mark.slow
def test_importing_a_room_leaves_the_backend_of_figures_alone():
    code = "import matplotlib as m; m.use('svg'); import deq_jax.evaluation, deq_jax.reporting; print(m.get_backend())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "svg\n", found.stdout + found.stderr


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.name)
def test_outside_only_faces_are_imported(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    if str(path.relative_to(ROOT)) in MADE_OF_PARTS:
        return
    for name in imports(text):
        assert not name.startswith("deq_jax.") or name.count(".") == 1, f"imports {name}"


DISTRIBUTIONS = {"PIL": "pillow", "orbax": "orbax-checkpoint", "tensorflow_datasets": "tensorflow-datasets"}


def test_what_is_imported_is_declared():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    declared = {re.split(r"[<>=\[;]", line)[0].strip() for text in lists for line in text.splitlines()}
    packages = {name.split(".")[0] for path in FILES for name in imports(path.read_text())}
    others = packages - {"deq_jax"} - sys.stdlib_module_names
    assert {DISTRIBUTIONS.get(name, name) for name in others} - declared == set()


def test_jaxopt_is_imported_in_one_file():
    assert [module_name(path) for path in FILES if "jaxopt" in imports(path.read_text())] == ["core.solvers"]


def test_pmap_is_called_in_one_file():
    assert [module_name(path) for path in FILES if "jax.pmap(" in path.read_text()] == ["parallel.devices"]


PLACES = {
    "training.workdir": {
        "config.json",
        "environment.json",
        "origin.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    },
    "storage.locks": {"lock.json"},
    "evaluation.folder": {"manifest.json", "evaluation.json", "evaluation.npz", "batch-*.npz"},
}


def test_names_of_files_have_one_place():
    """Messages, which name them among other words, are none."""
    found = {}
    for path in [*FILES, *ROOT.glob("benchmarks/*.py")]:
        texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        known = texts & set().union(*PLACES.values())
        if known:
            found[module_name(path) if path.is_relative_to(PACKAGE) else path.name] = known
    assert found == PLACES


def test_every_file_says_what_it_is_for():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_every_public_function_has_a_docstring():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                exempt = isinstance(node, ast.ClassDef) and node.name.endswith("Memory")
                assert exempt or ast.get_docstring(node), f"{path.name}: {node.name}"


def test_tests_mirror_the_rooms_and_import_no_other_test():
    folders = {path.parent.name for path in ROOT.glob("tests/*/test_*.py")}
    assert folders == MAY_IMPORT.keys() - {"parallel"} | {"commands", "project"}
    for path in ROOT.glob("tests/*/test_*.py"):
        others = {name for name in imports(path.read_text()) if name.startswith("tests.")}
        assert all(name.startswith(("tests.helpers", "tests.golden")) for name in others), path
