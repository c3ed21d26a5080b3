"""What `dpo diffusion` prints: its results as lines of text."""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo.experiments.diffusion_results import DiffusionResults, ProcessFigures, SharingFigures


def processes_as_text(results: ProcessFigures) -> str:
    """Output variances in a few lines."""
    lines = [
        f"variance exploding, X_0 ~ N(0, {results['variance']:g}), {results['steps']} steps, from N(0, 1): "
        "output variance"
    ]
    for name, path in results["paths"].items():
        lines.append(
            f"  {name:<14}exact {path['exact'][-1]:.4f}  limit {path['limit']:.4f}  "
            f"network {path['network'][-1]:.4f}"
        )
    by = results["by_steps"]
    lines.append("DDPM process, exact denoiser: output variance")
    for name in ("ddim", "ddpm"):
        pairs = zip(by["T"], by[name], strict=True)
        lines.append(f"  {name:<6}" + "  ".join(f"T={T}: {value:.3f}" for T, value in pairs))
    return "\n".join(lines)


def sharing_as_text(results: SharingFigures) -> str:
    """Shares in a few lines."""
    lines = [
        f"one-parameter toy: part of the exact shift recovered (ELBO summed inside: {results['summed']:.3f})"
    ]
    for name, shares in results["shares"].items():
        pairs = zip(results["S"], shares, strict=True)
        lines.append(
            f"  sharing {name:<15}"
            + "  ".join(f"S={S}: {value:.3f}±{1.96 * e:.3f}" for S, (value, e) in pairs)
        )
    return "\n".join(lines)


def samples_as_text(results: DiffusionResults) -> str:
    """Samples before and after, beside ρ and π*."""
    lines = []
    for name, target in (("before", "rho"), ("after", "pi*")):
        part = results[name]
        lines.append(
            f"{name:<7} mean {_numbers(part['mean'])} ({target} {_numbers(part['exact_mean'])})  variance "
            f"{_numbers(np.diag(part['covariance']))} ({_numbers(np.diag(part['exact_covariance']))})  "
            f"reward {part['reward']:.3f}±{part['reward_half_width']:.3f} ({part['exact_reward']:.3f})"
        )
        if len(part["component_weights"]) > 1:
            lines.append(
                f"        component weights {_numbers(part['component_weights'])} "
                f"({_numbers(part['exact_component_weights'])})"
            )
    lines.append(f"share of the exact shift: {results['share_of_shift']:.3f}; {results['seconds']:.0f} s")
    return "\n".join(lines)


def _numbers(values: Any) -> str:
    return " ".join(f"{value:.3f}" for value in values)
