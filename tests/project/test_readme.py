"""What the README shows runs as written."""

import re
from pathlib import Path

import pytest

from deq_jax import TrainConfig

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_python_blocks_run(block):
    names: dict = {}
    exec(block, names)
    if "get_config" in names:
        assert isinstance(names["get_config"](), TrainConfig)


def test_named_files_exist():
    root = Path(__file__).parents[2]
    for name in re.findall(r"(?:configs|benchmarks)/[a-z_]+\.py", README):
        assert name == "configs/mine.py" or (root / name).exists(), name


def test_make_targets_exist():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile, target
