"""How many preferences of a data set remain, why the others do not, and what may be done about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from dpo.data.mixing import NOT_DRAWN
from dpo.data.preferences import TIED_PAIR, ReadSummary
from dpo.data.tokenized import TokenizedDataset

MANY = 0.05
"""Part of the preferences from which on it is a warning that they are left out."""

_SETTINGS = {
    "too_long": "data.max_length or data.truncation",
    "too_long_to_cut": "data.max_length",
    "response_too_long": "data.max_length",
    "prompt_too_long": "data.max_length",
    "template_error": "data.chat_template",
    "prompt_not_prefix": "data.template_kwargs or data.chat_template",
    "turns_not_found": "data.chat_template",
    "end_not_found": "data.end_token",
    "tool_calls_not_shown": "data.chat_template",
    "function_call_not_shown": "data.chat_template",
    "function_calls_not_shown": "data.chat_template",
    "functions_not_shown": "data.chat_template",
    "tools_not_shown": "data.chat_template or data.ignore_columns",
    "documents_not_shown": "data.chat_template or data.ignore_columns",
    TIED_PAIR: "data.expand",
    "unused_meaning": "data.columns or data.ignore_columns",
    "unknown_format": "data.columns or data.row_layout",
    "ambiguous_format": "data.row_layout",
}
"""What changes how many are left out for a reason; rows of other reasons are to be corrected."""
_ON_PURPOSE = ("no_pair", NOT_DRAWN)


def left_out(read: ReadSummary, tokens: TokenizedDataset) -> dict[str, int]:
    """How many preferences are left out, by reason, the most frequent first."""
    reasons = Counter(read.skipped) + Counter(tokens.dropped)
    return dict(reasons.most_common())


def drawn_or_not(left_out: Mapping[str, int]) -> str:
    """What is said behind a count that is of all rows of a mixture's sources, where some are not drawn."""
    return ", drawn or not" if NOT_DRAWN in left_out else ""


def remarks(read: ReadSummary, tokens: TokenizedDataset) -> list[str]:
    """What is to be said of the data once: columns not used, what templates leave out or write otherwise."""
    whole = sum(read.layouts.values())
    unused = [
        f"{name if name.strip() else repr(name)}{f' ({count} of {whole} rows)' if count < whole else ''}"
        for name, count in read.unused.items()
    ]
    said = [f"not used: {', '.join(unused)}"] if unused else []
    of = f"{len(tokens) + tokens.dropped.get(NOT_DRAWN, 0)}{drawn_or_not(tokens.dropped)}"
    return said + [
        f"{count} of {of}: {remark} (first: {tokens.first_remarks[remark]})"
        for remark, count in tokens.remarks.items()
    ]


def warnings(read: ReadSummary, tokens: TokenizedDataset) -> list[str]:
    """A warning where more than MANY of the preferences are left out, naming reasons and settings.

    Rows without a pair (`no_pair`) do not count as such, their data say so, nor do rows that the weights of
    several sources leave (`not_drawn`); both are among the preferences that there are.
    """
    counts = left_out(read, tokens)
    reasons = {reason: count for reason, count in counts.items() if reason not in _ON_PURPOSE}
    missing, whole = sum(reasons.values()), len(tokens) + sum(counts.values())
    if missing <= MANY * whole:
        return []
    named = [f"{count} {reason}{_help(reason)}" for reason, count in reasons.items()]
    return [f"{missing} of {whole} preferences ({missing / whole:.0%}) are left out: {', '.join(named)}"]


def _help(reason: str) -> str:
    return f" (see {_SETTINGS[reason]})" if reason in _SETTINGS else ""
