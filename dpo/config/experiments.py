"""The settings of the two experiments whose reward is known: the frontier, and diffusion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dpo.config.ranges import check_range
from dpo.config.run import ObjectiveSettings
from dpo.outcomes import UserError


@dataclass(frozen=True)
class FrontierConfig:
    """The DPO paper's controlled-sentiment experiment at the scale of a laptop: true reward against KL.

    The defaults are what docs/results.md records: about an hour on two cores.
    """

    output: str = "runs/frontier"
    """Directory for all runs, the figures and frontier.json; the same command goes on with what is there."""
    model: str = "embedded:smollm2-135m-instruct"
    """The reference, from which every policy starts."""
    train: str = "shipped:sentiment_train.jsonl"
    """The rankings to train on, the same for all objectives."""
    eval: str = "shipped:sentiment_eval.jsonl"
    """The held-out rankings, whose prompts the policies answer."""
    reward: str | None = None
    """The true reward that ranks and judges: vader, or module:function of your own; vader when not given,
    where train and eval are shipped data."""
    objectives: list[str] = field(default_factory=lambda: ["dpo", "ipo", "plackett_luce"])
    """Names of the objectives to compare."""
    betas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.5, 1.0])
    """Values of beta; every objective is run with each."""
    only: list[str] = field(default_factory=list)
    """The runs to train, in this order, such as [dpo:0.1,ipo:0.1]; all objectives with all betas when
    empty."""
    steps: int = 12
    """Number of optimiser steps of a run."""
    eval_every: int = 4
    """Steps between two points of a run's line."""
    batch_size: int = 4
    """Number of prompts in a step."""
    learning_rate: float = 6e-5
    """Learning rate at its peak; it then falls to zero in a line."""
    prompts: int | None = 40
    """Use the first so many held-out rows only, whose prompts are answered; all when null."""
    max_length: int = 128
    """Longest prompt plus response in training, in tokens."""
    max_new_tokens: int = 32
    """Longest response that is sampled, in tokens."""
    best_of: int = 8
    """Number of the reference's responses to each prompt, from which best-of-n is drawn for n = 1, 2, 4 and
    so on, and for this number."""
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Sampling temperatures at which win-rates are measured."""
    temperature_beta: float = 0.1
    """The beta, one of betas, whose policies' win-rates are drawn against temperature."""
    opponent: str = "data:best"
    """What the policies play against in these win-rates: data:best, data:worst or a model."""
    seed: int = 0
    """Seed of the order of the data and of the sampling."""

    def __post_init__(self) -> None:
        for name in ("objectives", "betas", "temperatures"):
            if not getattr(self, name):
                raise UserError(f"{name} is []; allowed is one or more")
        for name in ("steps", "eval_every", "batch_size", "prompts", "max_new_tokens", "best_of"):
            check_range(name, getattr(self, name), low=1)
        for beta in self.betas:
            check_range("betas", beta, above=0.0)
        for temperature in self.temperatures:
            check_range("temperatures", temperature, low=0.0)
        if self.temperature_beta not in self.betas:
            raise UserError(f"temperature_beta is {self.temperature_beta}; allowed are betas: {self.betas}")
        names = [f"{name}:{beta:g}" for name in self.objectives for beta in self.betas]
        for name in self.only:
            if name not in names:
                raise UserError(f"only has {name!r}; allowed are {', '.join(names)}")
        check_range("learning_rate", self.learning_rate, above=0.0)
        check_range("max_length", self.max_length, low=2)
        check_range("seed", self.seed, low=0, high=2**31 - 1)


@dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion-DPO on a mixture of Gaussians and a linear reward, where the optimum is known."""

    run_dir: str = "runs/diffusion_gaussian"
    """Directory for results and figures."""
    means: list[list[float]] = field(default_factory=lambda: [[0.0]])
    """Mean of each component of the data; all components weigh the same."""
    variance: float = 0.25
    """Variance of every component in every dimension."""
    reward: list[float] = field(default_factory=lambda: [2.0])
    """The vector g, one number for each dimension, of the reward r(x) = g x that preferences are drawn
    from."""
    objective: ObjectiveSettings = field(default_factory=lambda: {"name": "dpo", "beta": 1.0})
    """The objective: its name and hyper-parameters. The scale of its beta depends on weighting and
    reduction."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule of the DDPM process."""
    num_steps: int = 100
    """Number of steps T of the DDPM process."""
    prediction: Literal["noise", "data", "velocity"] = "velocity"
    """The quantity that the network predicts."""
    weighting: Literal["elbo", "uniform"] = "elbo"
    """Weights of the time steps: those of the ELBO, or one half everywhere (uniform) as in the released
    Diffusion-DPO."""
    reverse_variance: Literal["posterior", "beta"] = "beta"
    """Variance of x_(t-1) given x_t in the model, which sets the ELBO's weights."""
    reduction: Literal["sum", "mean"] = "sum"
    """Add the squared errors of a sample's dimensions (sum: beta is then the strength of the KL), or take
    their mean."""
    sharing: Literal["time_and_noise", "time", "nothing"] = "time_and_noise"
    """Whether the samples of one preference are noised at the same times with the same noise, at the same
    times only, or independently (nothing)."""
    num_times: int = 16
    """Number of noised copies of each sample in the loss."""
    num_preferences: int = 20_000
    """Number of preferences in the training set."""
    num_samples: int = 2
    """Number of samples that each preference ranks."""
    batch_size: int = 256
    """Number of preferences in an update."""
    updates: int = 500
    """Number of updates of the policy."""
    learning_rate: float = 1e-3
    """Learning rate of the policy at its peak (Adam, cosine decay)."""
    reference_batch_size: int = 1024
    """Number of samples in an update of the reference and of the network of the variance-exploding
    process."""
    reference_updates: int = 1500
    """Number of updates of the reference and of that network."""
    reference_learning_rate: float = 3e-3
    """Learning rate of the reference and of that network at its peak."""
    hidden_size: int = 64
    """Width of the network."""
    num_layers: int = 3
    """Number of hidden layers of the network."""
    eta: float = 1.0
    """Which sampler draws: 0 is DDIM, 1 is DDPM's ancestral sampler, and values between mix them."""
    num_drawn: int = 20_000
    """Number of samples drawn to measure with."""
    process_steps: int = 100
    """Number of steps of the variance-exploding process, which is run for one-dimensional Gaussian data
    only."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        if not self.means or any(len(mean) != len(self.reward) for mean in self.means):
            raise UserError(
                f"means is {self.means} and reward is {self.reward}; allowed: at least one mean, "
                "each with as many numbers as reward"
            )
        for name in ("variance", "learning_rate", "reference_learning_rate"):
            check_range(name, getattr(self, name), above=0.0)
        counts = ["num_steps", "num_times", "num_preferences", "batch_size", "updates", "num_layers"]
        counts += ["reference_batch_size", "reference_updates", "hidden_size", "process_steps"]
        for name in counts:
            check_range(name, getattr(self, name), low=1)
        check_range("num_samples", self.num_samples, low=2)
        check_range("num_drawn", self.num_drawn, low=2)
        check_range("eta", self.eta, low=0.0, high=1.0)
        check_range("seed", self.seed, low=0, high=2**31 - 1)
