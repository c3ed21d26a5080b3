"""From a file or a Hugging Face data set to `Preference`: the accepted formats, and what is wrong with a row.

A row is one JSON object (a JSONL line, a Parquet row, a row of a `datasets` data set) of one of three kinds:

    pair       {"prompt", "chosen", "rejected"}, where wanted with "score_chosen" and "score_rejected"
    ranking    {"prompt", "responses": [...]} and "ranks": [1 is best, ...] or "scores": [higher is better,
               ...], or both (the ranks then give the order)
    unpaired   {"prompt", "completion", "label": true (desirable) or false}

A prompt is a string or a conversation `[{"role", "content"}, ...]` that does not end with the assistant.
A response is a string or a conversation that adds exactly one assistant message to the prompt. Where
"prompt" is left out it is what the responses share: whole messages of conversations, and of strings the
common prefix up to a word's border. Strings in the style "\\n\\nHuman: ...\\n\\nAssistant: ..."
(Anthropic's HH) are read as conversations. Other fields are ignored, except that a string in "source"
names where the row came from.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo.data.sources import MalformedRowError, Part, read_rows

Message = Mapping[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_PROBLEMS = 20


class Preference(NamedTuple):
    """A prompt and its responses, best first."""

    prompt: str | tuple[Message, ...]
    """Plain text, or the messages of a conversation."""
    responses: tuple[str, ...]
    """Contents of the assistant's message, best first."""
    ranks: tuple[int, ...]
    """0 is best, without gaps; equal ranks are ties. One response alone: 0 is desirable, 1 undesirable."""
    scores: tuple[float, ...] | None
    """Given scores, higher is better."""
    source: str
    """The row's own "source" field, or the name of its file or data set."""
    location: str
    """File (or data set) and line (or row), counted from 1: `train.jsonl:17`."""


def digest(preference: Preference) -> bytes:
    """Of what a row says, not of where it stands."""
    content = [preference.prompt, preference.responses, preference.ranks, preference.scores]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def fingerprint(digests: Iterable[bytes]) -> str:
    """Of rows in their order, by their digests, singly or joined."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


class Problem(NamedTuple):
    """What is wrong with one row."""

    location: str
    field: str
    reason: str
    """Short and countable, such as "empty"."""
    detail: str
    """What was found and what is allowed."""

    def __str__(self) -> str:
        return f"{self.location}: field '{self.field}': {self.detail} [{self.reason}]"


class ReadPreferences(NamedTuple):
    """The rows of a source that were read, and what was left out."""

    preferences: list[Preference]
    num_rows: int
    """Rows looked at, the skipped ones included."""
    skipped: dict[str, int]
    """Rows (or tied pairs of an expanded ranking) left out, by reason."""
    problems: list[Problem]
    """The first malformed rows, at most MAX_PROBLEMS."""


class DataError(ValueError):
    """Rows of the data do not have an accepted format. `problems` holds the first of them."""

    def __init__(self, source: str, problems: Sequence[Problem], num_malformed: int, num_rows: int) -> None:
        self.problems = list(problems)
        lines = [f"{source}: {num_malformed} of {num_rows} rows are malformed"]
        lines += [f"  {problem}" for problem in problems]
        if num_malformed > len(problems):
            lines.append(f"  and {num_malformed - len(problems)} more")
        lines.append(
            "Correct them, or set on_error to skip, which leaves malformed rows out and counts them."
        )
        super().__init__("\n".join(lines))


Expand = Literal["ranking", "best_worst", "adjacent", "all_pairs"]
OnError = Literal["stop", "skip"]
TIED_PAIR = "tied_pair"
"""The reason by which pairs of equal rank are counted; all others are of malformed rows."""


def read_preferences(
    source: str | Path,
    *,
    split: str = "train",
    on_error: OnError = "stop",
    limit: int | None = None,
    expand: Expand = "ranking",
) -> ReadPreferences:
    """Read every row of a JSONL, JSON, Parquet, CSV or Arrow file, a directory, or a hub data set.

    A hub data set may name a configuration or data directory after a colon: `Anthropic/hh-rlhf:helpful-base`.
    `split` is for directories and hub data sets; `limit` takes the first rows only. Raises `DataError` with
    the malformed rows, up to MAX_PROBLEMS, unless `on_error` is "skip".
    """
    name = str(source)
    read = read_part(name, split, Part(rows=limit), expand)
    check_read(name, read, len(read.preferences), on_error)
    return read


def read_part(source: str, split: str, part: Part, expand: Expand) -> ReadPreferences:
    """The preferences of some rows of a source; malformed rows are counted only."""
    default_source = Path(source).name if Path(source).exists() else source
    preferences: list[Preference] = []
    problems: list[Problem] = []
    skipped: Counter[str] = Counter()
    num_rows = 0
    for location, row in read_rows(source, split, part):
        num_rows += 1
        try:
            preference = parse_row(row, location=location, source=default_source)
        except MalformedRowError as error:
            skipped[error.reason] += 1
            if len(problems) < MAX_PROBLEMS:
                problems.append(Problem(location, error.field, error.reason, error.detail))
            continue
        expanded, num_tied = expand_ranking(preference, expand)
        preferences += expanded
        if num_tied:
            skipped[TIED_PAIR] += num_tied
    return ReadPreferences(preferences, num_rows, dict(skipped), problems)


def check_read(source: str, read: ReadPreferences, num_preferences: int, on_error: OnError) -> None:
    """Refuse malformed rows, unless they are to be skipped, and data of which nothing is left."""
    if read.problems and on_error == "stop":
        num_malformed = sum(count for reason, count in read.skipped.items() if reason != TIED_PAIR)
        raise DataError(source, read.problems, num_malformed, read.num_rows)
    if not num_preferences:
        left_out = ", ".join(f"{count} x {reason}" for reason, count in read.skipped.items())
        found = f"no usable row among {read.num_rows}: left out {left_out}" if left_out else "it has no rows"
        raise ValueError(f"{source}: {found}")


def expand_ranking(preference: Preference, expand: Expand) -> tuple[list[Preference], int]:
    """A ranking as it is, or as its best-worst, adjacent or all pairs; and how many pairs were tied.

    Pairs of equal rank state no preference and are left out. A response that stands alone stays as it is.
    """
    count = len(preference.responses)
    if expand == "ranking" or count == 1:
        return [preference], 0
    places: dict[str, Iterable[tuple[int, int]]] = {
        "best_worst": [(0, count - 1)],
        "adjacent": pairwise(range(count)),
        "all_pairs": combinations(range(count), 2),
    }
    if expand not in places:
        raise ValueError(f"expand is {expand!r}; allowed are ranking, {', '.join(places)}")
    pairs = list(places[expand])
    untied = [(i, j) for i, j in pairs if preference.ranks[i] != preference.ranks[j]]
    return [_pair_of(preference, i, j) for i, j in untied], len(pairs) - len(untied)


def parse_row(row: Any, *, location: str, source: str) -> Preference:
    """One row as a `Preference`; raises a `ValueError` that names the field and what is allowed in it."""
    if isinstance(row, MalformedRowError):
        raise row
    if not isinstance(row, Mapping):
        raise MalformedRowError("(row)", "wrong_type", f"found {_name_type(row)}; allowed is an object")
    row = {key: value for key, value in row.items() if value is not None}
    kinds = [kind for fields, kind in _KINDS.items() if all(field in row for field in fields)]
    if len(kinds) != 1:
        found = "fields of several kinds" if kinds else "no complete kind of row"
        detail = f"found {found} among {_name_fields(row)}; allowed is one of {_KIND_NAMES}"
        raise MalformedRowError("(row)", "unknown_format" if not kinds else "ambiguous_format", detail)
    prompt, responses, ranks, scores = kinds[0](row)
    order = sorted(range(len(responses)), key=lambda k: ranks[k])
    levels = {rank: level for level, rank in enumerate(sorted(set(ranks)))}
    lone = len(responses) == 1
    return Preference(
        prompt=prompt,
        responses=tuple(responses[k] for k in order),
        ranks=tuple(int(ranks[k]) if lone else levels[ranks[k]] for k in order),
        scores=None if scores is None else tuple(float(scores[k]) for k in order),
        source=_text(row["source"], "source") if isinstance(row.get("source"), str) else source,
        location=location,
    )


# ---- the three kinds of rows ----

Prompt = str | tuple[Message, ...]
_Parsed = tuple[Prompt, list[str], Sequence[int | float], Sequence[float] | None]


def _parse_pair(row: Mapping[str, Any]) -> _Parsed:
    prompt, responses = _split_prompt(row, {field: row[field] for field in ("chosen", "rejected")})
    fields = ("score_chosen", "score_rejected")
    scores = [_number(row[field], field) for field in fields] if all(f in row for f in fields) else None
    return prompt, responses, (0, 1), scores


def _parse_ranking(row: Mapping[str, Any]) -> _Parsed:
    given = row["responses"]
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
        found = f"a list of {len(given)}" if isinstance(given, list) else _name_type(given)
        raise MalformedRowError(
            "responses", "too_few_responses", f"found {found}; allowed is a list of 2 or more"
        )
    if "ranks" not in row and "scores" not in row:
        raise MalformedRowError("ranks", "missing_field", "a ranking needs 'ranks' (1 is best) or 'scores'")
    prompt, responses = _split_prompt(row, {f"responses[{k}]": given[k] for k in range(len(given))})
    scores = _numbers(row, "scores", len(given)) if "scores" in row else None
    if "ranks" in row:
        return prompt, responses, _numbers(row, "ranks", len(given)), scores
    assert scores is not None
    return prompt, responses, [-score for score in scores], scores


def _parse_unpaired(row: Mapping[str, Any]) -> _Parsed:
    label = row["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise MalformedRowError(
            "label", "wrong_type", f"found {_show(label)}; allowed is true (desirable) or false"
        )
    prompt, responses = _split_prompt(row, {"completion": row["completion"]})
    return prompt, responses, (0 if label else 1,), None


_KINDS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], _Parsed]] = {
    ("chosen", "rejected"): _parse_pair,
    ("responses",): _parse_ranking,
    ("completion", "label"): _parse_unpaired,
}
_KIND_NAMES = "chosen + rejected, responses + ranks | scores, completion + label"


# ---- prompt and responses ----


def _split_prompt(row: Mapping[str, Any], given: dict[str, Any]) -> tuple[Prompt, list[str]]:
    """The prompt and one assistant message for every given field, explicit or not."""
    fields = {field: _text_or_turns(value, field) for field, value in given.items()}
    if "prompt" in row:
        prompt = _text_or_turns(row["prompt"], "prompt", may_be_open=True)
        if isinstance(row["prompt"], str) and not isinstance(prompt, str):
            fields = {f: value.strip() if isinstance(value, str) else value for f, value in fields.items()}
        return _split_explicit(prompt, fields)
    conversations = {field: value for field, value in fields.items() if not isinstance(value, str)}
    if len(conversations) == len(fields):
        return _split_conversations(conversations)
    texts = [value for value in fields.values() if isinstance(value, str)]
    if len(texts) == len(fields) > 1:
        return _split_strings(texts, list(fields))
    raise MalformedRowError("prompt", "missing_field", "no prompt, and the responses have none in common")


def _split_explicit(prompt: Prompt, fields: dict[str, Prompt]) -> tuple[Prompt, list[str]]:
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    if turns[-1]["role"] == "assistant":
        detail = "ends with an assistant message; allowed last are user, system and tool"
        raise MalformedRowError("prompt", "roles", detail)
    responses = []
    for field, value in fields.items():
        if isinstance(value, str):
            responses.append(value)
            continue
        if len(value) > len(turns) and _same_turns(value[: len(turns)], turns):
            value = value[len(turns) :]
        responses.append(_lone_assistant(value, field))
    return prompt, responses


def _split_conversations(fields: dict[str, tuple[Message, ...]]) -> tuple[Prompt, list[str]]:
    """The prompt is the messages that all share, and each adds one assistant message to it."""
    shortest = min(len(turns) for turns in fields.values())
    first = next(iter(fields.values()))
    shared = 0
    while shared < shortest - 1 and all(_same_turns([t[shared]], [first[shared]]) for t in fields.values()):
        shared += 1
    if shared == 0:
        raise MalformedRowError(
            "prompt", "no_common_prompt", "no prompt, and the conversations share no first message"
        )
    responses = [_lone_assistant(turns[shared:], field) for field, turns in fields.items()]
    if first[shared - 1]["role"] == "assistant":
        raise MalformedRowError(
            "prompt", "roles", "the shared messages end with the assistant; allowed last is the user"
        )
    return first[:shared], responses


def _split_strings(texts: list[str], fields: list[str]) -> tuple[Prompt, list[str]]:
    """The prompt is the common prefix, cut back to a border between words when it ends inside one."""
    low, high = min(texts), max(texts)
    end = next((i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), len(low))
    while end and not (low[end - 1].isspace() or all(end < len(t) and t[end].isspace() for t in texts)):
        end -= 1
    prompt = low[:end].rstrip(" ")
    if not prompt.strip():
        raise MalformedRowError(
            "prompt", "no_common_prompt", "no prompt, and the strings share no first words"
        )
    responses = [text[len(prompt) :] for text in texts]
    for field, response in zip(fields, responses, strict=True):
        if not response.strip():
            raise MalformedRowError(field, "empty", "nothing is left after the words shared by all strings")
    return prompt, responses


def _lone_assistant(turns: Sequence[Message], field: str) -> str:
    roles = [turn["role"] for turn in turns]
    if roles != ["assistant"]:
        detail = f"adds the roles {roles} to the prompt; allowed is exactly one assistant message"
        raise MalformedRowError(field, "several_turns", detail)
    return turns[0]["content"]


def _same_turns(left: Sequence[Message], right: Sequence[Message]) -> bool:
    return [(t["role"], t["content"]) for t in left] == [(t["role"], t["content"]) for t in right]


# ---- values ----


def _text_or_turns(value: Any, field: str, *, may_be_open: bool = False) -> Prompt:
    """A non-empty string, or a conversation (given as messages, or in the HH style as a string)."""
    if isinstance(value, str):
        text = _text(value, field)
        return _parse_human_assistant(text, field, may_be_open) if _HH_TURN.match(text) else text
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        detail = f"found {_name_type(value)}; allowed is a string or a list of messages"
        raise MalformedRowError(field, "wrong_type", detail)
    if not value:
        raise MalformedRowError(field, "empty", "found no message; allowed is one or more")
    return tuple(_message(turn, f"{field}[{i}]") for i, turn in enumerate(value))


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def _parse_human_assistant(text: str, field: str, may_be_open: bool) -> tuple[Message, ...]:
    pieces = _HH_TURN.split(text)[1:]
    pairs = list(zip(pieces[0::2], pieces[1::2], strict=True))
    if may_be_open and len(pairs) > 1 and pairs[-1][0] == "Assistant" and not pairs[-1][1].strip():
        pairs.pop()
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        {"role": roles[role], "content": _text(content.strip(), f"{field}[{i}].content")}
        for i, (role, content) in enumerate(pairs)
    )


def _message(turn: Any, field: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
        raise MalformedRowError(
            field, "wrong_type", "allowed is an object with the strings 'role' and 'content'"
        )
    if turn["role"] not in ROLES:
        raise MalformedRowError(
            f"{field}.role", "roles", f"found {_show(turn['role'])}; allowed are {', '.join(ROLES)}"
        )
    return {"role": turn["role"], "content": _text(turn["content"], f"{field}.content")}


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise MalformedRowError(field, "wrong_type", f"found {_name_type(value)}; allowed is a string")
    if not value.strip():
        raise MalformedRowError(
            field, "empty", "found nothing but white space; allowed is a string with text"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"character {error.start} is half a surrogate pair; allowed is valid Unicode"
        raise MalformedRowError(field, "invalid_unicode", detail) from None
    return value


def _numbers(row: Mapping[str, Any], field: str, count: int) -> list[float]:
    values = row[field]
    if not isinstance(values, Sequence) or isinstance(values, str):
        detail = f"found {_name_type(values)}; allowed is a list with one number a response"
        raise MalformedRowError(field, "wrong_type", detail)
    if len(values) != count:
        detail = f"{len(values)} for {count} responses; allowed is one number a response"
        raise MalformedRowError(field, "length_mismatch", detail)
    return [_number(value, f"{field}[{k}]") for k, value in enumerate(values)]


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise MalformedRowError(field, "not_a_number", f"found {_show(value)}; allowed is a finite number")
    return float(value)


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _show(value: Any) -> str:
    """A scalar, shortened, or the name of any other type: a row may hold anything, of any depth."""
    if isinstance(value, (str, float, bool)):
        text = repr(value[: _LONGEST_SHOWN + 1] if isinstance(value, str) else value)
        return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
    if isinstance(value, int):
        return str(value) if value.bit_length() < 128 else "an integer beyond any number"
    return _name_type(value)


_LONGEST_SHOWN = 60


def _name_fields(row: Mapping[Any, Any]) -> str:
    names = sorted(_show(str(name)) for name in row)
    return f"[{', '.join(names[:20])}{', …' if len(names) > 20 else ''}]"


def _name_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _pair_of(preference: Preference, i: int, j: int) -> Preference:
    scores = preference.scores
    return preference._replace(
        responses=(preference.responses[i], preference.responses[j]),
        ranks=(0, 1),
        scores=None if scores is None else (scores[i], scores[j]),
    )
