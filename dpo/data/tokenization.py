"""From `Preference` to token ids: chat template, end tokens, truncation. The only place tokens are made.

    prompt     template(messages, and the opening of the assistant's turn)
    response   template(messages, and the assistant's message), what follows the prompt's ids

Both are rendered in full and tokenised in full; the first must be an exact prefix of the second, token by
token, else the row is dropped and counted (templates that rewrite earlier turns, merges over the border).
Where a prompt is a plain string and the tokenizer has a chat template, the string becomes the user's
message; where it has none, prompt and response are joined as they are, after the tokenizer's BOS token if
it puts one. Nothing here looks for the padding token: it may equal the end token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.data.messages import Message, answer_turns, as_turns
from dpo.data.preferences import Preference
from dpo.data.templates import TEMPLATE_DATE, Refusal, SandboxedTemplate
from dpo.data.tokenized import Notes, TokenizedDataset, TokenizedPart, flat_arrays, join_parts
from dpo.outcomes import UserError

Truncation = Literal["drop", "error", "truncate_prompt_left", "truncate_response_right"]
EndToken = Literal["template", "eos_only", "none"]


def tokenize(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    truncation: Truncation = "drop",
    end_token: EndToken = "template",
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
) -> TokenizedDataset:
    """Token ids of every preference whose prompt plus longest response fits `max_length` or is cut to it.

    `truncation`: "drop" leaves longer preferences out, "error" raises, "truncate_prompt_left" keeps the
    end of the prompt (the same for all responses), "truncate_response_right" keeps the start of each
    response (its end token goes first). `end_token`, what ends a scored response: "template" for all that
    the chat template puts after it, "eos_only" for the end token alone, "none" for nothing; without a
    template "template" is the tokenizer's EOS token. `chat_template` is the text of a jinja2 template
    that replaces the tokenizer's own, `template_date` the day that templates take for today. Raises
    `ValueError` when no preference is left.
    """
    _check_choice("truncation", truncation, Truncation)
    _check_choice("end_token", end_token, EndToken)
    part = tokenize_part(
        preferences,
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        end_token=end_token,
        chat_template=chat_template,
        template_date=template_date,
    )
    return join_parts([part])


def tokenize_part(
    preferences: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: Truncation,
    end_token: EndToken,
    chat_template: str | None,
    template_date: str,
) -> TokenizedPart:
    """`tokenize` for some of the preferences, before it is known whether any is left in all."""
    encoder = _make_encoder(tokenizer, end_token, chat_template, template_date)
    notes = Notes()
    kept: list[tuple[int, _Row]] = []
    too_long: list[str] = []
    for start in range(0, len(preferences), _CHUNK):
        chunk = preferences[start : start + _CHUNK]
        for offset, row in enumerate(_encode(chunk, encoder)):
            location = chunk[offset].location
            if isinstance(row, _Row) and _length(row) > max_length:
                too_long.append(f"{location}: {_length(row)} tokens")
                row = _shorten(row, max_length, truncation)
                notes.num_truncated += isinstance(row, _Row)
            if isinstance(row, _Row):
                kept.append((start + offset, row))
            else:
                notes.drop(*row, location)
    chosen = [preferences[index] for index, _ in kept]
    arrays = flat_arrays(
        [row.prompt for _, row in kept],
        [row.responses for _, row in kept],
        ranks=[preference.ranks for preference in chosen],
        scores=[preference.scores for preference in chosen],
    )
    policies = {"truncation": truncation, "max_length": max_length, "end_token": end_token}
    text = None if encoder.template is None else encoder.template.text
    return TokenizedPart(
        arrays,
        np.asarray([index for index, _ in kept], dtype=np.int64),
        len(preferences),
        dict(notes.counts),
        notes.first,
        notes.num_truncated,
        too_long,
        {"chat_template": text, **policies},
    )


def tokenize_prompts(
    prompts: Sequence[str | Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
) -> list[list[int]]:
    """Token ids of prompts up to where the response begins, as `tokenize` gives them.

    Raises:
      ValueError: for a conversation where there is no chat template, or one that the template refuses.
    """
    encoder = _make_encoder(tokenizer, "template", chat_template, template_date)
    alone = [
        Preference(given if isinstance(given, str) else tuple(given), (), (), None, "", f"prompt {number}")
        for number, given in enumerate(prompts, start=1)
    ]
    texts: list[str] = []
    for preference, rendered in zip(alone, _render(alone, encoder), strict=True):
        if isinstance(rendered, _Drop):
            raise UserError(f"{preference.location}: {rendered.detail}")
        texts += rendered
    return [encoder.bos + ids for ids in _ids(tokenizer, texts)]


def tokenize_answers(
    prompts: Sequence[str | Sequence[Message]],
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    template_date: str = TEMPLATE_DATE,
) -> list[list[int]]:
    """Token ids of prompts with one response each, the assistant's turn closed: what a reward model reads.

    Without a chat template that is BOS (where the tokenizer puts one), prompt and response as they are, EOS.

    Raises:
      ValueError: for a conversation where there is no chat template, or one that the template refuses.
    """
    encoder = _make_encoder(tokenizer, "template", chat_template, template_date)
    pairs = [
        Preference(
            given if isinstance(given, str) else tuple(given), (text,), (0,), None, "", f"prompt {number}"
        )
        for number, (given, text) in enumerate(zip(prompts, responses, strict=True), start=1)
    ]
    texts: list[str] = []
    for preference, rendered in zip(pairs, _render(pairs, encoder), strict=True):
        if isinstance(rendered, _Drop):
            raise UserError(f"{preference.location}: {rendered.detail}")
        texts.append(rendered[-1])
    return [encoder.bos + ids + encoder.ending for ids in _ids(tokenizer, texts)]


_CHUNK = 2048


class _Row(NamedTuple):
    """One preference in tokens."""

    prompt: list[int]
    responses: list[list[int]]


class _Drop(NamedTuple):
    """Why a preference is left out."""

    reason: str
    detail: str


# ---- text to ids ----


class _Encoder(NamedTuple):
    """How texts become ids, and what ends a response."""

    tokenizer: PreTrainedTokenizerBase
    template: SandboxedTemplate | None
    bos: list[int]
    """What precedes a raw text; a template brings its own."""
    trailer: list[int] | None
    """Ids that the template puts after a response and that are cut off; nothing is cut when None."""
    ending: list[int]
    """Ids put after a response, once its trailer is cut off."""


def _make_encoder(
    tokenizer: PreTrainedTokenizerBase, end_token: EndToken, chat_template: str | None, date: str
) -> _Encoder:
    if chat_template is None and tokenizer.chat_template is None:
        bos = _find_bos(tokenizer)
        ending = [] if end_token == "none" else [_eos_id(tokenizer)]
        return _Encoder(tokenizer, None, bos, None, ending)
    name = "the tokenizer's chat template" if chat_template is None else "data.chat_template"
    template = SandboxedTemplate(tokenizer.get_chat_template(chat_template), name=name, date=date)
    if end_token == "template":
        return _Encoder(tokenizer, template, [], None, [])
    trailer = _find_trailer(tokenizer, template)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    end = next((token for token in trailer if token in special), None)
    ending = [] if end_token == "none" else [_eos_id(tokenizer) if end is None else end]
    return _Encoder(tokenizer, template, [], trailer, ending)


def _encode(preferences: Sequence[Preference], encoder: _Encoder) -> Iterable[_Row | _Drop]:
    """Render and tokenise a chunk at once: every text only once, in one call of the tokenizer."""
    rendered = _render(preferences, encoder)
    texts = dict.fromkeys(text for texts in rendered if not isinstance(texts, _Drop) for text in texts)
    ids = dict(zip(texts, _ids(encoder.tokenizer, list(texts)), strict=True))
    for preference, texts in zip(preferences, rendered, strict=True):
        if _has_several_turns(preference):
            yield _Drop("several_turns", "a response has several turns; allowed is one")
        elif isinstance(texts, _Drop):
            yield texts
        else:
            yield _split([ids[text] for text in texts], encoder)


def _render(preferences: Sequence[Preference], encoder: _Encoder) -> list[list[str] | _Drop]:
    """Of each preference the text of the prompt, and of the prompt with each response."""
    if encoder.template is None:
        return [_join_raw(preference) for preference in preferences]
    conversations = [_conversations(preference) for preference in preferences]
    inputs = [
        _variables(encoder.tokenizer, messages, preference.context, open_turn=number == 0)
        for preference, mine in zip(preferences, conversations, strict=True)
        for number, messages in enumerate(mine)
    ]
    rendered = iter(encoder.template.render_all(inputs))
    return [_texts(list(islice(rendered, len(mine)))) for mine in conversations]


def _join_raw(preference: Preference) -> list[str] | _Drop:
    prompt, responses = preference.prompt, preference.responses
    if isinstance(prompt, str) and preference.context is None:
        texts = [response for response in responses if isinstance(response, str)]
        if len(texts) == len(responses):
            return [prompt, *(prompt + response for response in texts)]
    raise UserError(
        f"{preference.location}: the prompt is a conversation, or a response is, or there are "
        "tools, and the tokenizer has no chat template; "
        "allowed are prompts and responses as strings, or a chat template given by data.chat_template"
    )


def _conversations(preference: Preference) -> list[tuple[Message, ...]]:
    """The prompt alone, and the prompt with each response."""
    messages = as_turns(preference.prompt)
    return [messages, *((*messages, *answer_turns(response)) for response in preference.responses)]


def _variables(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    context: Mapping[str, Any] | None,
    *,
    open_turn: bool,
) -> dict[str, object]:
    """What a chat template sees, as in `tokenizer.apply_chat_template`."""
    context = context or {}
    return {
        "messages": [dict(message) for message in messages],
        "tools": context.get("tools"),
        "documents": context.get("documents"),
        "add_generation_prompt": open_turn,
        **tokenizer.special_tokens_map,
        **context.get("chat_template_kwargs", {}),
    }


def _has_several_turns(preference: Preference) -> bool:
    return any(len(answer_turns(response)) > 1 for response in preference.responses)


def _texts(rendered: Sequence[str | Refusal]) -> list[str] | _Drop:
    refusal = next((text for text in rendered if isinstance(text, Refusal)), None)
    if refusal is not None:
        return _Drop("template_error", f"the chat template refuses the conversation: {refusal.reason}")
    return [text for text in rendered if isinstance(text, str)]


def _split(ids: list[list[int]], encoder: _Encoder) -> _Row | _Drop:
    """Prompt and responses from the ids of the prompt and of the prompt with each response."""
    start = len(ids[0])
    if any(whole[:start] != ids[0] for whole in ids[1:]):
        return _Drop("prompt_not_prefix", "the prompt's tokens do not begin the prompt with its response")
    prompt, responses = encoder.bos + ids[0], [whole[start:] for whole in ids[1:]]
    if encoder.trailer is not None:
        cut = len(encoder.trailer)
        if any(response[len(response) - cut :] != encoder.trailer for response in responses):
            return _Drop("end_not_found", "the response does not end with what the template puts after it")
        responses = [response[: len(response) - cut] for response in responses]
    responses = [response + encoder.ending for response in responses]
    if not prompt or not all(responses):
        return _Drop("no_tokens", "the prompt or a response has no token")
    return _Row(prompt, responses)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _find_trailer(tokenizer: PreTrainedTokenizerBase, template: SandboxedTemplate) -> list[int]:
    """Ids of what the template puts after a response."""
    probe = "Zwölf Boxkämpfer jagen Viktor"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": probe}]
    text = template.render(_variables(tokenizer, messages, None, open_turn=False))
    if probe not in text:
        raise UserError("the chat template leaves out the assistant's message; end_token must be 'template'")
    return _ids(tokenizer, [text[text.rindex(probe) + len(probe) :]])[0]


def _find_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's BOS token if it begins every text with it."""
    with_special = tokenizer(["a"], add_special_tokens=True)["input_ids"][0]
    return [token for token in with_special[:1] if token == tokenizer.bos_token_id]


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError("the tokenizer has no EOS token to end a response; allowed end_token: 'none'")
    return tokenizer.eos_token_id


# ---- length ----


def _length(row: _Row) -> int:
    return len(row.prompt) + max(map(len, row.responses))


def _shorten(row: _Row, max_length: int, truncation: Truncation) -> _Row | _Drop:
    """The row cut to `max_length` by the policy; the prompt stays the same for all responses."""
    detail = f"{len(row.prompt)} + {max(map(len, row.responses))} tokens, allowed are {max_length}"
    if truncation == "truncate_prompt_left":
        room = max_length - max(map(len, row.responses))
        if room < 1:
            return _Drop("response_too_long", detail)
        return _Row(row.prompt[-room:], row.responses)
    if truncation == "truncate_response_right":
        room = max_length - len(row.prompt)
        if room < 1:
            return _Drop("prompt_too_long", detail)
        short = _Row(row.prompt, [response[:room] for response in row.responses])
        if len(set(map(tuple, short.responses))) == 1 < len(set(map(tuple, row.responses))):
            return _Drop("identical_after_truncation", detail)
        return short
    return _Drop("too_long", detail)


def _check_choice(name: str, value: str, choices: object) -> None:
    allowed = choices.__args__  # pyright: ignore[reportAttributeAccessIssue]
    if value not in allowed:
        raise UserError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
