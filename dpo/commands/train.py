"""`dpo train`: the run, and after it the verdict, the report and, where asked for, the win-rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo.commands.checks import check_settings
from dpo.commands.evaluate import beta_of, describe_heldout
from dpo.commands.inspect import report_data
from dpo.commands.output import print_plain, write_json
from dpo.commands.winrate import match_after_training, measure_winrate
from dpo.config import Config, EvaluateConfig, WinrateConfig, heldout_settings

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


def train_and_report(config: Config, *, judge: str | None, arguments: Sequence[str]) -> bool:
    """Train and say what it came to; False where the run was asked to stop before its end.

    `arguments` is the command line, which a judge that runs the user's own code must be named on.
    """
    check_settings(config)
    match = None if judge is None else match_after_training(config, judge, arguments)
    from dpo.training.loop import train

    result = train(config)
    from dpo.parallel.distributed import is_alone, is_main

    if not is_main():
        return result.status != "interrupted"
    if result.status == "interrupted":
        print_plain(f"{config.run_dir}: stopped as asked; the same command goes on from there")
        return False
    if result.status == "already finished":
        print_plain(f"{config.run_dir} is finished: nothing to do (another run_dir starts a new run)")
    _report(result.run_dir, config)
    if match is not None:
        _measure(match, config, alone=is_alone())
    return True


def _report(run_dir: Path, config: Config) -> None:
    """The held-out verdict and where everything is."""
    from dpo.huggingface.pretrained import load_tokenizer
    from dpo.pages.report import write_report
    from dpo.runs import HELDOUT_FILE

    if not _is_newer(run_dir / "data.json", run_dir / "config.yaml"):  # that of another start
        write_json(run_dir / "data.json", report_data(config, load_tokenizer(run_dir / "export"))[0])
    if (run_dir / HELDOUT_FILE).is_file():
        _judge_heldout(run_dir, config)
    write_report(run_dir, config)
    for name, what in RESULTS.items():
        if (run_dir / name).exists():
            print_plain(f"{what:<12}{run_dir / name}")


def _judge_heldout(run_dir: Path, config: Config) -> None:
    """Figures of the log-probs that the run left, printed and kept, and a few pairs token by token."""
    from dpo.evaluation.heldout import load_heldout
    from dpo.evaluation.token_ratios import write_token_ratios
    from dpo.pages.accuracy_text import figures_as_text
    from dpo.runs import HELDOUT_FILE, TOKENS_FILE

    heldout, beta = load_heldout(run_dir, config), beta_of(config)
    figures = describe_heldout(heldout, beta=beta, seed=0)
    write_json(run_dir / "evaluation.json", figures)
    tokens = run_dir / TOKENS_FILE
    if not _is_newer(tokens, run_dir / HELDOUT_FILE):
        settings = heldout_settings(EvaluateConfig(run=str(run_dir)), config)
        write_token_ratios(tokens, settings, heldout, beta=beta)
    print_plain(figures_as_text(figures))


def _measure(match: WinrateConfig, config: Config, *, alone: bool) -> None:
    if alone:
        measure_winrate(match, config)
        return
    print_plain(f"several processes do not sample: dpo winrate --run {match.run} --judge {match.judge}")


def _is_newer(path: Path, other: Path) -> bool:
    return path.is_file() and path.stat().st_mtime_ns >= other.stat().st_mtime_ns
