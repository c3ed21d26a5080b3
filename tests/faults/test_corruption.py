"""Every file that a run reads back is cut, flipped and removed in turn, and found each time."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import outcome

from dpo.config import TrainingConfig
from dpo.files import damaged_files
from dpo.huggingface.pretrained import load_pretrained
from dpo.training.checkpoint import Checkpoints
from dpo.training.reference import _read
from dpo.training.saving import find_resume


def damages(directory: Path) -> Iterator[str]:
    """Harm each file of a directory in three ways, one after the other; yields what was done; undoes it."""
    generator = random.Random(0)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    assert files
    for path in files:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        if whole:
            flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        name = path.relative_to(directory)
        for what, content in (
            ("truncated", whole[: generator.randrange(len(whole))] if whole else b"?"),
            ("flipped", bytes(flipped) if whole else b"?"),
            ("removed", None),
        ):
            path.unlink() if content is None else path.write_bytes(content)
            yield f"{name} {what}"
            path.write_bytes(whole)


@pytest.fixture
def run_dir(unbroken, tmp_path):
    """A copy of the unbroken run, with its two newest checkpoints."""
    return shutil.copytree(unbroken.run_dir, tmp_path / "run")


def resume(run_dir: Path, log) -> int:
    """Where a run in this directory would go on, by checksums alone."""
    with Checkpoints(run_dir / "checkpoints", keep=2) as checkpoints:
        settings = TrainingConfig()
        return find_resume(checkpoints, {}, settings=settings, run_dir=run_dir, num_steps=9, log=log).step


@pytest.mark.ci
def test_damage_to_a_checkpoint_makes_a_run_go_on_from_the_one_before(run_dir, capsys):
    newest = run_dir / "checkpoints" / "9"
    cases = 0
    for what in damages(newest):
        said: list[str] = []
        assert resume(run_dir, said.append) == 8, what
        assert "step 9" in said[0], what
        assert said[-1] == "going on from step 8, the newest checkpoint that is whole"
        (run_dir / "checkpoints" / "9.damaged").rename(newest)
        cases += 1
    with capsys.disabled():
        print(f"\n{cases} damages to the newest checkpoint: {cases} found, all went on from the one before")
    assert resume(run_dir, print) == 9


@pytest.mark.ci
def test_damage_to_the_only_checkpoint_is_refused_by_name(run_dir, capsys):
    shutil.rmtree(run_dir / "checkpoints" / "8")
    cases = 0
    for _ in damages(run_dir / "checkpoints" / "9"):
        with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: step 9 \(.*delete the checkp"):
            resume(run_dir, print)
        cases += 1
    with capsys.disabled():
        print(f"\n{cases} damages to the only checkpoint: {cases} refused by name")
    assert cases


@pytest.mark.ci
def test_damage_to_a_reference_store_is_refused_by_name(run_dir, capsys):
    import json

    cases = 0
    stores = sorted((run_dir / "reference").iterdir())
    assert len(stores) == 2  # of the training and of the held-out data
    for store in stores:
        identity = json.loads((store / "meta.json").read_text())["identity"]
        for _ in damages(store):
            with pytest.raises(ValueError, match=f"reference store .*{store.name} is damaged"):
                _read(store, identity, (12, 3))
            cases += 1
    with capsys.disabled():
        print(f"\n{cases} damages to reference stores: {cases} refused by name")
    assert cases


@pytest.mark.ci
def test_damage_to_an_export_is_refused_by_name(run_dir, capsys):
    export = run_dir / "export"
    assert not damaged_files(export)
    cases = 0
    for what in damages(export):
        if what == "SHA256SUMS removed":  # an export without is a model directory like any other
            continue
        if what == "SHA256SUMS truncated":  # the lines that are left must fit, or be no lines
            lines = (export / "SHA256SUMS").read_text().splitlines()
            if all(
                len(line.partition("  ")[2]) and (export / line.partition("  ")[2]).is_file()
                for line in lines
            ):
                continue
        with pytest.raises(ValueError, match=r"export is damaged|export has no config\.json"):
            load_pretrained(export)
        cases += 1
    with capsys.disabled():
        print(f"\n{cases} damages to an export: {cases} refused by name")


@pytest.mark.parametrize(
    "how", [pytest.param("flip", marks=pytest.mark.ci), pytest.param("cut", marks=pytest.mark.slow)]
)
def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_bits(
    server, make_config, expected, tmp_path, how
):
    config = make_config(tmp_path / "run")
    assert server.run(config, hooks=[{"where": "step", "count": 5, "do": "SIGTERM"}]) == 75
    largest = max((tmp_path / "run/checkpoints/5").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 16
    largest.write_bytes(bytes(content if how == "flip" else content[:-7]))
    assert server.run(config) == 0, server.printed(config)
    assert outcome(config) == expected
    assert "going on from step 4, the newest checkpoint that is whole" in server.printed(config)


@pytest.mark.ci
def test_a_cut_line_of_metrics_is_written_again_and_a_damaged_one_is_named(
    server, make_config, expected, tmp_path
):
    config = make_config(tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert server.run(config, hooks=[{"where": "step", "count": 5, "do": "SIGTERM"}]) == 75
    whole = metrics.read_text()
    metrics.write_text("#" + whole[1:])
    assert server.run(config) == 2, server.printed(config)
    assert "metrics.jsonl:1 is damaged" in server.printed(config)
    metrics.write_text(whole + '{"step": 5, "lo')
    assert server.run(config) == 0, server.printed(config)
    assert outcome(config) == expected
