"""What a message, a help text or a page tells its reader to type is accepted as it is typed in a shell."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from dpo import cli
from dpo.config import Config, IdentityKind
from dpo.training.identity import require_same

ROOT = Path(__file__).resolve().parents[1]
OF_OTHERS = re.compile(
    r"--(xla_\w+|no-deps|only-binary|quiet|dest|target|series|faint|version|revision|help|help-all|o)\b"
)
"""Options that a text gives to another program or style sheet, and those that every command has."""
COMMAND = re.compile(
    r"\bdpo (" + "|".join(cli.COMMANDS) + r")((?: +(?:--[\w.-]+[^\s,;:)`]*|[A-Z…][\w…/]*))*)"
)


def texts_of(module: Path) -> Iterator[str]:
    """Every string of a module; what an f-string fills in is written VALUE."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    inside = set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= set(node.values)
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def all_texts() -> Iterator[tuple[str, str]]:
    """Where it stands, and the text: strings of the package, code within the prose of the pages."""
    for module in sorted((ROOT / "dpo").rglob("*.py")):
        if not re.search(r"\bdpo [\w\"']", module.read_text(encoding="utf-8")):
            continue  # to parse all of the package takes seconds in every worker
        for text in texts_of(module):
            yield str(module.relative_to(ROOT)), text
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", prose):
            yield page.name, code


def prescriptions() -> list[tuple[str, str, str]]:
    """Place, command and options of every `dpo COMMAND --…` in a text."""
    found = {
        (place, match[1], " ".join(match[2].split()).rstrip("."))
        for place, text in all_texts()
        for match in COMMAND.finditer(text)
        if "--" in match[2] and not OF_OTHERS.search(match[2])
    }
    return sorted(found)


BARE = {
    "--config": "sentiment_pairs",
    "--winrate": "vader",
    "--judge": "vader",
    "--run": "RUN",
    "--format": "adapter",
    "--topology": "cpu:1",
    "--allow-changed": "settings",
    "--over": "objective.beta=[0.1]",
    "--rows": "rows.jsonl",
}
"""A value for an option that a text names alone; one that is not here has to be accepted without."""
VALUES = {
    "KIND": "settings",
    "FILE": "sentiment_pairs",
    "PATH": "sentiment_pairs",
    "CONFIG": "sentiment_pairs",
    "JUDGE": "vader",
    "N": "1",
}
"""What stands for a word in capitals, where any word would not do."""
NUMBERS = ("--max_new_tokens",)
"""Options for which what a text fills in is a number."""


def typed(command: str, options: str) -> list[str]:
    """The words of a command line, with values in the place of capitals and what it needs besides."""
    words = []
    given = shlex.split(options.replace("…", ""))
    for before, word, following in zip(["", *given[:-1]], given, [*given[1:], "--"], strict=True):
        name, equals, value = word.partition("=")
        filled_in = "1" if before in NUMBERS and word == "VALUE" else VALUES.get(word, word)
        words.append(f"{name}{equals}{VALUES.get(value, value)}" if equals else filled_in)
        words += [BARE[word]] if word in BARE and following.startswith("--") else []
    needs_run = command in ("export", "watch") and words[0].startswith("--")
    measures = command in ("evaluate", "winrate") and "--run" not in words
    return ["RUN", *words] if needs_run else ["--run", "RUN", *words] if measures else words


@pytest.mark.parametrize(("place", "command", "options"), prescriptions())
def test_what_a_text_prescribes_is_accepted(
    place: str, command: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Parsed(Exception):  # noqa: N818
        pass

    build = cli.build

    def stop(settings, values, parser):
        made = build(settings, values, parser)
        if settings is Config and command in ("inspect", "plan"):
            return made
        raise Parsed

    monkeypatch.setattr(cli, "build", stop)
    with pytest.raises(Parsed):
        cli.main([command, *typed(command, options)])


def test_there_are_prescriptions() -> None:
    assert len(prescriptions()) >= 8
    assert any("--allow-changed" in options for _, _, options in prescriptions())


def test_every_option_in_a_message_is_one() -> None:
    """Options that stand alone, as in "--output FILE keeps them", are those of some command."""
    known = _options()
    unknown = [
        (place, option)
        for place, text in all_texts()
        if place.startswith("dpo/")
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*(?==[^=]|[ )`,;.']|$)", text)
        if not OF_OTHERS.match(option) and not option.startswith("--objective.")
        if option.strip("-").replace("-", "_").rstrip(".") not in known
    ]
    assert not [(place, option) for place, option in unknown if "VALUE" not in option]


def _options() -> set[str]:
    known = {"config", "interactive", "help_all"}
    for name in cli.COMMANDS:
        known |= set(_parser_of(name).setting_names())
    return known | {name.partition(".")[0] for name in known}


def _parser_of(command: str):
    """The parser that a command makes."""

    class Made(Exception):  # noqa: N818
        pass

    def stop(parser, *rest, **kwargs):
        raise Made(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.SettingsParser, "parse_args", stop)
        with pytest.raises(Made) as made:
            cli.main([command])
    return made.value.args[0]


def test_the_refusal_of_other_settings_can_be_answered_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options that the refusal of a changed run ends with, pasted behind the same command."""
    saved = {kind: {"what": "then"} for kind in get_args(IdentityKind)}
    now = {kind: {"what": "now"} for kind in get_args(IdentityKind)}
    with pytest.raises(ValueError, match="go on all the same with") as refusal:
        require_same(saved, now, allowed=[], where="the checkpoint", log=print)
    options = re.findall(r"--allow-changed \w+", str(refusal.value))
    assert len(options) > 1

    class Done:
        status = "finished"

    given = []
    monkeypatch.setattr(
        "dpo.commands.train.train_and_report", lambda config, **_: given.append(config) or Done
    )
    assert cli.main(["train", *shlex.split(" ".join(options)), "--training.steps=3"]) == 0
    assert [f"--allow-changed {kind}" for kind in given[0].training.allow_changed] == options
    assert given[0].training.steps == 3
