"""Who can judge: one row for each kind of judge, by the name that `--judge` begins with.

To add a judge, write a file with its class (see `judges.Judge`) and a function that opens it, and add a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dpo.config import WinrateConfig
from dpo.judging.endpoint import command_line_settings, open_endpoint
from dpo.judging.judges import Judge, JudgeIdentity, Log, open_control, open_reward
from dpo.judging.local_judge import open_local
from dpo.judging.reward_model import open_reward_model
from dpo.outcomes import UserError
from dpo.own_code import require_own_word


def _no_settings(identity: JudgeIdentity) -> dict[str, object]:
    return {}


class Kind(NamedTuple):
    """A row of JUDGES."""

    decides_by: str
    """What it goes by, in words."""
    open: Callable[[WinrateConfig, str, Log], Judge]
    """Makes the judge from the settings, what follows the colon, and a place for lines about its work."""
    source: str | None = None
    """What has to follow the colon; None where nothing may."""
    reads_template: bool = False
    """Whether it is asked with a prompt template, which the user can replace."""
    is_paid: bool = False
    """Whether its verdicts come with counts of tokens, which have a price."""
    settings: Callable[[JudgeIdentity], Mapping[str, object]] = _no_settings
    """What has to be said of it on the command line besides its name, from its identity."""


FUNCTION = "module:function"

JUDGES: dict[str, Kind] = {
    "vader": Kind("sentiment of the response: the reward of the shipped data", open_reward),
    FUNCTION: Kind("a function (prompt, response) to a number; higher is better", open_reward),
    "endpoint": Kind(
        "a chat model behind an OpenAI-compatible endpoint",
        open_endpoint,
        reads_template=True,
        is_paid=True,
        settings=command_line_settings,
    ),
    "reward_model": Kind("the score of a reward model with one label", open_reward_model, source="DIR"),
    "local": Kind(
        "the log-probs of the replies A and B under a causal language model",
        open_local,
        source="MODEL",
        reads_template=True,
    ),
    "first": Kind("a control: always the first response", open_control),
    "longer": Kind("a control: always the longer response", open_control),
}
"""All judges. A name with a colon that is no other kind's is a function of the user's own."""


def find_kind(judge: str) -> tuple[Kind, str]:
    """The row of a judge, and what follows the colon.

    Raises:
      ValueError: when there is no such judge, or nothing follows the colon where something must.
    """
    name, colon, source = judge.partition(":")
    if name in JUDGES and (JUDGES[name].source is None) == (not colon) and bool(colon) == bool(source):
        return JUDGES[name], source
    if name not in JUDGES and name and source:
        return JUDGES[FUNCTION], source
    allowed = spell(name) if name in JUDGES else ", ".join(map(spell, JUDGES))
    raise UserError(f"judge is {judge!r}; allowed: {allowed}")


def open_judge(given: WinrateConfig, log: Log) -> Judge:
    """The judge that the settings name.

    Raises:
      ValueError: when there is none of this name, or a template is given to a judge that reads none.
    """
    assert given.judge is not None, "choose_judge has one"
    kind, source = find_kind(given.judge)
    if given.template is not None and not kind.reads_template:
        readers = " and ".join(name for name, kind in JUDGES.items() if kind.reads_template)
        raise UserError(f"template is {given.template!r}, but judge {given.judge} reads none; {readers} do")
    return kind.open(given, source, log)


def require_word_for_code(judge: str | None, *, setting: str, arguments: Sequence[str]) -> None:
    """Refuse a judge that is a function and that the command line itself does not name."""
    if judge is not None and find_kind(judge)[0] is JUDGES[FUNCTION]:
        require_own_word(judge, setting=setting, arguments=arguments)


def spell(name: str) -> str:
    """A kind of judge as `--judge` takes it."""
    source = JUDGES[name].source
    return name if source is None else f"{name}:{source}"
