"""What the README (but for sizes) and the pages of docs/ show runs as written, and whatever they point at is there."""

import ast
import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import deq_jax
from configs import digits_pgd_at
from deq_jax import TrainConfig, train
from deq_jax.evaluation import EvalConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"\b(?:configs|benchmarks|deq_jax|docs|notebooks|scripts|tests)/[\w/.-]*\w\.(?:py|ipynb|md|sh|svg)")
OF_A_READER = {"configs/mine.py"}
SMALLER = {"channels=12": "channels=4", "Broyden(8)": "Broyden(4)", "epochs=6": "epochs=1", "[:120]": "[:12]"}


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return [code for _, kind, code in BLOCK.findall(page.read_text()) if kind == language]


def prose(page):
    """A page without its blocks of code."""
    return BLOCK.sub("", page.read_text())


TRAINS = pytest.param(README, marks=pytest.mark.slow)


@pytest.mark.parametrize("page", [TRAINS, *(page for page in PAGES[1:] if blocks(page, "python"))], ids=name)
def test_python_blocks_run_in_their_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        for whole, small in SMALLER.items() if page == README else ():
            assert whole in block
            block = block.replace(whole, small)
        exec(block, names)
        if "get_config" in names:
            get_config = names.pop("get_config")
            of_a_run = bool(inspect.signature(get_config).parameters)
            config = get_config(digits_pgd_at.get_config()) if of_a_run else get_config()
            assert isinstance(config, EvalConfig if of_a_run else TrainConfig)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_that_is_not_run_says_why(page):
    found = BLOCK.findall(page.read_text())
    assert len(found) == page.read_text().count("\n```") / 2
    for reason, kind, code in found:
        assert kind in {"bash", "bibtex", "py", "python", "text"}, code
        assert bool(reason) == (kind == "py"), code


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        inside = page.is_relative_to(ROOT / "docs")
        assert not inside or other.is_relative_to(ROOT / "docs"), f"{target} is outside of the site"
        assert not anchor or anchor in map(slug, re.findall(r"^#+ (.+)$", prose(other), re.MULTILINE)), target


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_named_files_tests_and_make_targets_exist(page):
    text = page.read_text()
    for path in FILE.findall(text):
        assert path in OF_A_READER or (ROOT / path).exists(), path
    for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / path).read_text(), test
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


def test_every_page_is_linked_from_another():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in TEXTS
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
    }
    assert {page for page in PAGES if page != README} <= linked


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_the_site_has_every_page_and_every_room():
    shown = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page != README}
    rooms = {f"api/{face.parent.name}.md" for face in ROOT.glob("deq_jax/**/__init__.py")}
    notebooks = {f"notebooks/{path.stem}.md" for path in ROOT.glob("notebooks/*.ipynb")}
    assert shown == written | rooms | notebooks | {"index.md", "contributing.md", "changelog.md"}


ROOMS = sorted(face.parent.name for face in ROOT.glob("deq_jax/*/__init__.py"))
ALIASES = {"Cell", "Loss", "Measured", "Start", "Variables"}  # types without a docstring that Python keeps
CONSTANTS = {"AXIS", "BUDGETS", "__version__"}


def docstring(thing):
    """Its own one; that of a base class or of the class of an object does not count."""
    return (vars(thing) if isinstance(thing, type) else {"__doc__": thing.__doc__}).get("__doc__") or ""


def explains_itself(face, name):
    """Rooms hold what has examples; a protocol is shown by whatever fulfils it."""
    thing = getattr(face, name)
    is_protocol = getattr(thing, "_is_protocol", False)
    return name in ALIASES | CONSTANTS or inspect.ismodule(thing) or is_protocol or ">>> " in docstring(thing)


@pytest.mark.parametrize("room", ROOMS)
def test_examples_in_docstrings_print_what_they_say(room):
    face = getattr(deq_jax, room)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    things = [getattr(face, name) for name in face.__all__ if name not in ALIASES | CONSTANTS]
    for thing in things:
        for example in finder.find(thing, globs={}):
            runner.run(example)
    assert runner.tries > 0 and runner.failures == 0


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_public_name_has_an_example(room):
    face = getattr(deq_jax, room) if room else deq_jax
    assert [name for name in face.__all__ if not explains_itself(face, name)] == []


def test_examples_in_docstrings_have_their_section():
    for path in ROOT.glob("deq_jax/**/*.py"):
        for text in re.findall(r'"""(.*?)"""', path.read_text(), re.DOTALL):
            assert ">>> " not in text or re.search(r"^ +Examples:\n +>>> ", text, re.MULTILINE), f"{path}: {text}"


def differences():
    """Names of classes and functions, and in which way each differs from the reference, as their docstrings say."""
    for path in ROOT.glob("deq_jax/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            text = (ast.get_docstring(node) or "") + "\n"
            for sentence in re.findall(r"Differs from the reference: (.*?)\.\n(?:\n|\Z)", text, re.DOTALL):
                yield node.name, " ".join(sentence.split())


def test_the_page_on_the_reference_has_every_difference_that_a_docstring_names():
    page = (ROOT / "docs/concepts/reference.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", page.partition("## Why")[0], re.MULTILINE)
    assert sorted(listed) == sorted(differences())
    sources = [path.read_text() for path in ROOT.glob("deq_jax/**/*.py")]
    assert len(listed) == sum(text.count("Differs from") for text in sources)  # none is in another form


def test_the_page_on_errors_has_every_public_error_and_quotes_lines_that_exist():
    page = (ROOT / "docs/errors.md").read_text()
    faces = [deq_jax, *(getattr(deq_jax, room) for room in ROOMS)]
    things = {getattr(face, name) for face in faces for name in face.__all__}
    errors = {thing.__name__ for thing in things if isinstance(thing, type) and issubclass(thing, Exception)}
    assert errors == set(re.findall(r"^\| `deq_jax\.(?:\w+\.)?(\w+)`", page, re.MULTILINE))
    sources = "".join(path.read_text() for path in ROOT.glob("deq_jax/**/*.py"))
    quoted = re.findall(r"^\| `([^`]+)` \|", page.partition("## Frequent lines")[2], re.MULTILINE)
    assert quoted and [line for line in quoted if line not in sources] == []


def test_the_page_on_errors_has_every_exit_code_that_the_help_of_train_names():
    page = (ROOT / "docs/errors.md").read_text()
    listed = {code for codes in re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE) for code in codes.split(", ")}
    named = train.EPILOG.partition("Exit codes: ")[2].partition(".\n")[0]
    assert {"0", "75"} <= set(re.findall(r"\b\d+\b", named)) <= listed


def test_every_decision_has_its_reason_and_the_test_that_guards_it():
    decisions = re.split(r"^## (.+)$", (ROOT / "docs/design.md").read_text(), flags=re.MULTILINE)[1:]
    for heading, text in zip(decisions[::2], decisions[1::2], strict=True):
        assert "\n*Reason.* " in text and re.search(r"^\*Guard.\*\s`tests/", text, re.MULTILINE), heading
