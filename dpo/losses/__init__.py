"""Objectives: pure functions of `Scores` to one loss a prompt."""

from dpo.losses.objectives import (
    OBJECTIVES,
    default_values,
    make_objective,
    own_code_of,
    reward_scale,
    with_own_beta,
)
from dpo.losses.scores import MISMATCHED, Objective, RunningMean, Scores

__all__ = [
    "MISMATCHED",
    "OBJECTIVES",
    "Objective",
    "RunningMean",
    "Scores",
    "default_values",
    "make_objective",
    "own_code_of",
    "reward_scale",
    "with_own_beta",
]
