"""Every case of the oracle file: TRL's own code, and the DPO authors', on eight pairs.

The file is not in the repository (a few of its facts are: `test_facts.py`). 44 of its 153 cases hold float32
numbers: TRL's α-divergence computes in float32, and its ORPO was evaluated so (the formula in float32 gives
the same bits). They agree to float32's precision; all others to 1e-9 in float64.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from score_cases import make_scores, value

from dpo.losses import Scores, make_objective

FOLDER = Path(os.environ.get("DPO_SHARED_DIR", Path(__file__).parents[3] / "shared"))
FILE = FOLDER / "golden" / "trl_losses.json"

# TRL's names and hyper-parameters, in ours.
NAMES = {
    "sigmoid": "dpo",
    "ipo": "ipo_norm",  # TRL divides by length; the paper's own form is the DPO authors' `ipo` below
    "exo_pair": "exo",
    "nca_pair": "nca",
    "sigmoid_norm": "dpo_norm",
}
DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "jensen_shannon"}


def _cases() -> list:
    if not FILE.exists():
        return []
    return [
        pytest.param(case, id=f"{i}-{case['tag']}-{case['loss_type']}")
        for i, case in enumerate(json.loads(FILE.read_text())["cases"])
    ]


def _is_float32(case: dict) -> bool:
    """Said so, or seen: eight float64 results are never all representable in float32."""
    values = case["per_example"] or [case["mean"]]
    return case["precision"] == "float32" or all(float(np.float32(x)) == x for x in values)


def _inputs() -> dict:
    return json.loads(FILE.read_text())["inputs"]


def _columns(inputs: dict, key: str) -> jnp.ndarray:
    return jnp.stack([jnp.asarray(inputs[key.format(side)]) for side in ("chosen", "rejected")], axis=1)


def _sums(rows: list[list[float]], limits) -> list[float]:
    return [float(np.sum(row[:limit])) for row, limit in zip(rows, limits, strict=True)]


def _scores() -> Scores:
    inputs = _inputs()
    lengths = _columns(inputs, "{}_lengths")
    shortest = np.asarray(lengths).min(axis=1)
    inputs |= {
        f"head_{model}_{side}": _sums(inputs[f"{model}_{side}_token_logps"], shortest)
        for model in ("policy", "ref")
        for side in ("chosen", "rejected")
    }
    inputs |= {
        f"collision_{side}": [float(np.sum(row)) for row in inputs[f"policy_{side}_token_log_sum_sq_probs"]]
        for side in ("chosen", "rejected")
    }
    return make_scores(
        _columns(inputs, "policy_{}_logps"),
        _columns(inputs, "ref_{}_logps"),
        lengths=lengths,
        policy_head=_columns(inputs, "head_policy_{}"),
        reference_head=_columns(inputs, "head_ref_{}"),
        log_collision=_columns(inputs, "collision_{}"),
    )


def _spec(case: dict, loss_type: str) -> dict:
    name = NAMES.get(loss_type, loss_type)
    spec = {"name": name, "beta": case["beta"]}
    if name == "sft":
        return {"name": "sft"}
    if name in ("robust", "exo", "aot", "aot_unpaired"):
        spec["label_smoothing"] = case["label_smoothing"]
    if "f_divergence_type" in case:
        spec["divergence"] = DIVERGENCES.get(case["f_divergence_type"], case.get("alpha"))
    if "ld_alpha" in case:
        spec["ld_alpha"] = case["ld_alpha"]
    if "discopop_tau" in case:
        spec["tau"] = case["discopop_tau"]
    if case.get("use_weighting"):
        spec["wpo"] = True
    return spec


def _dpo_trainer(case: dict, scores: Scores) -> np.ndarray:
    if isinstance(case["loss_type"], list):
        return value(
            make_objective(
                [
                    {**_spec(case, loss_type), "weight": weight}
                    for loss_type, weight in zip(case["loss_type"], case["loss_weights"], strict=True)
                ]
            ),
            scores,
        )
    return value(make_objective(_spec(case, case["loss_type"])), scores)


def _dpo_authors(case: dict, scores: Scores) -> np.ndarray:
    """Their cDPO smooths labels, which TRL's `sigmoid` ignores; their ipo has no lengths."""
    if case["reference_free"]:
        scores = scores._replace(reference=jnp.zeros_like(scores.reference))
    spec = {"name": "ipo", "beta": case["beta"]}
    if case["loss_type"] != "ipo":
        spec = {"name": "dpo", "beta": case["beta"], "label_smoothing": case["label_smoothing"]}
    return value(make_objective(spec), scores)


def _cpo_trainer(case: dict, scores: Scores) -> np.ndarray:
    """CPO's losses without its likelihood term, which TRL adds elsewhere, and without a reference."""
    beta, label_smoothing = case["beta"], case["label_smoothing"]
    free = scores._replace(reference=jnp.zeros_like(scores.reference))
    specs = {
        "sigmoid": {"name": "cpo", "beta": beta, "nll_weight": 0.0, "label_smoothing": label_smoothing},
        "hinge": {"name": "hinge", "beta": beta},
        "ipo": {"name": "ipo_norm", "beta": beta},
        "simpo": {
            "name": "simpo",
            "beta": beta,
            "gamma": case["simpo_gamma"],
            "label_smoothing": label_smoothing,
        },
    }
    return value(make_objective(specs[case["loss_type"]]), free)


def _orpo_trainer(case: dict, scores: Scores) -> np.ndarray:
    """TRL reports the ratio term with the sign of a reward."""
    return -value(make_objective({"name": "orpo", "beta": case["beta"], "nll_weight": 0.0}), scores)


OURS = {
    "trl 1.16.0 DPOTrainer._compute_loss": _dpo_trainer,
    "eric-mitchell preference_loss f8b8c0f": _dpo_authors,
    "trl 1.16.0 CPOTrainer.cpo_loss": _cpo_trainer,
    "trl 1.16.0 ORPOTrainer.odds_ratio_loss": _orpo_trainer,
}


def _in_their_order(case: dict, losses: np.ndarray, scores: Scores) -> np.ndarray:
    """AOT's entries are listed by sorted gap there; ours stay with their prompt."""
    if case["loss_type"] == "aot":
        return losses[np.argsort(scores.policy[:, 0] - scores.policy[:, 1])]
    if case["loss_type"] == "aot_unpaired":
        return losses[np.argsort(scores.log_ratio[:, 0])]
    return losses


@pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is not there (set DPO_SHARED_DIR)")
@pytest.mark.parametrize("case", _cases())
def test_oracle_case(case):
    with jax.enable_x64(True):
        scores = _scores()
        ours = _in_their_order(case, OURS[case["source"]](case, scores), scores)
        rtol, atol = (2e-5, 2e-6) if _is_float32(case) else (1e-9, 0.0)
        np.testing.assert_allclose(ours.mean(), case["mean"], rtol=rtol, atol=atol)
        if case["per_example"] is not None:
            np.testing.assert_allclose(ours, case["per_example"], rtol=rtol, atol=atol)


@pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is not there (set DPO_SHARED_DIR)")
def test_all_cases_are_held():
    cases = json.loads(FILE.read_text())["cases"]
    assert (len(cases), sum(map(_is_float32, cases))) == (153, 44)
