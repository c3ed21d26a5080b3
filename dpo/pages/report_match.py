"""The part of a report that comes from `dpo winrate`: figures by temperature, responses side by side."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from markupsafe import Markup

from dpo.config import Config, reference_source
from dpo.config.sources import show_source
from dpo.judging.figures import Estimate, MatchResult, WinrateFigures
from dpo.judging.journal import read_lines
from dpo.judging.judges import JudgeIdentity, VerdictDetails
from dpo.judging.kinds import find_kind
from dpo.judging.results import VERDICTS_FILE, is_of, read_as, read_results
from dpo.judging.winrate import cut_as_text, warnings_of
from dpo.outcomes import UserError
from dpo.pages import plots
from dpo.pages.page import percent, percent_with_interval, prompt_text, with_interval
from dpo.runs import SUMMARY_FILE, WINRATE_DIRECTORY
from dpo.typed_json import require_typed

NUM_SAMPLES = 6
"""Prompts whose responses are shown, from the start of the data: nobody picked them."""
NUM_LOST = 3
"""Further prompts, where the opponent is furthest ahead."""
Cell = Callable[[WinrateFigures], str]
"""What a row of the table by temperature says of one."""
_DEFAULTS = {"samples": 1, "compute_dtype": "float32", "seed": 0, "leave_out_cut": False}


class ShownSide(TypedDict):
    """One of two responses, side by side."""

    name: str
    text: str
    score: float | None
    """Its reward, or how likely a local judge is to choose it; None where the judge gives none."""


class ShownPair(TypedDict):
    """Both responses to a prompt, and what the judge said of them."""

    prompt: str
    outcome: str
    difference: float | None
    """Score of the policy's response minus that of the opponent's."""
    sides: list[ShownSide]


class ShownMatch(TypedDict):
    """What a page shows of a win-rate."""

    opponent: str
    data: str | None
    """Where the prompts are not the run's held-out ones, whose."""
    judge: str
    temperature: str
    """The one whose figures are shown; `rows` has them all."""
    figures: WinrateFigures
    cut: str | None
    controlled: Estimate | None
    kl: tuple[str, Estimate] | None
    rewards: list[Estimate] | None
    warnings: list[str]
    temperatures: list[str]
    rows: list[tuple[str, list[str]]]
    plot: Markup
    samples: list[ShownPair]
    lost: list[ShownPair]
    command: str
    """What gives these figures again."""


def read_matches(run_dir: Path, config: Config) -> list[ShownMatch]:
    """What a page shows of the run's win-rates: one for each judge, opponent and data set, in their order."""
    found = read_results(run_dir / WINRATE_DIRECTORY)
    mine = {path: kept for path, kept in found.items() if _is_the_runs(kept, run_dir, config)}
    return [_read_match(run_dir, config, path, kept) for path, kept in mine.items()]


def matches_of_others(run_dir: Path, config: Config) -> list[str]:
    """Files of win-rates of another policy than the run's, or of one that it had before: not shown."""
    found = read_results(run_dir / WINRATE_DIRECTORY)
    return [path.name for path, kept in found.items() if not _is_the_runs(kept, run_dir, config)]


def _is_the_runs(result: MatchResult, run_dir: Path, config: Config) -> bool:
    """A run that is not finished has no policy: what is there is that of the run before."""
    return (run_dir / SUMMARY_FILE).is_file() and is_of(result, run_dir / config.policy_name)


def _read_match(run_dir: Path, config: Config, path: Path, result: MatchResult) -> ShownMatch:
    by_temperature = result["temperatures"]
    main = "1.0" if "1.0" in by_temperature else next(iter(by_temperature))
    figures = by_temperature[main]
    if "verdicts" not in figures:
        raise UserError(f"{path} is of an older version; run dpo winrate again (nothing is sampled anew)")
    opponent = opponent_name(result["opponent"], config)
    pairs = _pairs(path, figures["verdicts"], opponent)
    shown = pairs[:NUM_SAMPLES]
    lost = [pair for pair in pairs[NUM_SAMPLES:] if _lead(pair) < 0]
    controlled = figures["length_controlled"]
    return {
        "opponent": opponent,
        "data": None if result["data"] == config.data.eval else show_source(result["data"]),
        "judge": judge_name(result["judge"]),
        "temperature": main,
        "figures": figures,
        "cut": cut_as_text(figures["cut"]) if "cut" in figures else None,
        "controlled": None if controlled is None else controlled["win_rate"],
        "kl": next(iter(figures.get("log_ratio", {}).items()), None),
        "rewards": list(figures.get("reward", {}).values()) or None,
        "warnings": [
            f"temperature {t}: {text}" for t in by_temperature for text in warnings_of(by_temperature[t])
        ],
        "temperatures": list(by_temperature),
        "rows": _rows(list(by_temperature.values()), opponent),
        "plot": _plot(result, opponent, main),
        "samples": shown,
        "lost": sorted(lost, key=_lead)[:NUM_LOST],
        "command": command(run_dir, result, config),
    }


def kind_of_match(match: ShownMatch) -> str:
    """What has to be the same for two win-rates to be compared, in words."""
    words = f"over the {match['opponent']}, judge {match['judge']}"
    words += f", prompts of {match['data']}" if match["data"] else ""
    return words if match["temperature"] == "1.0" else f"{words}, temperature {match['temperature']}"


def all_warnings(matches: Sequence[ShownMatch]) -> list[str]:
    """What a reader has to know of the matches; what is said of all of them is said once."""
    shared = [text for text in matches[0]["warnings"] if all(text in m["warnings"] for m in matches)]
    own = [f"judge {m['judge']}, {text}" for m in matches for text in m["warnings"] if text not in shared]
    return [*shared, *own]


def _lead(pair: ShownPair) -> float:
    """How far the policy is ahead; 0 where nobody says."""
    return 0.0 if pair["difference"] is None else pair["difference"]


def opponent_name(source: str, config: Config) -> str:
    """ "reference" where it is the run's, the data's response, or the other model's source."""
    if source == reference_source(config):
        return "reference"
    return {"data:best": "data's best", "data:worst": "data's worst"}.get(source, source)


def judge_name(identity: JudgeIdentity) -> str:
    """A judge in a few words."""
    what = identity.get("reward") or identity.get("control") or identity.get("model") or ""
    return f"{identity['judge']} {what}".strip()


def command(run_dir: Path, result: MatchResult, config: Config) -> str:
    """The command line that gives these figures again."""
    used = result["settings"]
    known = {**_DEFAULTS, **read_as(config.data)}
    known["judge_template_kwargs"] = used.get("template_kwargs", config.data.template_kwargs)
    settings = {name: value for name, value in used.items() if value not in (None, known.get(name))}
    settings["temperatures"] = [float(text) for text in result["temperatures"]]
    if opponent_name(result["opponent"], config) != "reference":
        settings["opponent"] = result["opponent"]
    if result["data"] != config.data.eval:
        settings["data"] = result["data"]
    kind, _ = find_kind(result["settings"]["judge"])
    settings |= kind.settings(result["judge"])
    options = [
        f"--{name}={json.dumps(v) if isinstance(v, (list, dict)) else v}" for name, v in settings.items()
    ]
    return shlex.join(["dpo", "winrate", "--run", str(run_dir), *options])


def _plot(result: MatchResult, opponent: str, main: str) -> Markup:
    by_temperature = result["temperatures"]
    figures = by_temperature[main]
    rows = [(f"temperature {main}", figures["win_rate"])]
    if figures["length_controlled"] is not None:
        rows.append(("the same at equal lengths", figures["length_controlled"]["win_rate"]))
    rows += [(f"temperature {t}", by_temperature[t]["win_rate"]) for t in by_temperature if t != main]
    judge = textwrap.shorten(f"judge {judge_name(result['judge'])}", 70)
    title = f"Win-rate over the {opponent}, 95% intervals\n{judge}"
    return Markup(plots.intervals(title, rows, level=0.5))


def _rows(columns: Sequence[WinrateFigures], opponent: str) -> list[tuple[str, list[str]]]:
    """The table by temperature: what a row is, and its cells; rows that are empty throughout are left out."""

    def controlled(figures: WinrateFigures) -> str:
        found = figures["length_controlled"]
        return "" if found is None else percent_with_interval(found["win_rate"])

    def from_group(group: Literal["reward", "log_ratio"], place: int, digits: int) -> Cell:
        def cell(figures: WinrateFigures) -> str:
            found = list(figures.get(group, {}).values())
            return with_interval(found[place], digits) if found else ""

        return cell

    def from_cut(side: Literal["policy", "opponent"]) -> Cell:
        def cell(figures: WinrateFigures) -> str:
            share = figures["cut"][side] if "cut" in figures else None
            return "" if share is None else percent(share)

        return cell

    rows: dict[str, Cell] = {
        "win-rate": lambda figures: percent_with_interval(figures["win_rate"]),
        "at equal lengths": controlled,
        "wins, ties, losses": lambda figures: f"{figures['wins']}, {figures['ties']}, {figures['losses']}",
        "ties that flip with the order": lambda figures: str(figures["ties_flipped"]),
        "invalid": lambda figures: str(figures["invalid"]),
        "cut off, policy": from_cut("policy"),
        f"cut off, {opponent}": from_cut("opponent"),
        "mean reward, policy": from_group("reward", 0, 3),
        f"mean reward, {opponent}": from_group("reward", 1, 3),
        f"log policy/{opponent}, nats": from_group("log_ratio", 0, 1),
        "mean characters, policy": lambda figures: f"{figures['mean_length']['policy']:z.0f}",
        f"mean characters, {opponent}": lambda figures: f"{figures['mean_length']['opponent']:z.0f}",
    }
    table = [(name, [cell(figures) for figures in columns]) for name, cell in rows.items()]
    return [(name, cells) for name, cells in table if any(cells)]


def _pairs(path: Path, keys: Sequence[Sequence[str]], opponent: str) -> list[ShownPair]:
    """Both responses to every prompt, in the order of the data, with what the judge of this file said.

    Raises:
      ValueError: where the file of verdicts lacks one, or a line is damaged.
    """
    wanted = {key for both in keys for key in both}
    journal = path.with_name(VERDICTS_FILE)
    lines = read_lines(journal) if journal.is_file() else {}
    if wanted - lines.keys():
        raise UserError(
            f"{journal} lacks {len(wanted - lines.keys())} of the verdicts that {path.name} counts; {_REMEDY}"
        )
    found: dict[str, _ShownLine] = {}
    for key in wanted:
        try:
            found[key] = require_typed(lines[key], _ShownLine)
        except UserError as error:
            raise UserError(f"{journal}: the line of {key[:100]} is damaged: {error}; {_REMEDY}") from error
    return [_side_by_side(found[first], found[second], opponent) for first, second in keys]


class _Part(TypedDict):
    """Of a content that is a list."""

    text: NotRequired[str]


class _Turn(TypedDict):
    """What is shown of a message."""

    role: str
    content: NotRequired[str | list[_Part] | None]


class _ShownLine(TypedDict):
    """What is shown of a `VerdictLine`."""

    prompt: str | list[_Turn]
    policy: str
    opponent: str
    winner: Literal["policy", "opponent", "tie"] | None
    details: VerdictDetails | None


_REMEDY = "run dpo winrate again, or delete the directory"


def _side_by_side(policy_first: _ShownLine, opponent_first: _ShownLine, opponent: str) -> ShownPair:
    scores = _scores(policy_first, opponent_first)
    names = ("policy", opponent)
    texts = (policy_first["policy"], policy_first["opponent"])
    return {
        "prompt": prompt_text(policy_first["prompt"]),
        "outcome": _outcome(policy_first["winner"], opponent_first["winner"], opponent),
        "difference": None if scores is None else scores[0] - scores[1],
        "sides": [
            {"name": name, "text": text, "score": None if scores is None else score}
            for name, text, score in zip(names, texts, scores or (None, None), strict=True)
        ],
    }


def _outcome(first: str | None, second: str | None, opponent: str) -> str:
    if first is None or second is None:
        return "no valid verdict"
    if first != second:
        return "tie: the verdict changes with the order"
    return {"policy": "policy wins", "opponent": f"{opponent} wins", "tie": "tie"}[first]


def _scores(policy_first: _ShownLine, opponent_first: _ShownLine) -> tuple[float, float] | None:
    """Rewards of policy and opponent, or a local judge's mean log-probs of choosing them; None without."""
    ours, theirs = policy_first["details"], opponent_first["details"]
    if ours and "rewards" in ours:
        first, second = ours["rewards"]
        return first, second
    if ours and theirs and "log_probs" in ours and "log_probs" in theirs:
        one, two = ours["log_probs"], theirs["log_probs"]
        return (one["A"] + two["B"]) / 2, (one["B"] + two["A"]) / 2
    return None
