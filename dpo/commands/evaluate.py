"""`dpo evaluate`: held-out figures of any policy against any reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.commands.checks import check_heldout, check_models, load_run
from dpo.commands.output import write_json
from dpo.config import Config, EvaluateConfig
from dpo.config.sources import show_source
from dpo.terminal import print_plain

if TYPE_CHECKING:
    from dpo.evaluation.figures import HeldoutFigures
    from dpo.evaluation.heldout import Heldout


def evaluate_heldout(given: EvaluateConfig) -> None:
    """Score, print the figures, and keep them where that was asked for or they are a run's own."""
    config = check_heldout(given, None if given.run is None else load_run(given.run))
    check_models({"policy": given.policy, "reference": given.reference})
    from dpo.evaluation.heldout import score_heldout
    from dpo.evaluation.rows_table import require_ending, write_rows
    from dpo.pages.accuracy_text import figures_as_text
    from dpo.training.program import enable_compilation_cache

    if given.rows is not None:
        require_ending(given.rows)
    enable_compilation_cache()
    heldout = score_heldout(config, log=print_plain)
    figures = describe_heldout(heldout, beta=given.beta or beta_of(config), seed=given.seed)
    print_plain(f"{config.model.source} against {config.model.reference} on {show_source(config.data.eval)}")
    print_plain(figures_as_text(figures))
    output = _output_of(given)
    if output is not None:
        write_json(output, figures)
        from dpo.evaluation.token_ratios import write_token_ratios

        tokens = Path(output).with_suffix(".tokens.json")
        write_token_ratios(tokens, config, heldout, beta=figures["beta"])
        print_plain(f"all figures: {output}; token by token, for a few pairs: {tokens}")
    if given.rows is not None:
        count = write_rows(given.rows, config, heldout, beta=figures["beta"])
        print_plain(f"all {count} responses, token by token: {given.rows}")


def beta_of(config: Config) -> float:
    """The β that turns log-ratios into rewards for a configuration's objective."""
    from dpo.losses import reward_scale
    from dpo.runs import specification

    return reward_scale(specification(config))


def describe_heldout(heldout: Heldout, *, beta: float, seed: int) -> HeldoutFigures:
    """All figures, and what was left out of them."""
    from dpo.evaluation.accuracy import describe

    counts = {"left_out": heldout.left_out, "truncated": heldout.truncated}
    return {**describe(heldout.rows, beta=beta, seed=seed), **counts}  # type: ignore[return-value]


def _output_of(given: EvaluateConfig) -> str | None:
    """Where figures are kept: where asked for, else in the run if nothing but the seed was given besides."""
    if given.run is None or given.output is not None:
        return given.output
    if replace(given, seed=0, rows=None) == EvaluateConfig(run=given.run):
        return str(Path(given.run) / "evaluation.json")
    print_plain(f"not the figures of {given.run} itself, so not kept there; --output FILE keeps them")
    return None
