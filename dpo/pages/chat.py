"""Responses on the terminal, a piece at a time: one prompt, or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpo.data.messages import Message
from dpo.data.templates import LIMITS
from dpo.data.tokenization import tokenize_prompts
from dpo.data.tokenizer_calls import decode_ids
from dpo.huggingface.pretrained import Pretrained, stop_tokens
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import stream
from dpo.models.vocabulary import require_known

_PARTIAL = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer decodes a character of which only some bytes are there."""


def respond(
    pretrained: Pretrained,
    prompt: str | Sequence[Message],
    *,
    sampling: SamplingConfig,
    seed: int,
    template_kwargs: Mapping[str, Any] | None = None,
    template_characters: int = LIMITS.characters,
    on_cut: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """The response in pieces of whole characters, each as soon as it is drawn.

    `on_cut` is called at its end where it was cut off, at the largest number of new tokens.
    """
    tokenizer, stop = pretrained.tokenizer, stop_tokens(pretrained)
    (ids,) = tokenize_prompts(
        [prompt], tokenizer, template_kwargs=template_kwargs, template_characters=template_characters
    )
    require_known([ids], pretrained.model.config, source=pretrained.source)
    drawn: list[int] = []
    shown = ""
    for token in stream(pretrained.model, ids, sampling=sampling, seed=seed, stop_tokens=stop):
        drawn.append(token)
        text = decode_ids(tokenizer, drawn, skip_special_tokens=True)
        if text.startswith(shown) and not text.endswith(_PARTIAL):
            yield text[len(shown) :]
            shown = text
    rest = decode_ids(tokenizer, drawn, skip_special_tokens=True)
    if len(rest) > len(shown) and rest.startswith(shown):
        yield rest[len(shown) :]
    if drawn[-1] not in stop:
        on_cut()


def converse(
    pretrained: Pretrained,
    *,
    system: str | None,
    sampling: SamplingConfig,
    seed: int,
    read: Callable[[], str],
    write: Callable[[str], None],
    template_kwargs: Mapping[str, Any] | None = None,
    template_characters: int = LIMITS.characters,
    on_cut: Callable[[], None] = lambda: None,
) -> None:
    """Answer line after line, each with all before it, until `read` raises EOFError.

    The first turn is drawn with `seed`, each later one with a seed of its own. Empty lines are passed over.
    """
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    turn = 0
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        for piece in respond(
            pretrained,
            messages,
            sampling=sampling,
            seed=_seed_of(seed, turn),
            template_kwargs=template_kwargs,
            template_characters=template_characters,
            on_cut=on_cut,
        ):
            pieces.append(piece)
            write(piece)
        write("\n")
        messages.append({"role": "assistant", "content": "".join(pieces).strip()})
        turn += 1


def _seed_of(seed: int, turn: int) -> int:
    """With seed + turn, the second turn of one seed were the first of the next."""
    if turn == 0:
        return seed
    return int(np.random.SeedSequence([seed % 2**64, turn]).generate_state(1)[0])
