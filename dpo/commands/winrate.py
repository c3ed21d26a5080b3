"""`dpo winrate`, and `dpo train --winrate`: sample, judge, print the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from dpo.commands.checks import check_heldout, check_models, load_run
from dpo.config import Config, EvaluateConfig, WinrateConfig
from dpo.config.commands import HeldoutConfig
from dpo.config.sources import show_source
from dpo.hub_names import note_own_word
from dpo.outcomes import UserError
from dpo.terminal import print_plain


def play_match(given: WinrateConfig, arguments: Sequence[str]) -> None:
    """Measure a win-rate; a judge that runs the user's own code must be named on the command line."""
    from dpo.judging.kinds import require_word_for_code

    require_word_for_code(given.judge, setting="judge", arguments=arguments)
    measure_winrate(given, None if given.run is None else load_run(given.run))


def match_after_training(config: Config, judge: str, arguments: Sequence[str]) -> WinrateConfig:
    """What `dpo train --winrate JUDGE` will measure, refused before anything is trained where it cannot be.

    Raises:
      ValueError: without held-out data, for an unknown judge, or one that more has to be said of.
    """
    from dpo.judging.kinds import open_judge, require_word_for_code

    if config.data.eval is None:
        raise UserError(f"winrate is {judge}, and data.eval is not set; allowed: both")
    require_word_for_code(judge, setting="winrate", arguments=arguments)
    given = WinrateConfig(run=config.run_dir, judge=judge, max_new_tokens=config.training.eval_max_new_tokens)
    open_judge(given, print_plain).require_usable()
    return given


def measure_winrate(given: WinrateConfig, run: Config | None) -> None:
    """Sample, judge, print the figures, and add them to the run's report."""
    note_own_word((given.judge or "").partition(":")[2])
    config = check_heldout(comparison(given), run)
    from dpo.judging.match import DATA_OPPONENTS, play
    from dpo.judging.results import VERDICTS_FILE
    from dpo.judging.winrate import figures_as_text, usage_as_text
    from dpo.training.program import enable_compilation_cache

    opponent = None if given.opponent in DATA_OPPONENTS else given.opponent
    check_models({"policy": given.policy, "opponent": opponent})
    enable_compilation_cache()
    output = Path(given.output or Path(given.run or ".") / "winrate")
    result, path = play(given, config, output=output, log=print_plain)
    print_plain(
        f"{result['policy']} against {result['opponent']} on {show_source(result['data'])}, "
        f"judge {result['settings']['judge']}"
    )
    for temperature, figures in result["temperatures"].items():
        print_plain(f"temperature {temperature}: {figures['prompts']} prompts, {figures['pairs']} pairs")
        print_plain(figures_as_text(figures))
    if "usage" in result:
        print_plain(usage_as_text(result["usage"]))
    print_plain(f"all figures: {path}; every verdict: {output / VERDICTS_FILE}")
    if run is not None and given.run is not None and given.output is None:
        from dpo.pages.report import write_report

        print_plain(f"report: {write_report(given.run, run)}")


def comparison(given: WinrateConfig) -> EvaluateConfig:
    """The part of a win-rate's settings that says what is compared on which data."""
    shared = {item.name: getattr(given, item.name) for item in fields(HeldoutConfig)}
    return EvaluateConfig(reference=given.opponent, **shared)
