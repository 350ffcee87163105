"""A hook of mkdocs: the pages of the site that are not files of docs/.

The README, CONTRIBUTING and CHANGELOG become pages, each notebook gets one with its outputs, and each room of the
package gets one, made from its face.
"""

import importlib
import json
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.hooks.site_pages")
ROOT = Path(__file__).parents[1]
FACES = ["deq_jax", *(f"deq_jax.{face.parent.name}" for face in sorted(ROOT.glob("deq_jax/*/__init__.py")))]
TEXTS = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds these pages."""
    for name, page in TEXTS.items():
        files.append(File.generated(config, page, content=LINK.sub(moved, (ROOT / name).read_text())))
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook(path)))
    for name in FACES:
        files.append(File.generated(config, f"api/{name.split('.')[-1]}.md", content=reference(name)))
    return files


def notebook(path: Path) -> str:
    """A notebook with its outputs."""
    parts = [f"*From `notebooks/{path.name}`, as it was run.*"]
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown for output in cell.get("outputs", []) if (shown := output_of(output))]
    parts[:2] = reversed(parts[:2])  # the title is first
    return "\n\n".join(parts) + "\n"


def output_of(output: dict[str, Any]) -> str:
    """A picture or a text that a cell has put out; nothing of what it wrote to stderr."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Output of the cell](data:image/png;base64,{''.join(data['image/png'].split())})"
    text = "".join(data.get("text/plain", output.get("text", []))).rstrip()
    return f"```text\n{text}\n```" if text and output.get("name") != "stderr" else ""


def reference(name: str) -> str:
    """The page of a face: what mkdocstrings finds through it, and what it does not."""
    sections = [
        f"::: {path}\n    options: {{show_root_heading: true}}\n" for path in hidden(importlib.import_module(name))
    ]
    return "\n".join([f"# {name.split('.')[-1]}\n", f"::: {name}\n", *sections])


def public(face: ModuleType) -> dict[str, Any]:
    """The public classes and functions of a face."""
    things = {name: getattr(face, name) for name in face.__all__}
    return {name: thing for name, thing in things.items() if callable(thing) and get_origin(thing) is None}


def hidden(face: ModuleType) -> list[str]:
    """The paths of public names that load at first use, or that the file which defines them has for a name, too."""
    return [
        f"{thing.__module__}.{name}"
        for name, thing in public(face).items()
        if name not in vars(face) or thing.__module__.endswith(f".{name}")
    ]


def on_post_build(config: MkDocsConfig) -> None:
    """Warns, which `--strict` makes an error, of a public class or function that the site does not show."""
    for face in FACES:
        shown = (Path(config.site_dir) / "api" / face.split(".")[-1] / "index.html").read_text()
        for name in public(importlib.import_module(face)):
            if not re.search(rf'<h2 id="deq_jax[\w.]*\.{name}"', shown):
                LOG.warning("%s.%s has no section on its page", face, name)


def moved(link: re.Match[str]) -> str:
    """A link of a file in the root as a link of the site; only its text where the site has no such page."""
    text, target = link.groups()
    if target.startswith(("http", "#")):
        return link.group(0)
    if target.startswith("notebooks/"):
        return f"[{text}]({target.removesuffix('.ipynb')}.md)"
    has_page = target in TEXTS or target.startswith("docs/")
    return f"[{text}]({TEXTS.get(target, target.removeprefix('docs/'))})" if has_page else text
