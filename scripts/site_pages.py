"""A hook of mkdocs: the pages of the site that are not files of docs/.

The README, CONTRIBUTING and CHANGELOG become pages, and each room of the package gets one, made from its face.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TEXTS = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds these pages."""
    for name, page in TEXTS.items():
        files.append(File.generated(config, page, content=LINK.sub(moved, (ROOT / name).read_text())))
    for face in sorted(ROOT.glob("deq_jax/*/__init__.py")):
        room = face.parent.name
        files.append(File.generated(config, f"api/{room}.md", content=f"# {room}\n\n::: deq_jax.{room}\n"))
    files.append(File.generated(config, "api/deq_jax.md", content="# deq_jax\n\n::: deq_jax\n"))
    return files


def moved(link: re.Match[str]) -> str:
    """A link of a file in the root as a link of the site; only its text where the site has no such page."""
    text, target = link.groups()
    if target.startswith(("http", "#")):
        return link.group(0)
    has_page = target in TEXTS or target.startswith("docs/")
    return f"[{text}]({TEXTS.get(target, target.removeprefix('docs/'))})" if has_page else text
