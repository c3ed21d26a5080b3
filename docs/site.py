"""What `make docs` adds to the pages of docs/: the front page, what stands at the top, and the API reference.

README.md, CONTRIBUTING.md, CHANGELOG.md and data/README.md stay where a reader of the repository expects
them. Here they become pages of the site, with links that lead the same way from docs/. The reference has
a page for each room of the package, made from the modules that are there, so that none is forgotten.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "shipped_data.md",
    "examples/first_run.ipynb": "examples/first_run.ipynb",
}
"""Pages and files outside docs/, and their names on the site."""
PUBLIC = ("config", "losses", "data", "models", "huggingface", "training", "evaluation", "judging", "pages")
"""Rooms in the order of the reference; the others follow."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the pages of the reference in the navigation (called by mkdocs)."""
    assert config.nav is not None
    config.nav.append({"API": [f"reference/{name}" for name in reference_pages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/ (called by mkdocs)."""
    for source, name in MOVED.items():
        if (ROOT / source).is_file():
            text = (ROOT / source).read_text(encoding="utf-8")
            text = turn_links(text) if source.endswith(".md") else text
            files.append(File.generated(config, name, content=text))
    for name, text in reference_pages().items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def turn_links(text: str) -> str:
    """A page of the repository's top as a page of docs/: links to other pages lose their folder."""

    def turn(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if target in MOVED:
            return f"]({MOVED[target]}{anchor})"
        return f"]({target.removeprefix('docs/')}{anchor})"

    return re.sub(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)", turn, text)


def reference_pages() -> dict[str, str]:
    """Name and text of a page for each room of the package, and one for the modules beside them."""
    package = ROOT / "dpo"
    rooms = sorted(path.parent.name for path in package.glob("*/__init__.py"))
    rooms.sort(key=lambda name: PUBLIC.index(name) if name in PUBLIC else len(PUBLIC))
    listed = [f"- [dpo.{room}]({room}.md)" for room in rooms] + ["- [dpo, the modules beside them](top.md)"]
    first = "\n".join(["# API reference", "", "A page for each room of the package.", "", *listed, ""])
    pages = {f"{room}.md": _page(f"dpo.{room}", sorted((package / room).glob("*.py"))) for room in rooms}
    return {"index.md": first} | pages | {"top.md": _page("dpo", sorted(package.glob("*.py")))}


def _page(package: str, modules: list[Path]) -> str:
    names = [f"{package}.{path.stem}" for path in modules if not path.stem.startswith("__")]
    return "\n\n".join([f"# {package}", *(f"::: {name}" for name in names)]) + "\n"
