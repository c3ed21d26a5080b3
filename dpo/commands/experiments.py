"""`dpo frontier` and `dpo diffusion`: what is run once to learn something."""

from __future__ import annotations

from collections.abc import Sequence

from dpo.commands.checks import require_file
from dpo.config import DiffusionConfig, FrontierConfig
from dpo.terminal import print_plain


def measure_frontier(given: FrontierConfig, arguments: Sequence[str]) -> bool:
    """Train, sample and draw all of it; False where it was asked to stop before its end.

    `arguments` is the command line, which rewards and objectives that run the user's own code must be named
    on.
    """
    for name in ("train", "eval"):
        require_file(name, getattr(given, name))
    from dpo.experiments.frontier import run
    from dpo.own_code import require_own_word, require_own_word_for_objectives
    from dpo.training.program import enable_compilation_cache

    if given.reward is not None and ":" in given.reward:
        require_own_word(given.reward, setting="reward", arguments=arguments)
    require_own_word_for_objectives(
        [{"name": name} for name in given.objectives], arguments=arguments, as_said="--objectives=[{}]"
    )
    enable_compilation_cache()
    if run(given, log=print_plain) is None:
        print_plain(f"{given.output}: stopped as asked; the same command goes on from there")
        return False
    print_plain(f"figures, tables and frontier.json: {given.output}")
    return True


def run_diffusion(config: DiffusionConfig, arguments: Sequence[str]) -> None:
    """Train on the known reward, sample, compare, and say where the figures are.

    `arguments` is the command line, which an objective that is the user's own code must be named on.
    """
    from dpo.losses import make_objective
    from dpo.own_code import require_own_word_for_objectives

    require_own_word_for_objectives([config.objective], arguments=arguments)
    make_objective(config.objective)
    from dpo.experiments.diffusion import run

    run(config, log=print_plain)
    print_plain(f"figures and results.json: {config.run_dir}")
