"""The layouts of rows that preference data have, one record each; `LAYOUTS` is the table.

A layout says which columns identify it, where the prompt stands, and how the rest is read: responses, and
ranks (1 is best) or scores. What is common to all is done for all: a system text in a column of its own,
tools, documents and template arguments, and messages in all their forms (`dpo.data.messages`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from dpo.data.choices import by_flags, by_index, by_side, by_strength, is_desirable
from dpo.data.columns import Columns
from dpo.data.conversations import read_prompt_column
from dpo.data.messages import Prompt, as_turns
from dpo.data.sources import MalformedRowError
from dpo.data.values import (
    as_object,
    finite,
    is_empty,
    read_list,
    read_numbers,
    read_objects,
    read_score,
    read_scores,
    read_text,
    show_names,
)

Numbers = Sequence[int | float]
Scores = Numbers | None


# ---- prompts ----

FoundPrompt = tuple[Prompt, bool]
"""A prompt, and whether the responses beside it have white space of HH's style around them."""


def _column(name: str) -> Callable[[Columns], FoundPrompt | None]:
    return lambda row: read_prompt_column(row[name], name)


def _whole(name: str) -> Callable[[Columns], FoundPrompt | None]:
    """Of a column that in some data sets is the prompt, in others the prompt with its best response."""

    def read(row: Columns) -> FoundPrompt | None:
        found = read_prompt_column(row[name], name)
        return None if as_turns(found[0])[-1]["role"] == "assistant" else found

    return read


def _single(row: Columns) -> FoundPrompt | None:
    """A prompt that is not a list of what was asked turn by turn."""
    return None if _is_list_text(row["prompt"]) else read_prompt_column(row["prompt"], "prompt")


def _instruction(row: Columns) -> FoundPrompt | None:
    """Alpaca's: an instruction, what it is about, and earlier turns."""
    text = read_text(row["instruction"], "instruction")
    if not is_empty(row.get("input")):
        text = f"{text}\n{read_text(row['input'], 'input')}"
    earlier = row.get("history")
    if is_empty(earlier):
        return read_prompt_column(text, "instruction")
    turns: list[dict[str, str]] = []
    for i, pair in enumerate(read_list(earlier, "history")):
        asked, answered = _two(pair, f"history[{i}]")
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return read_prompt_column([*turns, {"role": "user", "content": text}], "instruction")


def _two(value: Any, field: str) -> Sequence[Any]:
    items = read_list(value, field, least=2)
    if len(items) != 2:
        raise MalformedRowError(field, "length_mismatch", f"found {len(items)}; allowed are two")
    return items


def _input(row: Columns) -> FoundPrompt | None:
    """OpenAI's `{"messages": [...], "tools": [...]}`, or a text."""
    given = as_object(row["input"], "input")
    if given is not None and "messages" in given:
        return read_prompt_column(given["messages"], "input.messages")
    return read_prompt_column(row["input"], "input")


PROMPTS: dict[str, Callable[[Columns], FoundPrompt | None]] = {
    "prompt": _column("prompt"),
    "single prompt": _single,
    "question": _column("question"),
    "instruction": _instruction,
    "query": _column("query"),
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
        column = name.removeprefix("single ")
        if (
            column in row
            and (column == "prompt" or not is_empty(row[column]))
            and (found := PROMPTS[name](row))
        ):
            return found
    return None


# ---- responses ----


class Answers(NamedTuple):
    """What a row says of its responses."""

    responses: dict[str, Any]
    """By the field that each stands in, for errors."""
    ranks: Numbers
    """Smaller is better, equal is a tie. Of one response alone: 0 is desirable, 1 undesirable."""
    scores: Scores = None
    """Higher is better, NaN where there is none."""


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


_PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
    ("rating_chosen", "rating_rejected"),
)


def _pair_of(best: str, worst: str) -> Callable[[Columns], Answers]:
    def read(row: Columns) -> Answers:
        return Answers({best: row[best], worst: row[worst]}, (1, 2), _pair_scores(row))

    return read


def _pair_scores(row: Columns) -> Scores:
    found = next((names for names in _PAIR_SCORES if all(name in row for name in names)), None)
    scores = None if found is None else [read_score(row[name], name) for name in found]
    return None if scores is None or all(map(math.isnan, scores)) else scores


def _two_outputs(row: Columns) -> Answers:
    best, worst = _two(row["output"], "output")
    return Answers({"output[0]": best, "output[1]": worst}, (1, 2))


def _ranking(row: Columns) -> Answers:
    given = read_list(row["responses"], "responses", least=2)
    if "ranks" not in row and "scores" not in row:
        raise MalformedRowError("ranks", "missing_field", "a ranking needs 'ranks' (1 is best) or 'scores'")
    responses = {f"responses[{k}]": value for k, value in enumerate(given)}
    if "ranks" in row:
        scores = read_scores(row["scores"], "scores", len(given)) if "scores" in row else None
        return Answers(responses, read_numbers(row["ranks"], "ranks", len(given)), scores)
    return _by_scores(responses, read_numbers(row["scores"], "scores", len(given)))


def _by_scores(responses: dict[str, Any], scores: Numbers) -> Answers:
    return Answers(responses, [-score for score in scores], scores)


def _generations(row: Columns) -> Answers:
    name = row.find("ratings", "rating", "scores")
    assert name is not None
    given = read_list(row["generations"], "generations", least=2)
    scores = read_numbers(row[name], name, len(given))
    return _by_scores({f"generations[{k}]": value for k, value in enumerate(given)}, scores)


_ULTRAFEEDBACK_SCORES = ("overall_score", "fine-grained_score")
_ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def _completions(row: Columns) -> Answers:
    """UltraFeedback's: the overall score of each completion, or the mean of its ratings by aspect."""
    items = [row.item(item) for item in read_objects(row["completions"], "completions", least=2)]
    responses, scores = {}, []
    for k, item in enumerate(items):
        field = f"completions[{k}]"
        responses[f"{field}.response"] = item.get("response")
        name = next((name for name in _ULTRAFEEDBACK_SCORES if item.get(name) is not None), None)
        scores.append(_mean_rating(item, field) if name is None else finite(item[name], f"{field}.{name}"))
    return _by_scores(responses, scores)


def _mean_rating(item: Mapping[str, Any], field: str) -> float:
    ratings = item.get("annotations")
    ratings = ratings if isinstance(ratings, Mapping) else {}
    found = [
        finite(rating.get("Rating"), f"{field}.annotations.{aspect}.Rating")
        for aspect in _ASPECTS
        if isinstance(rating := ratings.get(aspect), Mapping)
    ]
    if not found:
        detail = (
            f"has none of {', '.join(_ULTRAFEEDBACK_SCORES)}, annotations.*.Rating; allowed is one of them"
        )
        raise MalformedRowError(field, "missing_field", detail)
    return sum(found) / len(found)


def _ranked_answers(row: Columns) -> Answers:
    items = [row.item(item) for item in read_objects(row["answers"], "answers", least=2)]
    responses = {f"answers[{k}].answer": item.get("answer") for k, item in enumerate(items)}
    return Answers(
        responses, [finite(item.get("rank"), f"answers[{k}].rank") for k, item in enumerate(items)]
    )


def _labelled(response: str, label: str) -> Callable[[Columns], Answers]:
    def read(row: Columns) -> Answers:
        desirable = is_desirable(row[label], label)
        return Answers({response: row[response]}, (0 if desirable else 1,))

    return read


def _rated_alone(row: Columns) -> Answers:
    return Answers({"response": row["response"]}, (0,), (finite(row["helpfulness"], "helpfulness"),))


def _strength(first: str, second: str, strength: str) -> Callable[[Columns], Answers]:
    def read(row: Columns) -> Answers:
        return Answers({n: row[n] for n in (first, second)}, by_strength(row[strength], strength))

    return read


def _safe_rlhf(row: Columns) -> Answers:
    ranks = by_index(row["better_response_id"], "better_response_id", first=0)
    return Answers({name: row[name] for name in ("response_0", "response_1")}, ranks)


def _shp(row: Columns) -> Answers:
    names = ("human_ref_A", "human_ref_B")
    scores = [read_score(row.get(name), name) for name in ("score_A", "score_B")]
    return Answers({n: row[n] for n in names}, by_index(row["labels"], "labels", first=1), scores)


_SIDES = (
    ("conversation_a", "conversation_b"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("output_1", "output_2"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_0", "response_1"),
)
_VERDICTS = ("winner", "preference", "label", "choice", "preferred")


def _sides(row: Columns) -> Answers:
    names = next((names for names in _SIDES if all(name in row for name in names)), None)
    verdict = row.find(*_VERDICTS)
    if names is None or verdict is None:
        detail = (
            f"found {show_names(row)}; allowed are two of one kind: {' | '.join(map(' + '.join, _SIDES))}"
        )
        raise MalformedRowError("(row)", "missing_field", detail)
    return Answers({name: row[name] for name in names}, by_side(row[verdict], verdict, names))


def _flagged(row: Columns) -> Answers:
    flags = ("winner_model_a", "winner_model_b", "winner_tie")
    ranks = by_flags({name: row[name] for name in flags})
    if not _is_list_text(row["prompt"]):
        return Answers({name: row[name] for name in ("response_a", "response_b")}, ranks)
    asked = read_list(row["prompt"], "prompt")
    return Answers(
        {name: _interleave(asked, row[name], name) for name in ("response_a", "response_b")}, ranks
    )


def _is_list_text(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith('["'))


def _interleave(asked: Sequence[Any], answered: Any, field: str) -> list[dict[str, Any]]:
    """One side of a battle of several turns: what was asked and answered, in turn."""
    answers = read_list(answered, field)
    if len(answers) != len(asked):
        detail = f"{len(answers)} answers to {len(asked)} prompts; allowed is one each"
        raise MalformedRowError(field, "length_mismatch", detail)
    pairs = zip(asked, answers, strict=True)
    return [turn for question, answer in pairs for turn in _exchange(question, answer)]


def _exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_CHOSEN = _pair_of("chosen", "rejected")
_PROMPT = ("prompt",)

LAYOUTS: dict[str, RowLayout] = {
    "pair": RowLayout("chosen rejected", _CHOSEN),
    "orca": RowLayout("question chosen rejected", _CHOSEN, ("question",), "prompt"),
    "alpaca": RowLayout("instruction chosen rejected", _CHOSEN, ("instruction",), "prompt"),
    "alpaca_outputs": RowLayout(
        "instruction output",
        _two_outputs,
        ("instruction",),
        "prompt kto_tag label chosen completions generations",
    ),
    "alpaca_kto": RowLayout("instruction output kto_tag", _labelled("output", "kto_tag"), ("instruction",)),
    "sharegpt": RowLayout("conversations chosen rejected", _CHOSEN, ("conversations",), "prompt"),
    "sharegpt_kto": RowLayout("conversations kto_tag", _labelled("conversations", "kto_tag"), ()),
    "openai": RowLayout(
        "input preferred_output non_preferred_output",
        _pair_of("preferred_output", "non_preferred_output"),
        ("input",),
    ),
    "argilla": RowLayout(
        "chosen_response rejected_response",
        _pair_of("chosen_response", "rejected_response"),
        ANY,
        "chosen rejected",
    ),
    "ranking": RowLayout("responses", _ranking),
    "distilabel": RowLayout("generations ratings|rating|scores", _generations, ANY, "chosen rejected"),
    "ultrafeedback": RowLayout("instruction completions", _completions, ("instruction",)),
    "nectar": RowLayout("prompt answers", _ranked_answers, _PROMPT),
    "completion": RowLayout("completion label", _labelled("completion", "label")),
    "messages_label": RowLayout(
        "messages label", _labelled("messages", "label"), (), "completion response_a answer_a output_1"
    ),
    "helpsteer2": RowLayout("prompt response helpfulness", _rated_alone, _PROMPT, groups=True),
    "helpsteer2_preference": RowLayout(
        "prompt response_1 response_2 preference_strength",
        _strength("response_1", "response_2", "preference_strength"),
        _PROMPT,
    ),
    "helpsteer3": RowLayout(
        "context response1 response2 overall_preference",
        _strength("response1", "response2", "overall_preference"),
        ("context",),
    ),
    "arena": RowLayout("conversation_a conversation_b winner", _sides, ()),
    "arena_flags": RowLayout(
        "prompt response_a response_b winner_model_a winner_model_b winner_tie", _flagged, ("single prompt",)
    ),
    "sides": RowLayout(
        "response_a|answer_a|completion_a|output_1|response_1|response1|response_0 "
        "response_b|answer_b|completion_b|output_2|response_2|response2|response_1 "
        "winner|preference|label|choice|preferred",
        _sides,
        ANY,
        "chosen rejected preference_strength better_response_id overall_preference",
    ),
    "shp": RowLayout("history human_ref_A human_ref_B labels", _shp, ("history",)),
    "safe_rlhf": RowLayout("prompt response_0 response_1 better_response_id", _safe_rlhf, _PROMPT),
}
"""By the names that `data.row_layout` takes."""


def find_layout(columns: Sequence[str]) -> str:
    """The one layout that a row with these columns can have, the most particular where one includes another.

    Raises:
      MalformedRowError: when there is none, or several.
    """
    return _find_layout(frozenset(columns))


@cache
def _find_layout(columns: frozenset[str]) -> str:
    fitting = [name for name, layout in LAYOUTS.items() if layout.fits(columns)]
    needs = {name: _needed(LAYOUTS[name], columns) for name in fitting}
    found = [name for name in fitting if not any(needs[name] < needs[other] for other in fitting)]
    if len(found) == 1:
        return found[0]
    if not found:
        allowed = "; ".join(f"{name}: {layout.needs}" for name, layout in LAYOUTS.items() if name in _COMMON)
        detail = (
            f"no layout has the columns {show_names(columns)}; allowed are the columns of a layout "
            f"({allowed}; docs/data.md has all), or data.columns to say which column is which"
        )
        raise MalformedRowError("(row)", "unknown_format", detail)
    detail = (
        f"the columns {show_names(columns)} fit the layouts {', '.join(found)}; allowed is to name one by "
        "data.row_layout"
    )
    raise MalformedRowError("(row)", "ambiguous_format", detail)


_COMMON = ("pair", "ranking", "completion", "sides")


def _needed(layout: RowLayout, columns: frozenset[str]) -> frozenset[str]:
    return frozenset(name for names in layout.needs.split() for name in names.split("|") if name in columns)
