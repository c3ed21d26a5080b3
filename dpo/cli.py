"""The commands: each parses its settings, calls one function of `dpo.commands`, and ends with an exit code.

Settings are read, and their types and ranges checked, before anything heavy is imported or loaded. Exit codes
are those of `dpo.outcomes`, and `FAILED`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any, get_args

from dpo.command_line import Settings, SettingsParser, build, settings_parser
from dpo.config import (
    Config,
    DiffusionConfig,
    EvaluateConfig,
    ExportConfig,
    FrontierConfig,
    GenerateConfig,
    IdentityKind,
    InspectConfig,
    PlanConfig,
    ReportConfig,
    WatchConfig,
    WinrateConfig,
    with_options,
)
from dpo.config.home import at_home
from dpo.distribution import version
from dpo.hub_names import forget
from dpo.outcomes import BUG, ENVIRONMENT, STOPPED, USER, EnvironmentFailure, UserError, describe, outcome_of
from dpo.terminal import guarded_output, shortened, unprinted

PRODUCT_IS_PRINTED = ("evaluate", "generate", "inspect", "plan", "watch")
"""Commands of which what they print is what they are asked for, as it is of any command's --help."""
ON_HELDOUT_DATA = {"evaluate": EvaluateConfig, "winrate": WinrateConfig}
"""Commands whose options for a run's `data` have other names than the settings."""
FAILED = 1
"""Exit code of a plan that does not fit, and of a sweep of which a run failed; what was given is right."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    name = given[0] if given and given[0] in COMMANDS else None
    forget()
    with guarded_output():
        try:
            code = _run(given)
        except SystemExit as end:  # after --help, and after settings that are wrong
            raise SystemExit(_once_printed(name, end.code, wanted=True)) from None
        return _once_printed(name, code, wanted=name is None or name in PRODUCT_IS_PRINTED)


def _once_printed(name: str | None, code: Any, *, wanted: bool) -> Any:
    """The exit code of a command with regard to whether what it printed was taken; where it was not, says so.

    Who reads no further (a closed pipe, a lost terminal) misses nothing; a full disk is an error where what
    is printed was asked for.
    """
    failure = unprinted()
    if failure is None:
        return code
    command = "dpo" if name is None else f"dpo {name}"
    text = f"standard output could not be written: {failure.strerror or failure}"
    if wanted and code == 0:
        print(describe(command, EnvironmentFailure(text)), file=sys.stderr)
        return ENVIRONMENT.code
    print(f"{command}: warning: {text}", file=sys.stderr)
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"dpo {version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        meant = "".join(f" did you mean {near}?" for near in get_close_matches(name, COMMANDS, n=1))
        allowed = ", ".join(COMMANDS)
        print(f"dpo: error: {name!r} is not a command;{meant} allowed: {allowed}", file=sys.stderr)
        return USER.code
    try:
        return COMMANDS[name]([_with_underscores(argument) for argument in rest])
    except (Exception, KeyboardInterrupt) as error:
        outcome = outcome_of(error)
        if outcome is BUG:
            raise
        text = describe(f"dpo {name}", error)
        if name in ON_HELDOUT_DATA:
            text = with_options(text, ON_HELDOUT_DATA[name])
        print(shortened(text), file=sys.stderr)
        return outcome.code


def train(arguments: list[str]) -> int:
    """Fine-tune a policy on preferences, evaluate it, export it, and write a report."""
    parser = train_parser()
    values = parser.parse_args(arguments)
    config = build_train_settings(values, parser)
    from dpo.commands.train import train_and_report

    result = train_and_report(config, judge=values.winrate, arguments=arguments)
    return STOPPED.code if result.status == "interrupted" else 0


def evaluate(arguments: list[str]) -> int:
    """Held-out accuracy of a policy against its reference, with intervals and baselines."""
    given = read_settings(EvaluateConfig, "evaluate", arguments)
    from dpo.commands.evaluate import evaluate_heldout

    evaluate_heldout(given)
    return 0


def inspect(arguments: list[str]) -> int:
    """What the preferences hold, and what could be wrong with them; one example as it is scored."""
    parser = command_parser("inspect", Config, InspectConfig)
    values = parser.parse_args(arguments)
    config, given = build(Config, values, parser), build(InspectConfig, values, parser)
    from dpo.commands.inspect import inspect_data

    inspect_data(config, given, arguments)
    return 0


def plan(arguments: list[str]) -> int:
    """Memory, traffic and time of a training step on devices that need not be there."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    parser = command_parser("plan", Config, PlanConfig)
    values = parser.parse_args(arguments)
    config, given = build(Config, values, parser), build(PlanConfig, values, parser)
    from dpo.commands.plan import plan_step

    return 0 if plan_step(config, given, arguments) else FAILED


def export(arguments: list[str]) -> int:
    """Write a checkpoint of a run as a directory for `transformers`, adapters for `peft`, or a GGUF file."""
    given = read_settings(ExportConfig, "export", arguments)
    from dpo.commands.export import export_run

    export_run(given)
    return 0


def report(arguments: list[str]) -> int:
    """Write a run's report, or compare several runs: one HTML page without any outside reference."""
    parser = command_parser("report", ReportConfig)
    parser.add_argument("run", nargs="+", type=str, help="Run directory; several are compared.")
    values = parser.parse_args(arguments)
    given = build(ReportConfig, values, parser)
    from dpo.commands.report import report_runs

    report_runs(given, at_home(values.run))
    return 0


def watch(arguments: list[str]) -> int:
    """Draw a run's curves in text while it goes on; ends when the run does."""
    given = read_settings(WatchConfig, "watch", arguments)
    from dpo.commands.report import watch_run

    return 0 if watch_run(given) or given.once else STOPPED.code


def sweep(arguments: list[str]) -> int:
    """Train with every combination of some settings, compare the runs, and choose one on held-out data."""
    parser = train_parser("sweep")
    add_sweep_options(parser)
    values = parser.parse_args(arguments)
    build_train_settings(values, parser)
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_sweep_options(own)
    _, of_each = own.parse_known_args(arguments)
    from dpo.commands.sweep import sweep_over

    read = partial(read_train_settings, parser=train_parser())
    ended = sweep_over(values.over, at_home(values.sweep_dir), of_each, read)
    return STOPPED.code if ended is None else 0 if ended else FAILED


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """What a sweep takes beside the options of its runs."""
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="NAME=[VALUE, ...]",
        help="A setting and the values to try, such as objective.beta=[0.05,0.1]; several are combined.",
    )
    parser.add_argument(
        "--sweep_dir",
        default="runs/sweep",
        metavar="DIRECTORY",
        help="Where the runs (each in a folder of its own, whatever run_dir is), the comparison and "
        "sweep.json are written.",
    )


def frontier(arguments: list[str]) -> int:
    """True reward against KL for several objectives and betas, and win-rates by temperature."""
    given = read_settings(FrontierConfig, "frontier", arguments)
    from dpo.commands.experiments import measure_frontier

    return 0 if measure_frontier(given, arguments) else STOPPED.code


def diffusion(arguments: list[str]) -> int:
    """Diffusion-DPO on data whose optimum is known: train, sample, compare."""
    config = read_settings(DiffusionConfig, "diffusion", arguments)
    from dpo.commands.experiments import run_diffusion

    run_diffusion(config, arguments)
    return 0


def winrate(arguments: list[str]) -> int:
    """How often a judge prefers the policy's responses over an opponent's, both orders judged."""
    given = read_settings(WinrateConfig, "winrate", arguments)
    from dpo.commands.winrate import play_match

    play_match(given, arguments)
    return 0


def generate(arguments: list[str]) -> int:
    """Answer a prompt, or chat, with the response printed as it is drawn."""
    parser = command_parser("generate", GenerateConfig)
    parser.add_argument("prompt", nargs="?", type=str, help="What to answer (not with --interactive).")
    parser.add_argument(
        "--interactive", action="store_true", help="Chat: each line is a message; Ctrl-D ends it."
    )
    values = parser.parse_args(arguments)
    given = build(GenerateConfig, values, parser)
    if (values.prompt is None) is not values.interactive:
        raise UserError("give either a prompt or --interactive: dpo generate MODEL PROMPT")
    from dpo.commands.generate import answer

    answer(given, values.prompt)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "winrate": winrate,
    "generate": generate,
    "inspect": inspect,
    "plan": plan,
    "export": export,
    "report": report,
    "watch": watch,
    "sweep": sweep,
    "frontier": frontier,
    "diffusion": diffusion,
}


def read_settings(settings: type[Settings], command: str, arguments: list[str]) -> Settings:
    """The settings of a command, or exit code 2 with what is wrong."""
    parser = command_parser(command, settings)
    return build(settings, parser.parse_args(arguments), parser)


def read_train_settings(arguments: list[str], *, parser: SettingsParser | None = None) -> Config:
    """The settings of a run; whoever reads those of several makes the parser once."""
    parser = parser or train_parser()
    return build_train_settings(parser.parse_args(arguments), parser)


def train_parser(command: str = "train") -> SettingsParser:
    """The settings of a run, and what is for one start only.

    `--allow-changed KIND …` adds to training.allow_changed; `--resume` is short for `--training.resume`.
    """
    parser = command_parser(command, Config)
    kinds = get_args(IdentityKind)
    parser.add_argument(
        "--allow_changed",
        action="extend",
        nargs="+",
        choices=kinds,
        default=[],
        metavar="KIND",
        help=f"What may differ from the checkpoint that is continued: {', '.join(kinds)}.",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default=None,
        help="Go on from the newest checkpoint in run_dir (the default), or refuse a directory that has one.",
    )
    parser.add_argument(
        "--winrate",
        metavar="JUDGE",
        default=None,
        help="Measure the win-rate over the reference afterwards, as `dpo winrate --run RUN --judge JUDGE`, "
        "with answers of at most training.eval_max_new_tokens; several processes only say the command.",
    )
    return parser


def build_train_settings(values: Any, parser: SettingsParser) -> Config:
    """What `train_parser` has parsed, as settings."""
    config = build(Config, values, parser)
    allowed = list(dict.fromkeys([*config.training.allow_changed, *values.allow_changed]))
    training = replace(config.training, allow_changed=allowed)
    if values.resume is not None:
        training = replace(training, resume=values.resume)
    return replace(config, training=training)


def command_parser(command: str, *settings: type) -> SettingsParser:
    """The parser of one command."""
    text = (COMMANDS[command].__doc__ or "").strip()
    return settings_parser(*settings, prog=f"dpo {command}", description=text)


def _with_underscores(argument: str) -> str:
    """Settings have underscores; `--hub-id` is understood too."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}" if re.fullmatch(r"[a-z][\w.-]*", name) else argument


def _overview() -> str:
    lines = [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dpo COMMAND [--config FILE] [--SETTING=VALUE ...]",
            "",
            "Preference optimisation of small language models.",
            "",
            *lines,
            "",
            "dpo COMMAND --help says what can be set, --help-all all of it with types; dpo --version.",
        ]
    )
