"""Names and types of held-out figures, as evaluation.json has them; an interval is [estimate, low, high]."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

Estimate = list[float]
"""[estimate, low, high], the ends of its 95% interval."""
Baseline = Literal["longer", "reference_logp", "reference_logp_per_token"]
"""A score that took no training."""


class CalibrationFigures(TypedDict):
    """Reliability of the confidence in an order; lists have an entry a bin that holds pairs."""

    ece: float
    """Expected calibration error."""
    confidence: list[float]
    accuracy: list[float]
    share: list[float]
    pairs: list[int]


class Chance(TypedDict):
    """What a policy without any preference would reach."""

    top_1: float
    log_likelihood: float


class RankingFigures(TypedDict):
    """How whole rankings are reproduced."""

    kendall_tau: Estimate
    top_1: Estimate
    ndcg: Estimate
    log_likelihood: Estimate
    chance: Chance


class PartFigures(TypedDict):
    """Some of the pairs."""

    pairs: int
    prompts: int
    accuracy: Estimate
    ties: int
    margin: Estimate
    log_ratio: NotRequired[dict[str, Estimate]]
    """Of chosen and rejected responses; not of single labelled ones."""
    calibration: CalibrationFigures


class SourceFigures(PartFigures):
    """The pairs of one source, with what baselines reach on them."""

    longer: Estimate
    reference_logp: Estimate
    reference_logp_per_token: Estimate


class HeldoutFigures(TypedDict):
    """All figures of held-out preferences."""

    prompts: int
    rows: int
    pairs: int
    unpaired: bool
    """True where rows are single labelled responses, compared with the reference itself."""
    beta: float
    accuracy: Estimate
    ties: int
    """Pairs with δ = 0, which count ½."""
    margin: Estimate
    """Of δ = β × difference of log-ratios."""
    log_ratio: dict[str, Estimate]
    """Nats of chosen and rejected responses, and the same per token; what there is none of is left out."""
    baselines: dict[Baseline, Estimate]
    over_baselines: dict[Baseline, Estimate]
    """The policy's accuracy minus that of each, on the same pairs."""
    by_length: dict[str, PartFigures]
    calibration: CalibrationFigures
    accuracy_wilson: NotRequired[Estimate]
    """Wilson's interval, where prompts have one pair each."""
    rankings: NotRequired[RankingFigures]
    """Where rows have more than two responses."""
    by_source: NotRequired[dict[str, SourceFigures]]
    mean_of_sources: NotRequired[dict[str, Estimate]]
    """Accuracy and the baselines', every source counting the same."""
    left_out: NotRequired[dict[str, int]]
    """Rows that no figure is of, by reason; in figures that are kept."""
    truncated: NotRequired[int]
    """Rows of which a part was scored; of a mixture also those that were not drawn."""
