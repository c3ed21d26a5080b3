"""README is a short front door, and what it and docs/using.md show works."""

from __future__ import annotations

import math
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from numpy.testing import assert_allclose

from dpo.cli import COMMANDS
from dpo.command_line import load_config
from dpo.config import Config
from dpo.distribution import settings_names
from dpo.losses import OBJECTIVES, Scores, make_objective

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USING = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1000


def test_commands_in_the_examples_exist() -> None:
    named = set(re.findall(r"^(?:\$ )?dpo (\w+)", USING, re.MULTILINE))
    assert named == set(COMMANDS), "every command has an example in docs/using.md"
    assert set(re.findall(r"^(?:\$ )?dpo (\w+)", README, re.MULTILINE)) <= named


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", README))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_shipped_settings_are_named() -> None:
    section = USING.split("## Settings")[1].split("## ")[0]
    assert set(settings_names()) <= set(re.findall(r"`(\w+)`", section))


def test_make_targets_in_the_examples_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?make ([a-z-]+)", README))
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_settings_named_in_the_documents_exist() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    sections = {field.name for field in fields(Config) if is_dataclass(getattr(Config(), field.name))}
    named = {
        name
        for text in texts
        for name in re.findall(rf"(?<![\w/.-])((?:{'|'.join(sections)})\.[a-z]\w*)(?![\w/])", text)
    }
    settings = {f"{name}.{field.name}" for name in sections for field in fields(getattr(Config(), name))}
    modules = {f"{path.parent.name}.{path.stem}" for path in (ROOT / "dpo").glob("*/*.py")}
    files = {name for name in named if name.endswith((".py", ".md", ".json"))}
    assert named - settings - modules - files == {"training.stepz", "model.layers"}  # a misspelling; HF's


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    text = README.split("```yaml")[1].split("```")[0]
    path = tmp_path / "example.yaml"
    path.write_text(text)
    config = load_config(path)
    assert config.optimizer.learning_rate == 5e-6
    assert set(yaml.safe_load(text)) < {
        "run_dir",
        "model",
        "data",
        "objective",
        "optimizer",
        "training",
        "mesh",
    }


def test_the_example_objective_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A DPO whose margin is shifted, named as the page says."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = [code.split("```")[0] for code in page.split("```python")[1:] if "def margin" in code]
    (tmp_path / "my_losses.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    made = make_objective({"name": "my_losses:margin", "gamma": 1.0})
    scores = Scores(
        policy=jnp.asarray([[-3.0, -5.0]]),
        reference=jnp.asarray([[-4.0, -4.0]]),
        lengths=jnp.ones((1, 2), jnp.int32),
        present=jnp.ones((1, 2), bool),
        ranks=jnp.arange(2)[None],
        scores=jnp.zeros((1, 2)),
    )
    assert_allclose(made(scores), [math.log1p(math.exp(1.0 - 0.1 * 2.0))], rtol=1e-6)
    assert set(re.findall(r"beside the (\d+)\s+that", USING)) == {str(len(OBJECTIVES))}
