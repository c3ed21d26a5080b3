"""`dpo sweep`: several runs one after the other, a table, a page, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from dpo.commands.checks import check_models_of, check_settings
from dpo.commands.output import write_json
from dpo.config import Config
from dpo.outcomes import STOPPED, UserError
from dpo.terminal import print_plain


def sweep_over(
    over: Sequence[str], directory: str, arguments: Sequence[str], read: Callable[[list[str]], Config]
) -> bool | None:
    """Run all combinations and choose; True where all went well, None where another start goes on.

    `arguments` is the command line of each run without what is swept over, `read` makes settings of one.

    Raises:
      UserError: before the first run, for settings of any of them.
    """
    from dpo.experiments.sweep import Process, end_at_once, make_trials, run_trials
    from dpo.training.interrupt import stop_requests

    trials = make_trials(over, Path(directory))
    configs = {trial.name: read([*arguments, *trial.arguments]) for trial in trials}
    for trial in trials:
        if configs[trial.name].data.eval is None:
            raise UserError(f"{trial.name}: data.eval is not set; a sweep chooses by held-out preferences")
        check_settings(configs[trial.name], [*arguments, *trial.arguments])
        check_models_of(configs[trial.name])
    running: list[Process] = []
    with stop_requests(last=lambda: end_at_once(running)) as stop_requested:
        codes = run_trials(trials, arguments, stop_requested, log=print_plain, running=running)
        asked = stop_requested()
    if asked:
        print_plain(f"{directory}: stopped as asked; the same command goes on from there")
        return None
    if STOPPED.code in codes.values():
        ended = f"{[*codes][-1]} ended with exit code {STOPPED.code}"
        print_plain(f"{directory}: {ended}; the same command goes on from there")
        return None
    done = {trial.name: trial.run_dir for trial in trials if codes[trial.name] == 0}
    for name in (name for name, code in codes.items() if code):
        print_plain(f"WARNING: {name} ended with exit code {codes[name]} and has no part in the choice")
    if done:
        _conclude(Path(directory), done, configs, codes)
    return len(done) == len(trials)


def _conclude(
    directory: Path, done: dict[str, Path], configs: dict[str, Config], codes: dict[str, int]
) -> None:
    from dpo.evaluation.choosing import choose
    from dpo.evaluation.heldout import load_heldout
    from dpo.experiments.sweep import RESULT_FILE, as_result, choice_as_text
    from dpo.pages.comparison import write_comparison

    choice = choose({name: load_heldout(run, configs[name]) for name, run in done.items()})
    result = as_result(choice, done, codes)
    write_json(directory / RESULT_FILE, result)
    print_plain(choice_as_text(choice))
    if len(done) > 1:
        runs = [(done[one.name], configs[one.name]) for one in choice.judged]
        page = write_comparison(
            runs, output=directory / "comparison.html", choice=choice, failed=result["failed"]
        )
        print_plain(f"page        {page}")
    print_plain(f"figures     {directory / RESULT_FILE}")
    print_plain(f"policy      {done[choice.chosen.name] / configs[choice.chosen.name].policy_name}")
