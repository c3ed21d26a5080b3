"""The wheel holds all that the package needs, and runs where there is nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dpo import distribution
from dpo.cli import COMMANDS, main
from dpo.command_line import load_config
from dpo.distribution import find_data, find_settings, settings_names, version

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "dpo", "configs", "data")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is written beside the sources, and without an index."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run_pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(target), str(source))
    (made,) = target.glob("dpo_jax-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of packages that holds the wheel's alone."""
    site = tmp_path_factory.mktemp("site")
    run_pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    return site


def run_pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_installed(installed: Path, directory: Path, *arguments: str) -> str:
    """What a command prints in a directory, with the installed package and not with this checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dpo", *arguments],
        **{"cwd": directory, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package_and_what_is_shipped(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dpo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {
        f"dpo/shipped/{path.relative_to(ROOT).as_posix()}"
        for path in (*(ROOT / "configs").glob("*.yaml"), *(ROOT / "data").glob("*.jsonl"))
    }
    assert not (package | shipped) - held


@pytest.mark.ci
def test_the_installed_package_finds_its_settings_and_data_from_an_empty_directory(
    installed: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    printed = run_installed(
        installed,
        tmp_path,
        *("inspect", "--config", "sentiment_pairs", f"--model.source={tiny_model_dir}"),
    )
    assert "333" in printed
    assert run_installed(installed, tmp_path, "--version") == f"dpo {version()}\n"


@pytest.mark.ci
def test_the_installed_package_trains_from_an_empty_directory(
    installed: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    arguments = (f"--model.source={tiny_model_dir}", "--training.steps=2", "--data.max_eval=16")
    run_installed(installed, tmp_path, "train", "--config", "sentiment_pairs", *arguments)
    assert (tmp_path / "runs" / "sentiment_pairs" / "report.html").is_file()


@pytest.mark.parametrize("name", settings_names())
def test_a_shipped_name_stands_for_its_file(name: str) -> None:
    assert Path(find_settings(name)) == ROOT / "configs" / f"{name}.yaml"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_offers_a_command_the_shipped_settings_that_are_of_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    offered = re.search(r"that comes with the package \(([\w, ]+)\)", text)
    names = offered[1].split(", ") if offered else []
    kinds = {"diffusion": "diffusion"} | dict.fromkeys(("train", "inspect", "plan", "sweep"), "run")
    of = {name: "diffusion" if name.startswith("diffusion") else "run" for name in settings_names()}
    assert names == [name for name in settings_names() if of[name] == kinds.get(command)]


def test_a_file_of_that_name_goes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sentiment_pairs").write_text("run_dir: mine\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(find_settings("sentiment_pairs")).run_dir == "mine"


def test_shipped_data_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_data("shipped:sentiment_eval.jsonl")) == ROOT / "data" / "sentiment_eval.jsonl"
    assert find_data("data/sentiment_eval.jsonl") == "data/sentiment_eval.jsonl"


def test_other_shipped_data_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"shipped:nothing\.jsonl: no such file .* sentiment_train\.jsonl"):
        find_data("shipped:nothing.jsonl")


def test_a_checkout_says_its_own_version_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution.metadata, "version", lambda name: "9.9.9")
    assert f'version = "{version.__wrapped__()}"' in (ROOT / "pyproject.toml").read_text()
