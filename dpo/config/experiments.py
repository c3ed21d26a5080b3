"""The settings of the two experiments whose optimum is known: the frontier, and diffusion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dpo.config.ranges import check_range
from dpo.outcomes import UserError


@dataclass(frozen=True)
class FrontierConfig:
    """The DPO paper's controlled-sentiment experiment at the scale of a laptop: true reward against KL.

    The defaults are what docs/results.md records: about an hour on two cores.
    """

    output: str = "runs/frontier"
    """Directory of all runs, figures and frontier.json; the same command goes on with what is there."""
    model: str = "embedded:smollm2-135m-instruct"
    """Reference, and where every policy starts."""
    train: str = "shipped:sentiment_train.jsonl"
    """Rankings to train on, the same for all objectives."""
    eval: str = "shipped:sentiment_eval.jsonl"
    """Held-out rankings, whose prompts are answered."""
    reward: str = "vader"
    """The true reward: vader or module:function."""
    objectives: list[str] = field(default_factory=lambda: ["dpo", "ipo", "plackett_luce"])
    """Objectives, by name."""
    betas: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.5, 1.0])
    """Values of beta, each with a run of every objective."""
    only: list[str] = field(default_factory=list)
    """Of these runs, those to train, in this order, such as [dpo:0.1,ipo:0.1]; all when empty."""
    steps: int = 12
    """Optimiser steps of a run."""
    eval_every: int = 4
    """Steps between two points of a run's line."""
    batch_size: int = 4
    """Prompts a step."""
    learning_rate: float = 6e-5
    """Peak learning rate (linear decay)."""
    prompts: int | None = 40
    """Use only the first so many held-out prompts; all when null."""
    max_length: int = 128
    """Longest prompt plus response in training, in tokens."""
    max_new_tokens: int = 32
    """Longest sampled response."""
    best_of: int = 8
    """Responses of the reference to each prompt; best-of-n is drawn for n up to this."""
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Sampling temperatures of the win-rates."""
    temperature_beta: float = 0.1
    """The beta whose policies' win-rates are drawn against temperature; one of betas."""
    opponent: str = "data:best"
    """Opponent in these win-rates: data:best, data:worst or a model."""
    seed: int = 0
    """Of data order and sampling."""

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
    """Results and figures go here."""
    means: list[list[float]] = field(default_factory=lambda: [[0.0]])
    """Mean of each component of the data, all of the same weight."""
    variance: float = 0.25
    """Variance of every component in every dimension."""
    reward: list[float] = field(default_factory=lambda: [2.0])
    """g of the reward r(x) = g x that preferences are drawn from, one number a dimension."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "dpo", "beta": 1.0})
    """Name of an objective and its hyper-parameters; weighting and reduction set beta's scale."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule of the DDPM process."""
    num_steps: int = 100
    """Steps T of the DDPM process."""
    prediction: Literal["noise", "data", "velocity"] = "velocity"
    """What the network outputs."""
    weighting: Literal["elbo", "uniform"] = "elbo"
    """Weights of time steps: the ELBO's, or one half everywhere as in the released Diffusion-DPO."""
    reverse_variance: Literal["posterior", "beta"] = "beta"
    """The model's variance of x_(t-1) given x_t, which sets the ELBO's weights."""
    reduction: Literal["sum", "mean"] = "sum"
    """Sum of squares over a sample's dimensions (beta is the strength of the KL), or their mean."""
    sharing: Literal["time_and_noise", "time", "nothing"] = "time_and_noise"
    """What the samples of a preference are noised with in common."""
    num_times: int = 16
    """Noised copies of each sample inside the loss."""
    num_preferences: int = 20_000
    """Preferences in the training set."""
    num_samples: int = 2
    """Samples that a preference ranks."""
    batch_size: int = 256
    """Preferences an update."""
    updates: int = 500
    """Updates of the policy."""
    learning_rate: float = 1e-3
    """Peak learning rate of the policy (Adam, cosine decay)."""
    reference_batch_size: int = 1024
    """Samples an update of the reference, and of the network of the variance-exploding process."""
    reference_updates: int = 1500
    """Their updates."""
    reference_learning_rate: float = 3e-3
    """Their peak learning rate."""
    hidden_size: int = 64
    """Width of the network."""
    num_layers: int = 3
    """Hidden layers of the network."""
    eta: float = 1.0
    """Sampler: 0 is DDIM, 1 is DDPM's ancestral sampler."""
    num_drawn: int = 20_000
    """Samples drawn to measure with."""
    process_steps: int = 100
    """Steps of the variance-exploding process (one-dimensional Gaussian data only)."""
    seed: int = 0
    """Of everything."""

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
