"""Which model the policy is measured against, and its log-probs of a run's data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from jax.sharding import Mesh

from dpo.config import Config, DataConfig, ModelConfig
from dpo.huggingface.embedded import cache_directory
from dpo.losses import Objective
from dpo.parallel.sharding import parameter_rules
from dpo.training.datasets import Arrangement, in_order, scoring_loader
from dpo.training.policy import Policy, load_policy, make_score
from dpo.training.reading import Dataset
from dpo.training.reference import ReferenceStore, Score, open_or_compute
from dpo.training.step import Params

ReferenceKind = Literal["another model", "the model without adapters", "the policy as it starts"]


def reference_kind(config: Config, policy: Policy) -> ReferenceKind:
    """What the reference of these settings is, in words. Nothing else decides it."""
    if config.model.reference is not None:
        return "another model"
    if policy.base is None or config.lora.init is not None:
        return "the policy as it starts"
    return "the model without adapters"  # new adapters change nothing yet: the policy as it starts, too


def choose_reference(config: Config, policy: Policy, mesh: Mesh) -> Policy:
    """The model that the policy is measured against; another model is loaded, the others are there.

    The policy itself is returned where it is its own reference: training donates its parameters, so what
    needs them later copies them.
    """
    match reference_kind(config, policy):
        case "another model":
            rules = parameter_rules(config.mesh.rules)
            return load_policy(config.model, mesh, source=config.model.reference, rules=rules)
        case "the model without adapters":
            assert policy.base is not None
            return policy.base
        case "the policy as it starts":
            return policy


class Scoring(NamedTuple):
    """Log-probs of batches under given parameters of a model, and the other sums that an objective reads."""

    stored: Callable[[Params], Score]
    """What a reference's store has."""
    heldout: Callable[[Params], Score]
    """What an evaluation needs of the policy."""
    trained: Callable[[Params], Score]
    """What a store has, of a training batch, in bfloat16 to the bits of the step's forward."""


def make_scoring(config: Config, model: Policy, objective: Objective, mesh: Mesh) -> Scoring:
    """Compiled on first use; one program where all need the same."""

    def scored(needs: frozenset[str], micro_batches: int = 1) -> Callable[[Params], Score]:
        chunk = config.model.log_prob_chunk
        return make_score(model, mesh, chunk=chunk, needs=needs, micro_batches=micro_batches)

    stored = heldout = trained = scored(objective.reference_sums)
    if objective.sums != objective.reference_sums:
        heldout = scored(objective.sums)
    if config.model.forward_dtype == "bfloat16" and config.training.micro_batches > 1:
        trained = scored(objective.reference_sums, config.training.micro_batches)
    return Scoring(stored, heldout, trained)


def score_reference(
    config: Config,
    datasets: Mapping[str, Dataset],
    *,
    weights: str,
    score: Score,
    mesh: Mesh,
    needs: frozenset[str],
    log: Callable[[str], None],
    copy_in: Path,
    arrangements: Mapping[str, Arrangement],
    noted: Callable[[], None],
) -> dict[str, ReferenceStore]:
    """The reference's log-probs of several data sets, by their names, as `arrangements` say or in order.

    `noted` is called when some of them have reached the disk.
    """
    for dataset in datasets.values():  # rows that do not fit are found before anything is scored
        scoring_loader(config.data, dataset.tokens, mesh)
    return {
        name: open_reference(
            config.model,
            config.data,
            dataset,
            weights=weights,
            score=score,
            mesh=mesh,
            needs=needs,
            log=log,
            copy_in=copy_in,
            arrangement=arrangements.get(name),
            noted=noted,
        )
        for name, dataset in datasets.items()
    }


def open_reference(
    model: ModelConfig,
    data: DataConfig,
    dataset: Dataset,
    *,
    weights: str,
    score: Score,
    mesh: Mesh,
    needs: frozenset[str],
    log: Callable[[str], None],
    copy_in: Path | None = None,
    arrangement: Arrangement | None = None,
    noted: Callable[[], None] = lambda: None,
) -> ReferenceStore:
    """The reference's log-probs of a data set, from the store on disk where it has them.

    They are scored in the order of the data where no other arrangement is given.
    `needs` are extra sums that it is to have besides (`Objective.reference_sums`). A copy is kept in the
    directory `copy_in`, and looked for there first.
    """
    directory = Path(model.reference_store or cache_directory() / "reference")
    identity = {
        "weights": weights,
        "data": dataset.tokens.fingerprint,
        "dtype": model.compute_dtype
        if model.forward_dtype == model.compute_dtype
        else "float32, rounded products",
        "sums": ",".join(sorted({"logps", *needs})),
    }
    arrangement = arrangement or in_order(data, dataset.tokens, mesh)
    identity |= arrangement.identity
    return open_or_compute(
        directory,
        identity,
        score=score,
        make_batches=arrangement.make_batches,
        make_probe=arrangement.make_probe,
        num_rows=len(dataset.tokens),
        num_scored=arrangement.num_rows,
        num_responses=dataset.tokens.max_responses,
        locate=dataset.location,
        log=log,
        copy_in=copy_in,
        noted=noted,
    )
