"""Every input is read or refused as declared (`python -m tests.fuzz` for many inputs)."""

from pathlib import Path

import pytest
from fuzz_run import LONGEST_SECONDS, Target, run
from fuzz_targets import targets


@pytest.mark.parametrize("name", targets())
def test_every_input_is_read_or_refused(name):
    target = targets()[name]
    outcome = run(target, target.quick)
    assert not outcome.failures, f"{outcome.failures[0].data!r}\n{outcome.failures[0].what}"
    assert outcome.accepted
    assert outcome.refused


@pytest.mark.parametrize("name", targets())
def test_every_seed_is_accepted(name):
    """Otherwise mutations would be of what is refused at the first check."""
    target = targets()[name]
    outcome = run(target, len(target.seeds))
    # rows that are one with their neighbours; an alias for a name;
    # raise_exception, and names that only a judge's template has; integers for weights
    refused = {"layouts": 2, "config.yaml": 1, "template": 2, "safetensors": 1}.get(name, 0)
    assert outcome.refused <= refused


def test_the_page_says_how_many_inputs_the_quick_part_has():
    counts = [target.quick for target in targets().values()]
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    assert f"the quick part: {min(counts)} to {max(counts)} inputs a reader" in page
    assert f"Every input has {LONGEST_SECONDS:.0f} s" in page


def test_a_crash_is_found():
    def read(data: bytes) -> None:
        {}[data[:1]]

    outcome = run(Target("broken", [b"x"], [b"y"], read, lambda error: isinstance(error, ValueError), 1), 50)
    assert len(outcome.failures) == 20
    assert "KeyError" in outcome.failures[0].what
