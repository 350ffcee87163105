"""What the README (but for sizes) and the pages of docs/ show runs as written, and whatever they point at is there."""

import ast
import doctest
import inspect
import os
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import deq_jax
from configs import digits_pgd_at
from deq_jax import TrainConfig, train
from deq_jax.evaluation import EvalConfig
from deq_jax.storage import load_config, set_fields

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^ *(<!-- not run: [^\n]+ -->\n *)?```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
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


@pytest.mark.slow
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


SHELL = {"for", "do", "done", "wait", "export", "[", "sbatch"}  # words of a shell and of a cluster


class Parsed(Exception):
    """A command line was parsed; it holds the options."""


def commands(code):
    """The commands of a shell block, each a list of words; variables are 0."""
    for line in re.sub(r"\$\w+", "0", code.replace("\\\n", " ")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words = list(lexer)
        ends = [i for i, word in enumerate(words) if set(word) <= set("&|;")]
        parts = (words[start:end] for start, end in zip([0, *(i + 1 for i in ends)], [*ends, None], strict=True))
        yield from filter(None, parts)


def parsed(module, arguments, monkeypatch):
    """What the parser of a command makes of these arguments."""

    def parse(parser, argv=None):
        raise Parsed(original(parser, argv))

    original = ArgumentParser.parse_args
    with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [module, *arguments])
        runpy.run_path((find_spec(module).origin or find_spec(f"{module}.__main__").origin), run_name="__main__")
    return caught.value.args[0]


def check_command(words, monkeypatch):
    """Commands of this project take these arguments; others are known."""
    start = words.index("python") if "python" in words else 0
    match words[start:]:
        case ["python", "-m", module, *arguments]:
            options = parsed(module, arguments, monkeypatch)
            if module == "deq_jax.train" and (ROOT / options.config).exists():
                set_fields(load_config(ROOT / options.config, TrainConfig), options.assignments)
        case ["make", *targets]:
            names = [target for target in targets if "=" not in target]  # others set variables
            assert all(f"\n{name}:" in (ROOT / "Makefile").read_text() for name in names)
        case [script, action, *_] if script.startswith("scripts/"):
            assert os.access(ROOT / script, os.X_OK) and re.search(rf"\b{action}\b", (ROOT / script).read_text())
        case _:
            assert words[0] in SHELL or words == ["pip", "install", "-e", "."], words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_is_run_or_its_commands_are_parsed_or_it_says_why_not(page, monkeypatch):
    text = page.read_text()
    assert len(BLOCK.findall(text)) == len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) / 2
    for reason, kind, code in BLOCK.findall(text):
        assert kind in {"bash", "bibtex", "py", "python", "text"}, code
        assert bool(reason) == (kind == "py") or kind == "bash", code
        for words in commands(code) if kind == "bash" and not reason else ():
            check_command(words, monkeypatch)


@pytest.mark.parametrize(
    "command", ["python -m deq_jax.train --confg a.py", "make coffee", "scripts/none.sh run", "conda install deq_jax"]
)
def test_a_command_that_does_not_exist_is_found(command, monkeypatch):
    with pytest.raises((SystemExit, AssertionError)):
        for words in commands(command):
            check_command(words, monkeypatch)


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
WITHOUT_EXAMPLE = {  # public names whose docstring has no example, with the reason
    "a type whose docstring is Python's": {"Cell", "Loss", "Measured", "Start", "Variables"},
    "a constant": {"AXIS", "BUDGETS", "__version__"},
    "a room, which holds what has examples": set(ROOMS),
    "a protocol, shown by what fulfils it": {
        "Attack",
        "Carry",
        "Classifier",
        "InParts",
        "Memory",
        "Objective",
        "Surrogate",
        "Threat",
    },
    "a protocol, whose example tests/core/test_solver_contract.py runs": {"Solver"},
}


def docstring(thing):
    """Its own one; that of a base class or of the class of an object does not count."""
    return (vars(thing) if isinstance(thing, type) else {"__doc__": thing.__doc__}).get("__doc__") or ""


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_examples_in_docstrings_print_what_they_say(room):
    face = getattr(deq_jax, room)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in face.__all__:
        for example in finder.find(getattr(face, name), name, globs={}):
            runner.run(example)
    assert runner.tries > 0 and runner.failures == 0


def test_every_public_name_has_an_example_or_a_reason():
    faces = [deq_jax, *(getattr(deq_jax, room) for room in ROOMS)]
    things = {name: getattr(face, name) for face in faces for name in face.__all__}
    assert {name for name in things if ">>> " not in docstring(things[name])} == set().union(*WITHOUT_EXAMPLE.values())


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
