"""A release: one version everywhere, a wheel with all of its files, and CI that does the same everywhere."""

import configparser
import re
import runpy
import shutil
import subprocess
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import deq_jax

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PARTS = {"Added", "Changed", "Deprecated", "Fixed", "Removed", "Security"}


@pytest.fixture(scope="module")
def config():
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


@pytest.fixture(scope="module")
def version(config):
    return config["metadata"]["version"]


class TestVersion:
    def test_the_package_and_the_citations_have_that_of_setup_cfg(self, version):
        assert deq_jax.__version__ == metadata.version("deq_jax") == version
        assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
        assert re.findall(r"version = \{(.+?)\}", (ROOT / "README.md").read_text()) == [version]

    def test_it_is_the_newest_of_the_changelog(self, version):
        assert re.search(r"^## (\S+) \((?:unreleased|\d{4}-\d\d-\d\d)\)$", CHANGELOG, re.MULTILINE)[1] == version

    def test_a_tag_of_this_commit_is_it_and_has_a_date(self, version):
        if not (shutil.which("git") and (ROOT / ".git").exists()):
            pytest.skip("no checkout")
        said = subprocess.check_output(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, text=True)
        tags = [tag for tag in said.split() if re.match(r"v\d", tag)]
        assert set(tags) <= {f"v{version}"}
        assert not tags or f"## {version} (unreleased)" not in CHANGELOG


def test_the_changelog_has_each_part_once_for_each_version():
    for section in re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]:
        parts = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert len(parts) == len({*parts}) > 0 and {*parts} <= PARTS


def test_every_file_of_the_package_is_in_the_wheel(config):
    """By the patterns of setup.cfg; `make wheel-test` uses them as installed."""
    patterns = config["options.package_data"]
    for path in ROOT.glob("deq_jax/**/*"):
        if path.is_dir() or path.suffix == ".py" or "__pycache__" in path.parts:
            continue
        package = next(above for above in path.parents if (above / "__init__.py").exists())
        known = patterns[".".join(package.relative_to(ROOT).parts)].split()
        assert any(fnmatch(str(path.relative_to(package)), pattern) for pattern in known), path


def test_oldest_versions_are_the_lower_bounds(tmp_path):
    oldest = runpy.run_path(str(ROOT / "scripts/oldest.py"))["oldest"]
    path = tmp_path / "setup.cfg"
    path.write_text(
        "[options]\ninstall_requires =\n    jax[cpu]>=0.10\n    array_record>=0.8.1; platform_system == 'Linux'\n"
        "[options.extras_require]\nmore = safetensors>=0.8\ntest =\n    %(more)s\n    pytest>=8,<10\n    scikit-learn\n"
    )
    assert oldest(path) == {"jax": "0.10", "array_record": "0.8.1", "safetensors": "0.8", "pytest": "8"}


def test_every_dependency_of_the_package_has_a_lower_bound(config):
    oldest = runpy.run_path(str(ROOT / "scripts/oldest.py"))["oldest"](ROOT / "setup.cfg")
    required = config["options"]["install_requires"].split("\n")[1:]
    assert [line for line in required if re.match(r"[\w.-]+", line)[0] not in oldest] == []


def test_the_public_ci_does_what_each_submission_does():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    matrix = {(one["target"], one["python"]) for one in jobs["make"]["strategy"]["matrix"]["include"]}
    submission = (ROOT / ".ci/run").read_text()
    everywhere = set(re.findall(r"^ *make ([\w-]+)", submission, re.MULTILINE))
    assert {target for target, _ in matrix} == everywhere | {"docs", "test-oldest", "wheel-test"}
    tested = set(re.search(r"for version in (.+);", submission)[1].split())
    assert tested == {python for target, python in matrix if target == "test"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target, _ in matrix)
