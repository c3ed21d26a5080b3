"""`dpo train`: the run, and after it the verdict, the report and, where asked for, the win-rate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.commands.checks import check_models_of, check_settings
from dpo.commands.evaluate import beta_of, describe_heldout
from dpo.commands.inspect import report_data
from dpo.commands.output import write_json
from dpo.commands.winrate import match_after_training, measure_winrate
from dpo.config import Config, EvaluateConfig, WinrateConfig, heldout_settings
from dpo.config.home import at_home
from dpo.outcomes import EnvironmentFailure, UserError
from dpo.runs import (
    CONFIG_FILE,
    DATA_FILE,
    EVALUATION_FILE,
    HELDOUT_FILE,
    MADE_FROM,
    SUMMARY_FILE,
    TOKENS_FILE,
)
from dpo.terminal import print_plain

if TYPE_CHECKING:
    from dpo.training.loop import RunResult

RESULTS = {
    "export": "policy",
    "adapter": "adapters",
    "report.html": "report",
    "evaluation.json": "figures",
    "metrics.jsonl": "metrics",
    "checkpoints": "checkpoints",
    "config.yaml": "settings",
}
"""What a run directory may hold, as it is listed at the end."""


def train_and_report(config: Config, *, judge: str | None, arguments: Sequence[str]) -> RunResult:
    """Train, say what it came to, and write the figures and the report beside it.

    `arguments` is the command line, which a judge that runs the user's own code must be named on.
    """
    config = at_home(config)
    check_settings(config, arguments)
    match = None if judge is None else match_after_training(config, judge, arguments)
    check_models_of(config)
    from dpo.pages.page import REPORT_TEMPLATE, require_template
    from dpo.training.lock import standing
    from dpo.training.loop import train
    from dpo.training.preparation import with_beta_noted

    require_template(REPORT_TEMPLATE)
    config = with_beta_noted(config)
    result = train(config)
    from dpo.parallel.distributed import is_alone, is_main

    if not is_main():
        return result
    if result.status == "interrupted":
        print_plain(f"{config.run_dir}: stopped as asked; the same command goes on from there")
        return result
    if result.status == "already finished":
        print_plain(f"{config.run_dir} is finished: nothing to do (another run_dir starts a new run)")
        if not (result.run_dir / config.policy_name).exists():
            only = " --format adapter" if config.lora.is_all_there_is else ""
            print_plain(
                f"WARNING: {result.run_dir / config.policy_name} is not there any more: "
                f"dpo export {config.run_dir}{only} writes it from the newest checkpoint"
            )
    with standing(result.run_dir):
        _report(result.run_dir, config)
    if match is not None:
        _measure(match, config, alone=is_alone())
    return result


def _report(run_dir: Path, config: Config) -> None:
    """The held-out verdict and where everything is.

    The run is finished, so data that were removed or changed since it read them are said, and refuse nothing.
    """
    from dpo.pages.report import write_report

    with _said("what the training data hold is not in the report", run_dir / DATA_FILE):
        _describe_data(run_dir, config)
    if (run_dir / HELDOUT_FILE).is_file():
        with _said("the held-out figures are not in the report", run_dir / EVALUATION_FILE):
            _judge_heldout(run_dir, config)
    write_report(run_dir, config)
    for name, what in RESULTS.items():
        if (run_dir / name).exists():
            print_plain(f"{what:<12}{run_dir / name}")


@contextmanager
def _said(what: str, stale: Path) -> Iterator[None]:
    """Say what a finished run can't be described by any more, and remove what was written of it before."""
    try:
        yield
    except (UserError, EnvironmentFailure, FileNotFoundError) as error:
        stale.unlink(missing_ok=True)
        print_plain(f"WARNING: {what}: {error}")


def _describe_data(run_dir: Path, config: Config) -> None:
    """What the training data hold, unless it is there of these settings and this end of the run."""
    from dpo.huggingface.tokenizer_files import load_tokenizer

    made_from = _digest(run_dir / CONFIG_FILE, run_dir / SUMMARY_FILE)
    if _was_made_from(run_dir / DATA_FILE) != made_from:
        report, _ = report_data(config, load_tokenizer(run_dir / config.policy_name))
        write_json(run_dir / DATA_FILE, {**report, MADE_FROM: made_from})


def _judge_heldout(run_dir: Path, config: Config) -> None:
    """Figures of the log-probs that the run left, printed and kept, and a few pairs token by token."""
    from dpo.evaluation.heldout import load_heldout
    from dpo.evaluation.token_ratios import write_token_ratios
    from dpo.pages.accuracy_text import figures_as_text

    heldout, beta = load_heldout(run_dir, config), beta_of(config)
    figures = describe_heldout(heldout, beta=beta, seed=0)
    write_json(run_dir / EVALUATION_FILE, figures)
    made_from = _digest(run_dir / HELDOUT_FILE)
    if _was_made_from(run_dir / TOKENS_FILE) != made_from:
        settings = heldout_settings(EvaluateConfig(run=str(run_dir)), config)
        write_token_ratios(run_dir / TOKENS_FILE, settings, heldout, beta=beta, made_from=made_from)
    print_plain(figures_as_text(figures))


def _measure(match: WinrateConfig, config: Config, *, alone: bool) -> None:
    if alone:
        measure_winrate(match, config)
        return
    print_plain(
        f"several processes do not sample: dpo winrate --run {match.run} --judge {match.judge} "
        f"--max_new_tokens {match.max_new_tokens}"
    )


def _digest(*paths: Path) -> str:
    """SHA-256 of what the files hold: a time of modification says nothing after a copy or a set clock."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def _was_made_from(path: Path) -> str | None:
    """What a file of figures says that it was made from; None where there is no such file, or it is cut."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(MADE_FROM)
    except (FileNotFoundError, ValueError, AttributeError):
        return None
