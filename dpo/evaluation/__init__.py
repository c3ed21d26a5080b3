"""What a trained policy is worth: held-out figures and their intervals."""

from dpo.evaluation.accuracy import describe
from dpo.evaluation.rows import Rows
from dpo.evaluation.statistics import cluster_bootstrap, num_needed, sign_test
from dpo.intervals import Interval, wilson

__all__ = [
    "Interval",
    "Rows",
    "cluster_bootstrap",
    "describe",
    "num_needed",
    "sign_test",
    "wilson",
]
