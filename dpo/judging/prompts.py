"""The prompts of a match, and what is taken from their data where no setting says it: judge and length."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dpo.config import Config, WinrateConfig
from dpo.data.columns import RowReading
from dpo.data.messages import response_text
from dpo.data.preferences import Preference, read_preferences
from dpo.data.rows import read_prompt_row, row_reading
from dpo.data.sources import MalformedRowError, Part, read_rows
from dpo.distribution import is_shipped
from dpo.huggingface.pretrained import load_tokenizer
from dpo.judging.judges import Log
from dpo.judging.kinds import JUDGES, spell
from dpo.judging.samples import Request
from dpo.outcomes import UserError

SHIPPED_JUDGE = "vader"
"""The reward of the data that come with the package."""
COVERED = 0.99
"""Part of the data's responses that a response may be as long as."""
STEP = 64
"""Tokens: the limit is a multiple of it."""
WITHOUT_RESPONSES = 256
"""Tokens of the longest response where the data have none."""


def read_prompts(config: Config, log: Log) -> list[Preference]:
    """The first row of every prompt of the held-out data, whose rows may be prompts alone."""
    data = config.data
    assert data.eval is not None
    reading = row_reading(data.row_layout, data.columns, data.ignore_columns)
    if holds_prompts_alone(data.eval, split=data.eval_split, reading=reading):
        preferences, num_rows, malformed = _read_prompts_alone(config, reading)
    else:
        read = read_preferences(
            data.eval, split=data.eval_split, on_error=data.on_error, limit=data.max_eval, reading=reading
        )
        preferences, num_rows, malformed = read.preferences, read.num_rows, sum(read.skipped.values())
    first: dict[str, Preference] = {}
    for preference in preferences:
        first.setdefault(prompt_key(preference), preference)
    log(
        f"{len(first)} prompts of {data.eval} ({num_rows} rows; {malformed} malformed, "
        f"{len(preferences) - len(first)} with a prompt that was there)"
    )
    return list(first.values())


def prompt_key(asked: Preference | Request) -> str:
    """What two rows have in common that ask a model for the same."""
    return json.dumps(asked.prompt if asked.context is None else [asked.prompt, asked.context])


def holds_prompts_alone(source: str, *, split: str, reading: RowReading) -> bool:
    """Whether the first row has a prompt and nothing that any layout of preferences would read."""
    for _, row in read_rows(source, split, Part(rows=1)):
        if not isinstance(row, Mapping):
            return False
        try:
            read_prompt_row(row, location=source, source=source, reading=reading)
        except MalformedRowError:
            return False
        return True
    return False


def _read_prompts_alone(config: Config, reading: RowReading) -> tuple[list[Preference], int, int]:
    data = config.data
    assert data.eval is not None
    found: list[Preference] = []
    num_rows = 0
    for location, row in read_rows(data.eval, data.eval_split, Part(rows=data.max_eval)):
        num_rows += 1
        try:
            found.append(read_prompt_row(row, location=location, source=data.eval, reading=reading))
        except MalformedRowError as error:
            if data.on_error == "stop":
                raise UserError(f"{location}: {error}") from error
    return found, num_rows, num_rows - len(found)


def with_length(
    given: WinrateConfig, config: Config, preferences: Sequence[Preference], log: Log
) -> WinrateConfig:
    """The settings with the longest response, as given or as the data say.

    Raises:
      UserError: for an opponent that is the data's responses where the data have none.
    """
    opponent, data = config.model.reference, config.data.eval
    if opponent is not None and opponent.startswith("data:") and not all(p.responses for p in preferences):
        raise UserError(f"opponent is {opponent}, and {data} holds prompts alone; allowed: a model")
    length = given.max_new_tokens
    if length is None:
        length = _length_of(preferences, config.model.source)
        has_responses = any(row.responses for row in preferences)
        words = f"{COVERED:.0%} of the data's are no longer" if has_responses else "the data have none"
        log(f"responses of at most {length} tokens: {words} (--max_new_tokens says otherwise)")
    return replace(given, max_new_tokens=length)


def choose_judge(judge: str | None, data: str | None) -> str:
    """The judge that is named; without one, for the data that come with the package, their reward.

    Raises:
      UserError: for other data, with all judges there are.
    """
    if judge is not None:
        return judge
    if data is not None and is_shipped(data):
        return SHIPPED_JUDGE
    allowed = "; ".join(f"{spell(name)}: {kind.decides_by}" for name, kind in JUDGES.items())
    raise UserError(f"judge is not given, and {data} is none of the shipped data; allowed: {allowed}")


def _length_of(preferences: Sequence[Preference], source: str) -> int:
    """Tokens that all but the longest of the data's responses have at most, as the policy counts them."""
    texts = [response_text(response) for row in preferences for response in row.responses]
    if not texts:
        return WITHOUT_RESPONSES
    tokenizer: Any = load_tokenizer(source)
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest = float(np.quantile(lengths, COVERED, method="higher")) + 1  # the end of the turn
    return STEP * math.ceil(longest / STEP)
