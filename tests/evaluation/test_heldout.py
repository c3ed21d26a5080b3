"""What a run kept is shown only beside the texts that it is about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from finished_run import finished  # noqa: F401
from safetensors.numpy import load_file, save_file

from dpo.config import Config
from dpo.data.preferences import digest, fingerprint, read_preferences
from dpo.evaluation.heldout import load_heldout


@pytest.fixture
def known_run(run: tuple[Path, Config]) -> tuple[Path, Config]:
    """A run that knows the preferences that it was evaluated on."""
    path, config = run
    numbers = load_file(path / "heldout.safetensors")
    read = read_preferences(str(config.data.eval)).preferences
    save_file(numbers, path / "heldout.safetensors", metadata={"preferences": fingerprint(map(digest, read))})
    return run


def test_other_texts_of_the_same_number_are_refused(known_run: tuple[Path, Config]) -> None:
    path, config = known_run
    assert len(load_heldout(path, config).preferences) == 30
    data = Path(str(config.data.eval))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    with pytest.raises(ValueError, match=r"eval\.jsonl does not hold the preferences that .*heldout"):
        load_heldout(path, config)


def test_a_log_prob_that_is_not_finite_is_named_by_its_place(known_run: tuple[Path, Config]) -> None:
    path, config = known_run
    numbers = load_file(path / "heldout.safetensors")
    numbers["policy"][4, 1] = np.nan
    save_file(numbers, path / "heldout.safetensors")
    with pytest.raises(
        ValueError, match=r"policy log-probs of 1 of 30 rows are not finite \(.*eval.jsonl:5\)"
    ):
        load_heldout(path, config)
