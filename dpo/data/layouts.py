"""The layouts of rows that preference data have, one record each; `LAYOUTS` is the table.

A layout says which columns identify it, where the prompt stands, and how the rest is read: responses, and
ranks (1 is best) or scores. What is common to all is done for all: a system text in a column of its own,
tools, documents and template arguments, and messages in all their forms (`dpo.data.messages`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from dpo.data import answers
from dpo.data.answers import Answers, is_list_text, read_two
from dpo.data.columns import BY_COLUMNS, Columns, RowReading
from dpo.data.conversations import read_prompt_column
from dpo.data.malformed import MalformedRowError
from dpo.data.messages import Prompt, as_turns, turn_of
from dpo.data.values import (
    as_object,
    is_empty,
    read_list,
    read_text,
    show_names,
)

FoundPrompt = tuple[Prompt, bool]
"""A prompt, and whether the responses beside it have white space of HH's style around them."""


def _column(name: str) -> Callable[[Columns], FoundPrompt | None]:
    return lambda row: read_prompt_column(row[name], name)


def _whole(name: str) -> Callable[[Columns], FoundPrompt | None]:
    """Of a column that in some data sets is the prompt, in others the prompt with its best response."""

    def read(row: Columns) -> FoundPrompt | None:
        given = answers.exchanges(row[name], name)
        found = read_prompt_column(row[name] if given is None else given, name)
        return None if as_turns(found[0])[-1]["role"] == "assistant" else found

    return read


def _single(row: Columns) -> FoundPrompt | None:
    """A prompt that is not a list of what was asked turn by turn."""
    return None if is_list_text(row["prompt"]) else read_prompt_column(row["prompt"], "prompt")


def _question(row: Columns) -> FoundPrompt | None:
    """A text, messages, or WebGPT's object with the whole text of a question."""
    given = as_object(row["question"], "question")
    if given is not None and "full_text" in given:
        return read_prompt_column(given["full_text"], "question.full_text")
    return read_prompt_column(row["question"], "question")


def _instruction(row: Columns) -> FoundPrompt | None:
    """Alpaca's: an instruction, what it is about, and earlier turns."""
    text = read_text(row["instruction"], "instruction")
    if not is_empty(row.get("input")):
        text = f"{text}\n{read_text(row['input'], 'input')}"
    return _after_history(row, text, "instruction")


def _query(row: Columns) -> FoundPrompt | None:
    """ms-swift's: a query, and earlier turns; messages in other data sets."""
    value = row["query"]
    return (
        _after_history(row, value, "query") if isinstance(value, str) else read_prompt_column(value, "query")
    )


def _after_history(row: Columns, text: str, name: str) -> FoundPrompt | None:
    """What is asked, after the pairs of what was asked and answered before."""
    earlier = row.get("history")
    if is_empty(earlier):
        return read_prompt_column(text, name)
    turns = [
        turn_of(role, content, f"history[{i}][{k}]")
        for i, pair in enumerate(read_list(earlier, "history"))
        for k, (role, content) in enumerate(zip(_EXCHANGE, read_two(pair, f"history[{i}]"), strict=True))
    ]
    return read_prompt_column([*turns, turn_of("user", text, name)], name)


_EXCHANGE = ("user", "assistant")


def _input(row: Columns) -> FoundPrompt | None:
    """OpenAI's `{"messages": [...], "tools": [...]}`, or a text."""
    given = as_object(row["input"], "input")
    if given is not None and "messages" in given:
        return read_prompt_column(given["messages"], "input.messages")
    return read_prompt_column(row["input"], "input")


PROMPTS: dict[str, Callable[[Columns], FoundPrompt | None]] = {
    "prompt": _column("prompt"),
    "single prompt": _single,
    "question": _question,
    "instruction": _instruction,
    "query": _query,
    "conversations": _whole("conversations"),
    "conversation": _whole("conversation"),
    "messages": _whole("messages"),
    "context": _column("context"),
    "history": _column("history"),
    "input": _input,
}
"""Columns that a prompt may stand in; of those that a row has, the first is taken."""
ANY = tuple(name for name in PROMPTS if name != "single prompt")


def find_prompt(row: Columns, layout: RowLayout) -> FoundPrompt | None:
    """The prompt of a row; None where it is what the responses share."""
    for name in layout.prompts:
        column = "prompt" if name == "single prompt" else name
        if (
            column in row
            and (column == "prompt" or not is_empty(row[column]))
            and (found := PROMPTS[name](row))
        ):
            return found
    return None


class RowLayout(NamedTuple):
    """How the rows of some data sets are read."""

    needs: str
    """The columns that identify it; `a|b` is either of two."""
    read: Callable[[Columns], Answers]
    prompts: tuple[str, ...] = ANY
    """Where the prompt may stand, of `PROMPTS`; nowhere but in what the responses share, if empty."""
    unless: str = ""
    """Columns that make it another layout."""
    groups: bool = False
    """Whether neighbouring rows with the same prompt are one: each has one response, with a score."""

    def fits(self, columns: frozenset[str]) -> bool:
        """Whether a row with these columns may have this layout."""
        needed = all(columns.intersection(names.split("|")) for names in self.needs.split())
        return needed and columns.isdisjoint(self.unless.split())


_CHOSEN = answers.pair_of("chosen", "rejected")
_PROMPT = ("prompt",)

LAYOUTS: dict[str, RowLayout] = {
    "pair": RowLayout("chosen rejected", _CHOSEN),
    "orca": RowLayout("question chosen rejected", _CHOSEN, ("question",), "prompt"),
    "alpaca": RowLayout("instruction chosen rejected", _CHOSEN, ("instruction",), "prompt"),
    "alpaca_outputs": RowLayout(
        "instruction output",
        answers.two_outputs,
        ("instruction",),
        "prompt kto_tag label chosen completions generations",
    ),
    "alpaca_kto": RowLayout(
        "instruction output kto_tag", answers.labelled("output", "kto_tag"), ("instruction",)
    ),
    "sharegpt": RowLayout("conversations chosen rejected", _CHOSEN, ("conversations",), "prompt"),
    "sharegpt_kto": RowLayout("conversations kto_tag", answers.labelled("conversations", "kto_tag"), ()),
    "openai": RowLayout(
        "input preferred_output non_preferred_output",
        answers.pair_of("preferred_output", "non_preferred_output"),
        ("input",),
    ),
    "argilla": RowLayout(
        "chosen_response rejected_response",
        answers.pair_of("chosen_response", "rejected_response"),
        ANY,
        "chosen rejected",
    ),
    "ranking": RowLayout("responses", answers.ranking),
    "distilabel": RowLayout("generations ratings|rating|scores", answers.generations, ANY, "chosen rejected"),
    "ultrafeedback": RowLayout("instruction completions", answers.completions, ("instruction",)),
    "nectar": RowLayout("prompt answers", answers.ranked_answers, _PROMPT),
    "stack_exchange": RowLayout("question answers", answers.voted_answers, ("question",), "prompt"),
    "stack_pairs": RowLayout(
        "question response_j response_k", answers.pair_of("response_j", "response_k"), ("question",)
    ),
    "webgpt": RowLayout("question answer_0 answer_1 score_0 score_1", answers.scored_sides, ("question",)),
    "swift_messages": RowLayout(
        "messages rejected_messages",
        answers.pair_of("messages", "rejected_messages"),
        (),
        "prompt chosen rejected rejected_response",
    ),
    "swift_query": RowLayout(
        "query response rejected_response",
        answers.pair_of("response", "rejected_response"),
        ("query",),
        "messages",
    ),
    "nemo_rl": RowLayout("context completions", answers.ranked_completions, ("context",), "instruction"),
    "swift": RowLayout(
        "messages rejected_response", answers.last_turns, (), "prompt chosen rejected chosen_response"
    ),
    "completion": RowLayout("completion label", answers.labelled("completion", "label")),
    "messages_label": RowLayout(
        "messages label", answers.labelled("messages", "label"), (), "completion response_a answer_a output_1"
    ),
    "helpsteer2": RowLayout("prompt response helpfulness", answers.rated_alone, _PROMPT, groups=True),
    "helpsteer2_preference": RowLayout(
        "prompt response_1 response_2 preference_strength",
        answers.strength_of("response_1", "response_2", "preference_strength"),
        _PROMPT,
    ),
    "helpsteer3": RowLayout(
        "context response1 response2 overall_preference",
        answers.strength_of("response1", "response2", "overall_preference"),
        ("context",),
    ),
    "arena": RowLayout("conversation_a conversation_b winner", answers.battle, ()),
    "arena_flags": RowLayout(
        "prompt response_a response_b winner_model_a winner_model_b winner_tie",
        answers.flagged,
        ("single prompt",),
    ),
    "sides": RowLayout(
        "response_a|answer_a|completion_a|output_1|response_1|response1|response_0 "
        "response_b|answer_b|completion_b|output_2|response_2|response2|response_1 "
        "winner|preference|label|choice|preferred",
        answers.sides,
        ANY,
        "chosen rejected preference_strength better_response_id overall_preference",
    ),
    "shp": RowLayout("history human_ref_A human_ref_B labels", answers.shp, ("history",)),
    "safe_rlhf": RowLayout("prompt response_0 response_1 better_response_id", answers.safe_rlhf, _PROMPT),
}
"""By the names that `data.row_layout` takes."""


def find_layout(columns: Iterable[str], reading: RowReading = BY_COLUMNS) -> str:
    """The one layout that a row with these columns can have, the most particular where one includes another.

    Raises:
      MalformedRowError: when there is none, or several.
    """
    return _find_layout(frozenset(columns), reading)


@lru_cache(128)
def _find_layout(columns: frozenset[str], reading: RowReading) -> str:
    fitting = [name for name, layout in LAYOUTS.items() if layout.fits(columns)]
    needs = {name: _needed(LAYOUTS[name], columns) for name in fitting}
    found = [name for name in fitting if not any(needs[name] < needs[other] for other in fitting)]
    if len(found) == 1:
        return found[0]
    if not found:
        allowed = "; ".join(f"{name}: {layout.needs}" for name, layout in LAYOUTS.items() if name in _COMMON)
        detail = (
            f"no layout has the columns {show_names(columns)}; allowed are the columns of a layout "
            f"({allowed}; docs/data.md has all), or {reading.setting('columns')} to say which column is which"
        )
        raise MalformedRowError("(row)", "unknown_format", detail)
    detail = (
        f"the columns {show_names(columns)} fit the layouts {', '.join(found)}; allowed is to name one by "
        f"{reading.setting('layout')}"
    )
    raise MalformedRowError("(row)", "ambiguous_format", detail)


_COMMON = ("pair", "ranking", "completion", "sides")


def _needed(layout: RowLayout, columns: frozenset[str]) -> frozenset[str]:
    return frozenset(name for names in layout.needs.split() for name in names.split("|") if name in columns)
