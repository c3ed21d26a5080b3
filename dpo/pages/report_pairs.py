"""A report's worst and best held-out pairs, each token in the colour of its log-ratio."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from dpo.data.messages import response_text
from dpo.evaluation.heldout import Heldout
from dpo.evaluation.token_ratios import OrderedPair, ScoredPair, ScoredSide, ScoredSides, extreme_pairs
from dpo.outcomes import UserError
from dpo.pages.page import prompt_text
from dpo.runs import TOKENS_FILE
from dpo.typed_json import read_typed

LEVELS = (0.1, 0.5, 1.0, 2.0)
"""Nats of log π − log ρ, either way, from which on a token has the first, second … shade."""
LEGEND = [(f"down{i}", f"−{LEVELS[i - 1]:g}") for i in range(len(LEVELS), 0, -1)] + [
    (f"up{i + 1}", f"+{level:g}") for i, level in enumerate(LEVELS)
]
"""Shades, and the log-ratio from which on each holds."""
_SAME = 0.05
"""Difference of δ, relative to its size, below which two evaluations scored the same pair alike."""


class Span(NamedTuple):
    """A token, or the few that make up one character."""

    text: str
    shade: str
    """down4 … down1, up1 … up4; empty near zero."""
    title: str


class ShownSide(TypedDict):
    """One response of a pair."""

    name: str
    text: str
    ratio: str
    """Its log-ratio, in nats."""
    length: int
    """Tokens."""
    spans: list[Span] | None
    """None where the run has not kept the log-probs of tokens."""


class ShownPair(TypedDict):
    """A pair, side by side."""

    delta: str
    prompt: str
    prompt_end: str
    """The end of its last line."""
    source: str
    sides: list[ShownSide]


class PairList(TypedDict):
    """Pairs under a heading."""

    heading: str
    pairs: list[ShownPair]


def describe_extremes(run_dir: Path, heldout: Heldout, *, beta: float) -> list[PairList]:
    """Two lists of pairs, worst and best, with the tokens' shades where the run has kept their log-probs."""
    extremes = extreme_pairs(heldout.rows, beta=beta)
    kept = _read_tokens(run_dir / TOKENS_FILE)
    return [
        {"heading": heading, "pairs": [_pair(heldout, pair, _find(kept, heldout, pair)) for pair in pairs]}
        for heading, pairs in (
            ("Pairs that the policy orders worst", extremes.worst),
            ("Pairs that it orders best", extremes.best),
        )
    ]


def spans(side: ScoredSide) -> list[Span]:
    """The response piece by piece; tokens that add no text by themselves are joined to the next."""
    found: list[Span] = []
    policy = reference = 0.0
    for text, ours, theirs in zip(side["tokens"], side["policy"], side["reference"], strict=True):
        if ours is None or theirs is None:  # of another's turn in a response of several
            found.append(
                Span(text if text.strip("\n") else text.replace("\n", "⏎\n"), "", "read, not scored")
            )
            continue
        policy, reference = policy + ours, reference + theirs
        if not text:
            continue
        ratio = policy - reference
        level = bisect_right(LEVELS, abs(ratio))
        shade = f"{'up' if ratio > 0 else 'down'}{level}" if level else ""
        title = f"{ratio:+z.2f} nats: policy {policy:z.2f}, reference {reference:z.2f}"
        found.append(Span(text if text.strip("\n") else text.replace("\n", "⏎\n"), shade, title))
        policy = reference = 0.0
    return found


def _read_tokens(path: Path) -> list[ScoredPair]:
    if not path.is_file():
        return []
    remedy = "; delete it, and the report is without its colours"
    pairs = read_typed(path, _Kept, remedy=remedy)["pairs"]
    for side in (side for pair in pairs for side in (pair["sides"]["better"], pair["sides"]["worse"])):
        if not len(side["tokens"]) == len(side["policy"]) == len(side["reference"]):
            raise UserError(
                f"{path} is damaged: a response has other numbers of tokens and log-probs{remedy}"
            )
    return pairs


class _Kept(TypedDict):
    """What `TOKENS_FILE` holds."""

    pairs: list[ScoredPair]


def _find(kept: Sequence[ScoredPair], heldout: Heldout, pair: OrderedPair) -> ScoredSides | None:
    """The kept tokens of a pair: the same responses, and put as far apart as the held-out log-probs say.

    None where the file is missing, or is of another evaluation. A row of the data may be several here
    (`data.expand`), at one location.
    """
    place = (pair.row, heldout.preferences[pair.row].location, pair.better, pair.worse)
    for one in kept:
        same_place = (one["row"], one["location"], one["better"], one["worse"]) == place
        if same_place and abs(one["delta"] - pair.delta) <= _SAME * max(1.0, abs(pair.delta)):
            return one["sides"]
    return None


def _pair(heldout: Heldout, pair: OrderedPair, tokens: ScoredSides | None) -> ShownPair:
    preference, rows = heldout.preferences[pair.row], heldout.rows
    prompt = prompt_text(preference.prompt)
    return {
        "delta": f"{pair.delta:+z.3f}",
        "prompt": prompt,
        "prompt_end": prompt.strip().splitlines()[-1][-100:] if prompt.strip() else "(empty prompt)",
        "source": preference.source,
        "sides": [
            {
                "name": name,
                "text": response_text(preference.responses[place]),
                "ratio": f"{rows.log_ratio[pair.row, place]:+z.2f}",
                "length": int(rows.lengths[pair.row, place]),
                "spans": None if tokens is None else spans(tokens[name]),
            }
            for name, place in (("better", pair.better), ("worse", pair.worse))
        ],
    }
