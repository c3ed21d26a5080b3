"""What a run directory's readers share."""

import json

import pytest

from dpo.config import Config
from dpo.runs import SUMMARY_FILE, flat_settings, objective_title, read_summary


def test_settings_are_flat_by_dotted_names_and_an_empty_section_has_none():
    assert flat_settings({"a": {"b": 1, "c": {"d": [2]}, "e": {}}, "f": None}) == {
        "a.b": 1,
        "a.c.d": [2],
        "f": None,
    }


def test_a_sum_is_titled_by_its_terms():
    config = Config(objectives=[{"name": "dpo", "beta": 0.1}, {"name": "sft"}])
    assert objective_title(config) == "dpo (beta 0.1) + sft"
    assert objective_title(Config()) == "dpo"


def test_a_summary_is_there_or_not_or_named_as_damaged(tmp_path):
    assert read_summary(tmp_path) is None
    (tmp_path / SUMMARY_FILE).write_text(json.dumps({"steps": 3}))
    assert read_summary(tmp_path) == {"steps": 3}
    for content, reason in (("{", "not valid JSON"), ("[]", r"what it holds is \[\]")):
        (tmp_path / SUMMARY_FILE).write_text(content)
        with pytest.raises(ValueError, match=rf"summary\.json is damaged: {reason}"):
            read_summary(tmp_path)
