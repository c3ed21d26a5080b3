"""A run's token ids, checked against model and objective, and laid out as batches."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypedDict

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from dpo.config import DataConfig, TrainingConfig
from dpo.data.batch import Batch
from dpo.data.loader import Loader, Packing, evaluation_loader, training_loader
from dpo.data.mismatched import add_mismatched
from dpo.data.ties import has_order, without_ties
from dpo.data.tokenized import TokenizedDataset
from dpo.losses import Objective
from dpo.losses.objectives import names_that_learn_from_single_responses
from dpo.models.attention import skips_blocks
from dpo.models.decoder_config import DecoderConfig
from dpo.outcomes import UserError
from dpo.parallel.distributed import from_main
from dpo.parallel.partition import Partition
from dpo.parallel.sharding import (
    own_rows,
    row_multiple,
)
from dpo.training.reading import Dataset
from dpo.training.reference import SOME_ROWS

EVALUATION_BATCH = 16
"""Prompts that are scored at a time where no gradient is taken, for each device that holds rows."""


def fit_to_objective(dataset: Dataset, objective: Objective, *, seed: int = 0) -> Dataset:
    """Add what the objective needs of the data, drawn by the seed, or say what is missing.

    Rows without a pair are left out where nothing compares but pairs, so that a loss is the mean over rows
    that have one.

    Raises:
      ValueError: when the objective compares responses and no prompt has two of different rank, or when it
        needs scores and a response has none.
    """
    tokens, terms = dataset.tokens, objective.terms or (objective,)
    if "scores" in objective.needs and (location := dataset.location_without_score()):
        raise UserError(
            f"{objective.name} needs scores; {location} has none (field 'scores', one a response)"
        )
    comparing = [term.name for term in terms if not term.learns_from_single_responses]
    if comparing and tokens.max_responses < 2:
        raise UserError(
            f"objective {', '.join(comparing)} compares responses, but every prompt has one; "
            f"allowed for such data are {', '.join(names_that_learn_from_single_responses())}"
        )
    ordered = [term.name for term in terms if not term.learns_from_ties]
    if ordered and not has_order(tokens).any():
        raise UserError(
            f"objective {', '.join(ordered)} compares responses of different rank, but all {len(tokens)} "
            "rows of data.train are ties; allowed: at least one row with two ranks"
        )
    if not objective.learns_from_ties:
        return dataset._replace(tokens=without_ties(tokens))
    return (
        dataset._replace(tokens=add_mismatched(tokens, seed=seed))
        if "mismatched" in objective.needs
        else dataset
    )


def require_preferences(tokens: TokenizedDataset, *, name: str) -> None:
    """Refuse held-out data that nothing can be said of: several responses a row, and all of them tied.

    Raises:
      ValueError: with the name of the data and what is allowed.
    """
    if tokens.max_responses > 1 and not has_order(tokens).any():
        raise UserError(
            f"data.eval is {name}: none of its {len(tokens)} rows has two responses of different rank; "
            "allowed: at least one that has, or labelled single responses, or no data.eval"
        )


def require_embeddings(dataset: Dataset, model: DecoderConfig, *, name: str) -> None:
    """Refuse data that a model has no embeddings for: looking them up would silently take others.

    Raises:
      ValueError: with the first row whose tokens are not in the model's vocabulary, or are more than its
        learned positions.
    """
    tokens = dataset.tokens
    longest = tokens.prompt_lengths + tokens.response_lengths.max(axis=1)
    largest = np.maximum(
        np.maximum.reduceat(tokens.prompt_tokens, tokens.prompt_offsets[:-1]),
        np.maximum.reduceat(tokens.response_tokens, tokens.response_offsets[tokens.row_offsets[:-1]]),
    )
    unknown, beyond = largest >= model.vocab_size, longest > model.max_positions
    if unknown.any():
        row = int(unknown.argmax())
        raise UserError(
            f"{name}: {dataset.location(row)} has token {largest[row]}, and the model "
            f"knows {model.vocab_size} from 0: its tokenizer has tokens that it was not resized for"
        )
    if model.position == "learned" and beyond.any():
        row = int(beyond.argmax())
        raise UserError(
            f"{name}: {dataset.location(row)} has {longest[row]} tokens, and the model "
            f"{model.max_positions} learned positions; allowed: data.max_length up to that"
        )


def make_loader(
    data: DataConfig,
    training: TrainingConfig,
    tokens: TokenizedDataset,
    mesh: Mesh,
    *,
    num_steps: int,
    platform: str | None = None,
) -> Loader:
    """The training batches: a function of (seed, step).

    Their shapes suit a platform, the mesh's own when not given.
    """
    return training_loader(
        tokens,
        batch_size=training.batch_size,
        num_steps=num_steps,
        seed=training.seed,
        shuffle=data.shuffle,
        **_packing(data, mesh, micro_batches=training.micro_batches, platform=platform),
    )


def scoring_loader(
    data: DataConfig, tokens: TokenizedDataset, mesh: Mesh, *, rows: Int[np.ndarray, " n"] | None = None
) -> Loader:
    """Every row of a data set once, or these only, where no gradient is taken: so many prompts a device."""
    packing = _packing(data, mesh)
    return evaluation_loader(tokens, batch_size=EVALUATION_BATCH * row_multiple(mesh), rows=rows, **packing)


class Arrangement(NamedTuple):
    """The batches in which a reference scores a data set, and what its numbers depend on besides."""

    make_batches: Callable[[], Iterable[Batch]]
    """Every row to be scored is in one at least; where it is in several the first counts."""
    make_probe: Callable[[], Batch]
    """Any of those that hold rows for the first time."""
    identity: dict[str, str]
    num_rows: int
    """How many rows are to be scored."""


def in_order(
    data: DataConfig, tokens: TokenizedDataset, mesh: Mesh, rows: Int[np.ndarray, " n"] | None = None
) -> Arrangement:
    """A data set's rows in its order: float32 sums are the same in any batch, but for rounding.

    `rows` are those that are to be scored, in ascending order; all when not given.
    """
    some = None if rows is None or len(rows) == len(tokens) else rows
    loader = scoring_loader(data, tokens, mesh, rows=some)
    return Arrangement(
        loader.batches,
        lambda: loader.batch(_same_random(loader.num_steps)),
        {} if some is None else {SOME_ROWS: hashlib.sha256(some.astype(np.int64).tobytes()).hexdigest()},
        len(tokens) if some is None else len(some),
    )


def as_trained(training: TrainingConfig, tokens: TokenizedDataset, loader: Loader) -> Arrangement:
    """Every row that a step has, in the batch that trains it first.

    In bfloat16 the same row has other sums in rows of another length, by more than a step changes them. The
    step's forward on the step's own batch has the same bits as the reference's, so a run starts at log-ratio
    zero exactly.
    """
    first_epoch = min(loader.num_steps, -(-len(tokens) // training.batch_size))

    whole = max(1, min(loader.num_steps, len(tokens) // training.batch_size))  # no row of a later epoch
    return Arrangement(
        lambda: loader.batches(0, first_epoch),
        lambda: loader.batch(_same_random(whole)),
        {"batches": _fingerprint_of_batches(loader, first_epoch, training.micro_batches)},
        len(loader.rows_read()),
    )


def _same_random(count: int) -> int:
    """A number below `count`, the same on every process."""
    return int(from_main(np.asarray(random.randrange(count))))


def _fingerprint_of_batches(loader: Loader, num_steps: int, micro_batches: int) -> str:
    steps = [(loader.indices(step).tolist(), tuple(loader.shape(step))) for step in range(num_steps)]
    return hashlib.sha256(repr((micro_batches, steps)).encode()).hexdigest()


class Compilation(TypedDict):
    """What shapes are planned for; see `plan_shapes`."""

    long_rows: bool
    steps_per_compilation: float | None


def compilation(platform: str) -> Compilation:
    """What suits a platform: the rows that its attention likes, and how dear another shape is."""
    steps = None if platform == "cpu" else STEPS_PER_COMPILATION
    return {"long_rows": skips_blocks(platform), "steps_per_compilation": steps}


STEPS_PER_COMPILATION = 100.0
"""On accelerators, where a step takes a fraction of a second and compiling it half a minute."""


def _packing(data: DataConfig, mesh: Mesh, *, micro_batches: int = 1, platform: str | None = None) -> Packing:
    return {
        "layout": data.layout,
        "row_length": data.row_length,
        "micro_batches": micro_batches,
        "rows_multiple": row_multiple(mesh),
        "own_rows": own_rows(mesh),
        **compilation(platform or Partition(mesh).platform),
    }
