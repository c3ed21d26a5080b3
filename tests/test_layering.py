"""Imports point downwards only, and never in a circle. Read from the source, so that lazy imports count."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dpo").rglob("*.py"))
}
ANYWHERE = {"distribution", "hidden", "terminal"}
"""They import nothing else of the package: the files that come with it, and what a terminal is shown."""
# What each layer may import besides itself.
BELOW = {
    "": {"python", "losses", "config"},
    "outcomes": set(),
    "hub_names": set(),
    "hidden": set(),
    "proxies": {"outcomes"},
    "terminal": set(),
    "limited": set(),
    "intervals": {"outcomes"},
    "text_encoding": {"outcomes"},
    "typed_json": {"outcomes", "regular_files", "text_encoding"},
    "regular_files": {"outcomes"},
    "files": {"outcomes", "regular_files"},
    "overwriting": {"outcomes", "files"},
    "distribution": {"outcomes"},
    "config": {"outcomes", "files"},
    "help": set(),
    "command_line": {"outcomes", "config", "regular_files", "help", "text_encoding"},
    "runs": {"outcomes", "config", "typed_json", "overwriting", "hub_names", "files"},
    "own_code": {"outcomes"},
    "losses": {"outcomes", "own_code"},
    "diffusion": {"outcomes", "losses"},
    "parallel": {"outcomes"},
    "data": {
        "outcomes",
        "parallel",
        "losses",
        "intervals",
        "files",
        "regular_files",
        "limited",
        "proxies",
        "hub_names",
        "text_encoding",
    },
    "models": {"outcomes", "parallel"},
    "huggingface": {
        "outcomes",
        "models",
        "parallel",
        "files",
        "regular_files",
        "limited",
        "proxies",
        "hub_names",
        "text_encoding",
    },
    "training": {
        "proxies",
        "outcomes",
        "overwriting",
        "huggingface",
        "models",
        "parallel",
        "data",
        "losses",
        "runs",
        "config",
        "files",
        "typed_json",
    },
    "evaluation": {
        "outcomes",
        "training",
        "parallel",
        "data",
        "losses",
        "runs",
        "config",
        "files",
        "intervals",
    },
    "planning": {
        "outcomes",
        "training",
        "huggingface",
        "models",
        "parallel",
        "data",
        "losses",
        "runs",
        "config",
    },
    "judging": {
        "proxies",
        "outcomes",
        "own_code",
        "evaluation",
        "training",
        "huggingface",
        "models",
        "parallel",
        "data",
        "runs",
        "config",
        "files",
        "regular_files",
        "intervals",
        "typed_json",
    },
    "pages": {
        "outcomes",
        "judging",
        "evaluation",
        "training",
        "huggingface",
        "models",
        "data",
        "losses",
        "runs",
        "config",
        "files",
        "intervals",
        "typed_json",
    },
    "experiments": {
        "data",
        "outcomes",
        "overwriting",
        "own_code",
        "pages",
        "judging",
        "evaluation",
        "training",
        "huggingface",
        "models",
        "parallel",
        "diffusion",
        "losses",
        "runs",
        "config",
        "files",
    },
    "commands": {
        "outcomes",
        "own_code",
        "experiments",
        "pages",
        "judging",
        "planning",
        "evaluation",
        "training",
        "huggingface",
        "models",
        "parallel",
        "data",
        "losses",
        "command_line",
        "runs",
        "config",
        "files",
        "regular_files",
        "hub_names",
    },
    "python": {
        "outcomes",
        "commands",
        "evaluation",
        "training",
        "huggingface",
        "models",
        "parallel",
        "data",
        "runs",
        "config",
        "hub_names",
    },
    "cli": {"outcomes", "commands", "data", "command_line", "config", "hub_names"},
    "__main__": {"outcomes", "cli", "training"},
}


def layer(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_modules(module: str) -> set[str]:
    """Modules of this package that `module` names in an import, anywhere in its source."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                base = f"{above}.{base}".rstrip(".")
            # `from package import name` takes the submodule where there is one, the package itself otherwise
            found.update(
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names
            )
    return {name for name in found if name in MODULES} - {module}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_layer_and_those_below(module: str) -> None:
    allowed = BELOW[layer(module)] | {layer(module)} | ANYWHERE
    upwards = {name for name in imported_modules(module) if layer(name) not in allowed}
    assert not upwards, f"{module} is in layer {layer(module)!r}, which may import {sorted(allowed)}"


def test_no_import_goes_in_a_circle() -> None:
    graph = {module: imported_modules(module) for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def test_settings_are_known_to_the_rim_only() -> None:
    """data, models, losses and parallel take plain arguments, so that they can be used without a run."""
    knowing = {layer(module) for module in MODULES if "dpo.config" in imported_modules(module)}
    assert knowing <= {
        "",
        "python",
        "cli",
        "commands",
        "experiments",
        "pages",
        "judging",
        "planning",
        "evaluation",
        "training",
        "command_line",
        "runs",
    }


@pytest.mark.parametrize("module", [name for name in MODULES if name != "dpo.data.template_worker"])
def test_an_error_that_is_meant_says_whose_it_is(module: str) -> None:
    """`UserError` for what a user gave (exit code 2); a plain `ValueError` is a bug and keeps its traceback.

    The template worker runs without the rest of the package.
    """
    raised = [
        node.lineno
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if isinstance(node.exc.func, ast.Name) and node.exc.func.id in ("ValueError", "OSError")
    ]
    assert not raised, f"{module}, lines {raised}: raise dpo.outcomes.UserError, or EnvironmentFailure"


def test_the_floors_in_the_design_are_these() -> None:
    """docs/design.md draws them from the top: a line imports from lines below it only."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    drawn = design.split("## Layers")[1].split("```")[1].strip().splitlines()
    floors = [re.split(r" {2,}", line)[0].split(", ") for line in drawn]
    assert sorted(name for floor in floors for name in floor) == sorted(set(BELOW) - {""})
    for place, names in enumerate(floors):
        below = {name for floor in floors[place + 1 :] for name in floor}
        for name in names:
            assert BELOW[name] <= below, f"{name} imports from {sorted(BELOW[name] - below)}"
