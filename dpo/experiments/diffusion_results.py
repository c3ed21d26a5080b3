"""What results.json of `dpo diffusion` holds, as the types of its JSON objects."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from dpo.diffusion.preference import Sharing


class PathFigures(TypedDict):
    """Variance along the reverse path of one sampler, a value a step."""

    exact: list[float]
    network: list[float]
    limit: float
    """Of the output, as the number of steps grows."""


class StepFigures(TypedDict):
    """Output variance by the number of steps, with an exact denoiser."""

    T: list[int]
    ddim: list[float]
    ddpm: list[float]


class ProcessFigures(TypedDict):
    """Variances of samplers."""

    variance: float
    """Of the data."""
    steps: int
    paths: dict[str, PathFigures]
    by_steps: StepFigures


class SharingFigures(TypedDict):
    """Part of the exact shift that is recovered, by what noised copies share and by their number."""

    S: list[int]
    """Copies inside the loss."""
    summed: float
    """With the whole ELBO inside the loss."""
    shares: dict[Sharing, list[list[float]]]
    """Value and standard error, an entry of `S` each."""


class SampleFigures(TypedDict):
    """Samples beside what their target has exactly; half widths are of 95% intervals of the sampling."""

    mean: list[float]
    mean_half_width: list[float]
    exact_mean: list[float]
    covariance: list[list[float]]
    exact_covariance: list[list[float]]
    reward: float
    reward_half_width: float
    exact_reward: float
    component_weights: list[float]
    exact_component_weights: list[float]


class DiffusionResults(TypedDict):
    """The whole file."""

    processes: NotRequired[ProcessFigures]
    shared_noise: NotRequired[SharingFigures]
    """Both of one Gaussian in one dimension."""
    before: SampleFigures
    after: SampleFigures
    share_of_shift: float
    """How far the samples' mean moved along the way to π*'s."""
    seconds: float
