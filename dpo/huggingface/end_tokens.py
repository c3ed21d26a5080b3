"""Tokens that end a response: which of a GGUF file's vocabulary do, as llama.cpp has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>"),
        *("<|flush|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "</s>"),
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
        "<｜end▁of▁sentence｜>",
    }
)
"""Texts of tokens after which nothing belongs to the response."""

_INFILL = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Metadata name → texts, where the metadata number none: what code models write between files."""


def gguf_end_tokens(tokens: Sequence[str], numbered: Mapping[str, int | None]) -> list[int]:
    """Ids of all tokens that end a response.

    `numbered` has the ids that the metadata give by name: eos, eot (of a turn), eom (of a message) and the
    three of infilling.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    ends = {ids[text] for text in END_TEXTS if text in ids}
    ends |= {found for name in ("eos", "eot", "eom") if (found := numbered.get(name)) is not None}
    for name, texts in _INFILL.items():
        given = numbered.get(name)
        spelled = [ids[text] for text in texts if text in ids]
        ends |= set(spelled[:1] if given is None else [given])
    return sorted(ends - _not_ends({tokens[end] for end in ends}, ids))


def _not_ends(texts: set[str], ids: Mapping[str, int]) -> set[int]:
    """What only looks like an end: <|end|> beside <|return|> and <|call|>; </s> in some vocabularies."""
    found = set()
    calls = "<|call|>" in texts or "<|calls|>" in texts
    if "<|end|>" in texts and calls and ("<|return|>" in texts or "<|flush|>" in texts):
        found.add(ids["<|end|>"])
    if "</s>" in texts and texts & {"<|tool_response>", "<|plamo:eos|>"}:
        found.add(ids["</s>"])
    return found
