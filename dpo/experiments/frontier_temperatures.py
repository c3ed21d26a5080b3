"""The frontier's second figure: win-rates over a fixed opponent by sampling temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dpo.config import Config, EvaluateConfig, FrontierConfig, WinrateConfig, heldout_settings
from dpo.experiments.frontier_results import TemperatureLine
from dpo.judging.match import play
from dpo.judging.winrate import cut_warnings
from dpo.runs import EXPORT_DIRECTORY


def win_rates_by_temperature(
    given: FrontierConfig,
    configs: Mapping[tuple[str, float], Config],
    output: Path,
    *,
    batch_size: int,
    log: Callable[[str], None],
) -> list[TemperatureLine]:
    """Of the reference, and of each objective at one β; what was cut off stands beside, and is warned of."""
    players = {"reference": given.model} | {
        name: str(Path(config.run_dir) / EXPORT_DIRECTORY)
        for (name, beta), config in configs.items()
        if beta == given.temperature_beta
    }
    found: list[TemperatureLine] = []
    for name, source in players.items():
        log(f"win-rate over {given.opponent} by temperature: {name}")
        directory = output / "temperatures" / name
        settings = WinrateConfig(
            policy=source,
            opponent=given.opponent,
            data=given.eval,
            output=str(directory),
            judge=given.reward,
            limit=given.prompts,
            temperatures=given.temperatures,
            max_new_tokens=given.max_new_tokens,
            batch_size=batch_size,
            kl=False,
            seed=given.seed,
        )
        compared = EvaluateConfig(
            policy=source, reference=given.opponent, data=given.eval, limit=given.prompts
        )
        result, _ = play(settings, heldout_settings(compared, None), output=directory, log=log)
        figures = result["temperatures"]
        cut = {text: one["cut"] for text, one in figures.items() if "cut" in one}
        for text, shares in cut.items():
            for warning in cut_warnings(shares):
                log(f"! temperature {text}: {warning}")
        found.append(
            {
                "policy": name,
                "beta": None if name == "reference" else given.temperature_beta,
                "win_rates": {text: one["win_rate"] for text, one in figures.items()},
                "cut": {text: shares["policy"] for text, shares in cut.items()},
            }
        )
    return found
