"""Prints the oldest versions that setup.cfg allows of the package's and its tests' dependencies, as constraints of pip.

python3 scripts/oldest.py > oldest.txt && pip install -e '.[test]' -c oldest.txt
"""

import configparser
import re
from pathlib import Path

BOUND = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)")


def oldest(path: Path) -> dict[str, str]:
    """Name -> lower bound, of the dependencies that have one."""
    config = configparser.ConfigParser()
    config.read(path)
    lines = config["options"]["install_requires"] + config["options.extras_require"]["test"]
    return {found[1]: found[2] for line in lines.split("\n") if (found := BOUND.match(line))}


if __name__ == "__main__":
    for name, version in oldest(Path(__file__).parents[1] / "setup.cfg").items():
        print(f"{name}=={version}")
