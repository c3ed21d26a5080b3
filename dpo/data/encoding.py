"""One preference in tokens: texts as a template writes them, their ids, and which of these are scored.

The prompt's ids are those that it shares with itself followed by each response: all of them as a rule, fewer
where a template opens the turn otherwise than it writes it (a block of reasoning) or where a token reaches
over the border (a space). What is scored are the tokens of the assistant's turns in the response
(`dpo.data.turns`); where a prompt shares all its ids and a response is one turn, that is everything after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpo.data.chat_template import ChatInput, ChatTemplate
from dpo.data.left_out import (
    MUST_SHOW,
    Conversations,
    Field,
    find_left_out,
    find_rewritten,
    find_unwritten,
    has_fields,
    is_as_it_stands,
)
from dpo.data.messages import answer_turns, as_turns
from dpo.data.preferences import Preference
from dpo.data.templates import LIMITS, Marked, Refusal
from dpo.data.tokenizer_calls import encode_texts, encode_with_special, token_places
from dpo.data.turns import Span, TurnsNotFoundError, Written, common_start, scored_spans
from dpo.outcomes import UserError

EndToken = Literal["template", "eos_only", "none"]


class Row(NamedTuple):
    """One preference in tokens."""

    prompt: list[int]
    responses: list[list[int]]
    scored: list[list[bool]] | None = None
    """Which tokens of each response are scored; all where None."""
    remarks: tuple[str, ...] = ()
    """What is to be said of it once, with the number of such rows."""


class Drop(NamedTuple):
    """Why a preference is left out."""

    reason: str
    detail: str


# ---- text to ids ----


class Encoder(NamedTuple):
    """How texts become ids, and what ends a response."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    bos: list[int]
    """What precedes a raw text; a template brings its own."""
    trailer: list[int] | None
    """Ids that the template puts after a response and that are cut off; nothing is cut when None."""
    ending: list[int]
    """Ids put after a response, once its trailer is cut off."""


def make_encoder(
    tokenizer: PreTrainedTokenizerBase,
    end_token: EndToken,
    chat_template: str | None,
    date: str,
    arguments: Mapping[str, Any] | None,
    characters: int = LIMITS.characters,
) -> Encoder:
    if chat_template is None and tokenizer.chat_template is None:
        bos = _find_bos(tokenizer)
        ending = [] if end_token == "none" else [_eos_id(tokenizer)]
        return Encoder(tokenizer, None, bos, None, ending)
    name = "the tokenizer's chat template" if chat_template is None else "data.chat_template"
    text, with_tools = _template_texts(tokenizer, chat_template)
    how: dict[str, Any] = {"name": name, "date": date, "arguments": arguments or {}, "with_tools": with_tools}
    template = ChatTemplate(tokenizer, text, **how, characters=characters)
    if end_token == "template":
        return Encoder(tokenizer, template, [], None, [])
    trailer = encode_texts(tokenizer, [template.find_trailer()])[0]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    end = next((token for token in trailer if token in special), None)
    ending = [] if end_token == "none" else [_eos_id(tokenizer) if end is None else end]
    return Encoder(tokenizer, template, [], trailer, ending)


def _template_texts(tokenizer: PreTrainedTokenizerBase, given: str | None) -> tuple[str, str | None]:
    """The chat template, and the one for rows with tools where a tokenizer has several by name."""
    own = tokenizer.chat_template
    if given is not None or not isinstance(own, dict):
        return tokenizer.get_chat_template(given), None
    if "default" not in own:
        named = ", ".join(sorted(own))
        raise UserError(
            f"the tokenizer has the chat templates {named} and none named default; allowed is one of them in "
            "a file that data.chat_template names"
        )
    return own["default"], own.get("tool_use")


def encode(preferences: Sequence[Preference], encoder: Encoder) -> Iterator[Row | Drop]:
    """Render and tokenise a chunk at once: every text only once, in one call of the tokenizer."""
    written, remarks = _note_left_out(preferences, write(preferences, encoder), encoder)
    texts = dict.fromkeys(one.text for mine in written if not isinstance(mine, Drop) for one in mine)
    ids = dict(zip(texts, encode_texts(encoder.tokenizer, list(texts)), strict=True))
    spans = [
        mine if isinstance(mine, Drop) else _find_spans(preference, mine, ids, encoder)
        for preference, mine in zip(preferences, written, strict=True)
    ]
    places = _places(encoder.tokenizer, written, spans)
    for mine, found, said in zip(written, spans, remarks, strict=True):
        if isinstance(mine, Drop):
            yield mine
            continue
        if isinstance(found, Drop):
            yield found
            continue
        row = _split(mine, ids, found, places, encoder)
        yield row._replace(remarks=(*row.remarks, *said)) if isinstance(row, Row) else row


_Written = list[Marked]
"""The text of the prompt, and of the prompt with each response."""
_Spans = list[list[Span]] | None
"""Of each response the places that are scored; None where that is all that follows the prompt."""


def write(preferences: Sequence[Preference], encoder: Encoder) -> list[_Written | Drop]:
    if encoder.template is None:
        return [_join_raw(preference) for preference in preferences]
    inputs = [_inputs(preference) for preference in preferences]
    found = iter(encoder.template.write([given for mine in inputs for given in mine]))
    return [_texts([next(found) for _ in mine], mine) for mine in inputs]


def _inputs(preference: Preference) -> list[ChatInput]:
    """The prompt alone, and the prompt with each response."""
    prompt, context = as_turns(preference.prompt), preference.context
    wholes = ((*prompt, *answer_turns(response)) for response in preference.responses)
    return [ChatInput(prompt, context, open_turn=True), *(ChatInput(whole, context) for whole in wholes)]


def _join_raw(preference: Preference) -> _Written | Drop:
    prompt, responses = preference.prompt, preference.responses
    if isinstance(prompt, str) and preference.context is None:
        texts = [response for response in responses if isinstance(response, str)]
        if len(texts) == len(responses):
            return [Marked(prompt, []), *(Marked(prompt + response, []) for response in texts)]
    raise UserError(
        f"{preference.location}: the prompt is a conversation, or a response is, or there are tools, and the "
        "tokenizer has no chat template; allowed are prompts and responses as strings, or a chat template "
        "given by data.chat_template"
    )


def _texts(written: Sequence[Marked | Refusal], given: Sequence[ChatInput]) -> _Written | Drop:
    refusal = next((one for one in written if isinstance(one, Refusal)), None)
    if refusal is None:
        return [one for one in written if isinstance(one, Marked)]
    is_null = any(turn.get("content") is None for one in given for turn in one.messages)
    null = " (a message has no content, which this template reads)" if is_null else ""
    said = f"the chat template refuses the conversation: {refusal.reason}{null}"
    return Drop("template_error", f"{said}; another can be given by data.chat_template")


def _find_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's BOS token if it begins every text with it."""
    with_special = encode_with_special(tokenizer, "a")
    return [token for token in with_special[:1] if token == tokenizer.bos_token_id]


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError("the tokenizer has no EOS token to end a response; allowed end_token: 'none'")
    return tokenizer.eos_token_id


# ---- what the template does not read ----


def _note_left_out(
    preferences: Sequence[Preference], written: Sequence[_Written | Drop], encoder: Encoder
) -> tuple[list[_Written | Drop], list[list[str]]]:
    """Drop what would be another thing than its row, and remark what else of the rows is not shown."""
    kept, remarks = list(written), [[] for _ in written]
    if encoder.template is None:
        return kept, remarks
    rows: list[int] = []
    conversations: list[Conversations] = []
    for number, (preference, mine) in enumerate(zip(preferences, written, strict=True)):
        if isinstance(mine, Drop):
            continue
        prompt, answers = as_turns(preference.prompt), list(map(answer_turns, preference.responses))
        texts = [one.text for one in mine[1:]]
        one = Conversations(prompt, answers, preference.context, mine[0].text, texts)
        stands = is_as_it_stands(one)
        if not stands:
            remarks[number] += [
                f"the chat template leaves out part of {part}" for part in find_rewritten(one)
            ]
        if not stands or has_fields(prompt, answers, preference.context):
            rows.append(number)
            conversations.append(one)
    fields = find_left_out(conversations, encoder.template)
    unwritten = find_unwritten(conversations, encoder.template)
    for number, found, contents in zip(rows, fields, unwritten, strict=True):
        remarks[number] += [f"the chat template leaves out {field}" for field in (*found, *contents)]
        missing = next((field for field in found if field.name in MUST_SHOW), None)
        kept[number] = kept[number] if missing is None else _not_shown(missing)
    return kept, remarks


def _not_shown(field: Field) -> Drop:
    help_ = f"data.ignore_columns [{field.name}]" if field.place == "row" else "other rows"
    return Drop(
        f"{field.name}_not_shown",
        f"the chat template writes the same without {field}; allowed: a template that shows them, by "
        f"data.chat_template, or {help_}",
    )


# ---- prompt and responses ----


def _find_spans(
    preference: Preference, written: _Written, ids: Mapping[str, list[int]], encoder: Encoder
) -> _Spans | Drop:
    opened, wholes = written[0], written[1:]
    start = len(ids[opened.text])
    continues = all(ids[whole.text][:start] == ids[opened.text] for whole in wholes)
    answers = list(map(answer_turns, preference.responses))
    template = encoder.template
    if (
        continues
        and all(len(turns) == 1 for turns in answers)
        and not (template and template.of(preference.context).has_marks)
    ):
        return None
    if template is None:
        return [[(len(opened.text), len(whole.text))] for whole in wholes]
    prompt = as_turns(preference.prompt)
    try:
        return [
            scored_spans(Written(prompt, turns, preference.context, opened, whole), template)
            for turns, whole in zip(answers, wholes, strict=True)
        ]
    except TurnsNotFoundError as error:
        reason = "turns_not_found" if continues else "prompt_not_prefix"
        return Drop(reason, f"{error}; {_difference(opened.text, wholes)}")


def _difference(opened: str, wholes: Sequence[Marked]) -> str:
    """Where the prompt alone and the prompt with its response part, and what may help."""
    at = min(common_start(opened, whole.text) for whole in wholes)
    other = next(whole.text for whole in wholes if common_start(opened, whole.text) == at)
    return (
        f"from character {at} the prompt alone has {opened[at : at + 30]!r}, with its response "
        f"{other[at : at + 30]!r}; data.template_kwargs (such as {{enable_thinking: false}}) or "
        "data.chat_template may help"
    )


_Places = dict[str, list[tuple[int, int]]]
"""Of a text, the characters of each token."""


def _places(
    tokenizer: PreTrainedTokenizerBase,
    written: Sequence[_Written | Drop],
    spans: Sequence[_Spans | Drop],
) -> _Places:
    """The characters of tokens, for texts of which places are scored."""
    needed = [
        one.text
        for mine, found in zip(written, spans, strict=True)
        if not isinstance(mine, Drop) and isinstance(found, list)
        for one in mine[1:]
    ]
    texts = list(dict.fromkeys(needed))
    if not texts:
        return {}
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer does not say which characters a token has, which responses of several turns and "
            "templates with {% generation %} need; allowed is a tokenizer with a tokenizer.json"
        )
    return dict(zip(texts, token_places(tokenizer, texts), strict=True))


def _split(
    written: _Written,
    ids: Mapping[str, list[int]],
    spans: _Spans,
    places: _Places,
    encoder: Encoder,
) -> Row | Drop:
    """Prompt and responses from the ids of the prompt and of the prompt with each response."""
    opened, wholes = ids[written[0].text], [ids[whole.text] for whole in written[1:]]
    if spans is None:
        row = Row(opened, [whole[len(opened) :] for whole in wholes])
    else:
        texts = [whole.text for whole in written[1:]]
        flags = [
            _flag(places[text], mine, whole, encoder)
            for text, mine, whole in zip(texts, spans, wholes, strict=True)
        ]
        if not all(map(any, flags)):
            return Drop("no_tokens", "no token of a response is scored")
        start = min(_shared(opened, wholes), *(mine.index(True) for mine in flags))
        scored = [mine[start:] for mine in flags]
        remarks = () if start == len(opened) else (_remark(written, encoder),)
        row = Row(opened[:start], [whole[start:] for whole in wholes], scored, remarks)
    ended = _end(row, encoder)
    if isinstance(ended, Row) and all(all(mine) for mine in ended.scored or ()):
        ended = ended._replace(scored=None)
    return ended


def _flag(
    places: Sequence[tuple[int, int]], spans: Sequence[Span], ids: list[int], encoder: Encoder
) -> list[bool]:
    """Which tokens have a character of a span; of what ends a turn, as much as `end_token` says."""
    flags = [False] * len(places)
    for start, end in spans:
        inside = [i for i, (first, last) in enumerate(places) if first < end and last > start]
        if not inside:
            continue
        stop = inside[-1] + 1
        if encoder.trailer is not None and stop < len(ids):
            stop = _turn_end(ids, stop, encoder.trailer, encoder.ending)
        flags[inside[0] : stop] = [True] * (stop - inside[0])
    return flags


def _turn_end(ids: list[int], stop: int, trailer: list[int], ending: list[int]) -> int:
    """Where the scored tokens of a turn end that is not the last."""
    first = stop - len(trailer)
    if ids[first:stop] != trailer:
        return stop
    return first + next((i + 1 for i, token in enumerate(trailer) if [token] == ending), 0)


def _shared(opened: list[int], wholes: Sequence[list[int]]) -> int:
    """How many tokens the prompt and all responses begin with together."""
    shared = min(len(opened), *map(len, wholes))
    for whole in wholes:
        shared = next((i for i in range(shared) if whole[i] != opened[i]), shared)
    return shared


def _remark(written: _Written, encoder: Encoder) -> str:
    opened = written[0].text
    at = min(common_start(opened, whole.text) for whole in written[1:])
    if at == len(opened):
        what = "a space" if opened.endswith(" ") else "a token that reaches over its end"
        return f"{what} at the end of the prompt belongs to the responses"
    assert encoder.template is not None
    return (
        f"the chat template opens the assistant's turn by {opened[at : at + 30]!r}, with which its written "
        "turns do not begin: prompts end before that (data.template_kwargs may say otherwise)"
    )


def _end(row: Row, encoder: Encoder) -> Row | Drop:
    """The row with its responses ended as `end_token` says, or why it is left out."""
    responses, scored = row.responses, row.scored
    if encoder.trailer is not None:
        cut = len(encoder.trailer)
        if any(response[len(response) - cut :] != encoder.trailer for response in responses):
            return Drop("end_not_found", "the response does not end with what the template puts after it")
        responses = [response[: len(response) - cut] for response in responses]
        scored = scored and [mine[: len(mine) - cut] for mine in scored]
    responses = [response + encoder.ending for response in responses]
    scored = scored and [mine + [True] * len(encoder.ending) for mine in scored]
    prompt = encoder.bos + row.prompt
    if not prompt or not all(responses) or not all(map(any, scored or ())):
        return Drop("no_tokens", "the prompt or a response has no token")
    if len(responses) > 1 and all(response == responses[0] for response in responses):
        return Drop(
            "identical_responses",
            "all responses are the same, as they are written for the model: they teach nothing",
        )
    return row._replace(prompt=prompt, responses=responses, scored=scored)
