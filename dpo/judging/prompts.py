"""The prompts of a match, and what is taken from their data where no setting says it: judge and length."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dpo.config import Config, DataConfig, WinrateConfig
from dpo.config.sources import show_source, spellings
from dpo.data.columns import RowReading
from dpo.data.expansion import Expand, expand_ranking
from dpo.data.malformed import MalformedRowError
from dpo.data.messages import response_text
from dpo.data.mixing import Share, take
from dpo.data.preferences import Preference, read_preferences
from dpo.data.rows import read_prompt_row
from dpo.data.sources import Part, cut_whole, read_rows
from dpo.data.tokenizer_calls import encode_texts
from dpo.distribution import is_shipped
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.judging.judges import Log
from dpo.judging.kinds import JUDGES, spell
from dpo.judging.samples import Request
from dpo.outcomes import UserError
from dpo.training.places import Place, places

SHIPPED_JUDGE = "vader"
"""The reward of the data that come with the package."""
COVERED = 0.99
"""Part of the data's responses that a response may be as long as."""
STEP = 64
"""Tokens: the limit is a multiple of it."""
LABELS = {"data:best": 0, "data:worst": 1}
"""The rank of a labelled single response that is the data's best, or their worst."""
WITHOUT_RESPONSES = 256
"""Tokens of the longest response where the data have none."""


def read_prompts(config: Config, log: Log) -> list[Preference]:
    """The first row of every prompt of the held-out data, whose rows may be prompts alone.

    Of several sources the rows that are drawn of each. Where the opponent is the data's best responses a row
    whose only response is labelled undesirable has none of them, and where it is the worst a desirable one.

    Raises:
      UserError: where no row has a response of the opponent's.
    """
    read_at = places(config.data, heldout=True)
    found = [_read_place(place, config.data) for place in read_at]
    read = [one.preferences for one in found]
    shares = [place.share for place in read_at if place.share is not None]
    labelled = zip(read_at, _drawn(shares, read, config.data.expand) if shares else read, strict=True)
    preferences = [place.label(preference) for place, mine in labelled for preference in mine]
    opponent, data = config.model.reference, show_source(config.data.eval)
    playing = [preference for preference in preferences if _plays(preference, opponent)]
    if preferences and not playing:
        raise UserError(f"opponent is {opponent}, and no response of {data} is labelled so; allowed: a model")
    first: dict[str, Preference] = {}
    for preference in playing:
        first.setdefault(prompt_key(preference), preference)
    num_rows, malformed = sum(one.num_rows for one in found), sum(one.num_malformed for one in found)
    others = len(preferences) - len(playing)
    log(
        f"{len(first)} prompts of {data} ({num_rows} rows; {malformed} malformed, "
        f"{f'{others} labelled otherwise than {opponent}, ' if others else ''}"
        f"{len(playing) - len(first)} with a prompt that was there)"
    )
    return list(first.values())


def _plays(preference: Preference, opponent: str | None) -> bool:
    """Whether a row has the opponent's response: of labelled single ones only those with its label."""
    label = LABELS.get(opponent or "")
    return label is None or len(preference.responses) != 1 or preference.ranks[0] == label


def _drawn(
    shares: Sequence[Share], read: Sequence[Sequence[Preference]], expand: Expand
) -> list[list[Preference]]:
    """The rows of each source of which the mixture has something, counted as a run counts: in pairs, say."""
    expanded = [[one for row in mine for one in _expanded(row, expand)] for mine in read]
    drawn = [{one.location for one in mine} for mine in take(shares, expanded)]
    return [[row for row in mine if row.location in there] for mine, there in zip(read, drawn, strict=True)]


def _expanded(row: Preference, expand: Expand) -> list[Preference]:
    """What a run makes of a row; a prompt alone stays as it is."""
    return expand_ranking(row, expand)[0] if row.responses else [row]


class _Prompts(NamedTuple):
    preferences: list[Preference]
    num_rows: int
    num_malformed: int


def _read_place(place: Place, data: DataConfig) -> _Prompts:
    part = cut_whole(place.source, place.split, limit=place.limit, helps="fewer (data.max_eval)")
    if holds_prompts_alone(place.source, split=place.split, reading=place.reading):
        return _read_prompts_alone(place, part, data)
    read = read_preferences(
        place.source,
        split=place.split,
        on_error=data.on_error,
        limit=place.limit,
        reading=place.reading,
    )
    return _Prompts(read.preferences, read.num_rows, sum(read.skipped.values()))


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


def _read_prompts_alone(place: Place, part: Part, data: DataConfig) -> _Prompts:
    found: list[Preference] = []
    num_rows = 0
    for location, row in read_rows(place.source, place.split, part):
        num_rows += 1
        try:
            found.append(read_prompt_row(row, location=location, source=place.source, reading=place.reading))
        except MalformedRowError as error:
            if data.on_error == "stop":
                raise UserError(f"{location}: {error}") from error
    return _Prompts(found, num_rows, num_rows - len(found))


def with_length(
    given: WinrateConfig, config: Config, preferences: Sequence[Preference], log: Log
) -> WinrateConfig:
    """The settings with the longest response, as given or as the data say.

    Raises:
      UserError: for an opponent that is the data's responses where the data have none.
    """
    opponent, data = config.model.reference, show_source(config.data.eval)
    if opponent is not None and opponent.startswith("data:") and not all(p.responses for p in preferences):
        raise UserError(f"opponent is {opponent}, and {data} holds prompts alone; allowed: a model")
    length = given.max_new_tokens
    if length is None:
        length = _length_of(preferences, config.model.source)
        has_responses = any(row.responses for row in preferences)
        words = f"{COVERED:.0%} of the data's are no longer" if has_responses else "the data have none"
        log(f"responses of at most {length} tokens: {words} (--max_new_tokens says otherwise)")
    return replace(given, max_new_tokens=length)


def choose_judge(judge: str | None, data: str | list[Any] | None) -> str:
    """The judge that is named; without one, for the data that come with the package, their reward.

    Raises:
      UserError: for other data, with all judges there are.
    """
    if judge is not None:
        return judge
    if all_shipped(data):
        return SHIPPED_JUDGE
    allowed = "; ".join(f"{spell(name)}: {kind.decides_by}" for name, kind in JUDGES.items())
    raise UserError(
        f"judge is not given, and {show_source(data)} is none of the shipped data; allowed: {allowed}"
    )


def all_shipped(data: str | list[Any] | None) -> bool:
    """Whether all that data.eval names comes with the package."""
    return data is not None and all(map(is_shipped, spellings(data)))


def _length_of(preferences: Sequence[Preference], source: str) -> int:
    """Tokens that all but the longest of the data's responses have at most, as the policy counts them."""
    texts = [response_text(response) for row in preferences for response in row.responses]
    if not texts:
        return WITHOUT_RESPONSES
    tokenizer: Any = load_tokenizer(source)
    lengths = list(map(len, encode_texts(tokenizer, texts)))
    longest = float(np.quantile(lengths, COVERED, method="higher")) + 1  # the end of the turn
    return STEP * math.ceil(longest / STEP)
