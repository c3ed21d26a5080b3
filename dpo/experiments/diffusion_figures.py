"""The figures of `dpo diffusion`, as SVG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo.diffusion.mixture import Mixture
from dpo.experiments.diffusion_results import ProcessFigures, SharingFigures

COLOURS = {
    "mean_only": "#d62728",
    "stochastic": "#1f77b4",
    "deterministic": "#2ca02c",
    "ddim": "#2ca02c",
    "ddpm": "#1f77b4",
    "time_and_noise": "#1f77b4",
    "time": "#ff7f0e",
    "nothing": "#d62728",
}
_STYLE: Any = {
    "svg.hashsalt": "dpo",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_processes(path: Path, results: ProcessFigures) -> None:
    """Left: variance along the reverse path. Right: distance of the output variance from the data's, by T."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_paths(left, results)
        by = results["by_steps"]
        for name in ("ddim", "ddpm"):
            errors = results["variance"] - np.array(by[name])
            right.loglog(by["T"], errors, "o-", color=COLOURS[name], markersize=4, label=name.upper())
        guide = results["variance"] - by["ddpm"][-1]
        right.loglog(by["T"], guide * by["T"][-1] / np.array(by["T"]), ":", color="grey", label="slope −1")
        right.set_title("DDPM process, exact denoiser", loc="left")
        right.set_xlabel("T")
        right.set_ylabel("data variance − output variance")
        right.legend()
        _save(figure, path)


def _draw_paths(axes: Axes, results: ProcessFigures) -> None:
    num_steps, variance = results["steps"], results["variance"]
    t = np.linspace(1.0, 0.0, num_steps + 1)
    axes.plot(t, variance + t, "--", color="grey", linewidth=1, label="marginal σ² + t")
    every = max(1, num_steps // 16)
    for name, values in results["paths"].items():
        axes.plot(t, values["exact"], color=COLOURS[name], linewidth=1.5, label=name.replace("_", " "))
        axes.plot(t[::every], values["network"][::every], "o", color=COLOURS[name], markersize=3.5)
        axes.plot([-0.02], [values["limit"]], marker=5, color=COLOURS[name], clip_on=False, linestyle="")
    axes.axhline(variance, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlim(1.0, -0.03)
    axes.set_ylim(bottom=0.0)
    axes.set_title(f"Variance exploding, σ² = {variance:g}, {num_steps} steps", loc="left")
    axes.set_xlabel("t; dots: trained network; triangles: limits as T grows")
    axes.set_ylabel("variance")
    axes.legend()


def draw_sharing(path: Path, results: SharingFigures) -> None:
    """Part of the exact shift that is recovered, by the number of noised copies and by what they share."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.subplots()
        names = {
            "time_and_noise": "time and noise shared",
            "time": "time shared",
            "nothing": "nothing shared",
        }
        styles = {"time_and_noise": "-", "time": "-", "nothing": "--"}
        for name, shares in results["shares"].items():
            values, errors = np.array(shares).T
            axes.errorbar(
                results["S"],
                values,
                1.96 * errors,
                color=COLOURS[name],
                marker="o",
                markersize=4,
                linestyle=styles[name],
                label=names[name],
            )
        axes.axhline(results["summed"], color="grey", linestyle=":", label="whole ELBO inside the loss")
        axes.set_xscale("log", base=2)
        axes.set_xticks(results["S"], [str(S) for S in results["S"]])
        axes.set_ylim(0.0, 1.15)
        axes.set_xlabel("noised copies S inside the loss")
        axes.set_ylabel("part of the exact shift")
        axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.62))
        _save(figure, path)


def draw_samples(
    path: Path, samples: dict[str, Float[np.ndarray, "N D"]], reference: Mixture, optimum: Mixture
) -> None:
    """Samples before and after training against ρ and π*: histograms in one dimension, clouds in two."""
    dims = reference.means.shape[1]
    if dims > 2:
        return
    with matplotlib.rc_context(_STYLE):
        if dims == 1:
            figure = Figure(figsize=(6, 3.2), layout="constrained")
            _draw_histograms(figure.subplots(), samples, reference, optimum)
        else:
            figure = Figure(figsize=(9, 4.2), layout="constrained")
            panels = figure.subplots(1, 2, sharex=True, sharey=True)
            _draw_cloud(panels[0], samples["before"], reference, "before: samples, and contours of ρ")
            _draw_cloud(panels[1], samples["after"], optimum, "after: samples, and contours of π*")
        _save(figure, path)


def _draw_histograms(
    axes: Axes, samples: dict[str, Float[np.ndarray, "N 1"]], reference: Mixture, optimum: Mixture
) -> None:
    spread = 4.0 * np.sqrt(reference.variance)
    x = np.linspace(reference.means.min() - spread, optimum.means.max() + spread, 300)
    for name, mixture, label, colour in (
        ("before", reference, "ρ", "grey"),
        ("after", optimum, "π*", "#1f77b4"),
    ):
        axes.hist(samples[name][:, 0], 80, density=True, color=colour, alpha=0.35, label=f"samples {name}")
        axes.plot(x, np.exp(mixture.log_density(x[:, None])), color=colour, label=f"{label}, exact")
    axes.set_xlabel("x")
    axes.set_ylabel("density")
    axes.legend()


def _draw_cloud(axes: Axes, samples: Float[np.ndarray, "N 2"], mixture: Mixture, title: str) -> None:
    spread = 4.0 * np.sqrt(mixture.variance)
    low, high = mixture.means.min(axis=0) - spread, mixture.means.max(axis=0) + spread
    x, y = np.meshgrid(np.linspace(low[0], high[0], 120), np.linspace(low[1], high[1], 120))
    density = np.exp(mixture.log_density(np.stack([x.ravel(), y.ravel()], axis=1))).reshape(x.shape)
    axes.plot(*samples[:3000].T, ".", color="#1f77b4", markersize=1.5, alpha=0.5, rasterized=True)
    axes.contour(
        x, y, density, levels=density.max() * np.array([0.02, 0.1, 0.4, 0.8]), colors="black", linewidths=0.8
    )
    axes.set_title(title, loc="left")
    axes.set_aspect("equal")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None}, dpi=150)
