"""Held-out preferences with their log-probs under policy and reference: scored now, or kept by a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerBase

from dpo.config import Config
from dpo.config.sources import show_source
from dpo.data.preferences import Preference
from dpo.data.remaining import left_out
from dpo.evaluation.rows import Rows, as_pairs, check_finite, make_pairs
from dpo.outcomes import UserError
from dpo.parallel.sharding import own_mesh
from dpo.runs import HELDOUT_FILE
from dpo.training.adapted import load_reference
from dpo.training.datasets import require_embeddings, scoring_loader
from dpo.training.policy import load_policy, make_score
from dpo.training.reading import Dataset, read_dataset, read_texts
from dpo.training.reference import score_rows
from dpo.training.reference_model import open_reference
from dpo.training.same_tokens import require_same_tokens
from dpo.training.validation import DATA_KEY, TRUNCATED_KEY


class Heldout(NamedTuple):
    """Rows of numbers, and the preference that each row stands for."""

    rows: Rows
    preferences: list[Preference]
    left_out: dict[str, int]
    """Rows that were malformed or dropped at tokenisation, by reason."""
    truncated: int = 0
    """Rows of which a part is scored, since they are longer than data.max_length; drawn or not."""


def score_heldout(config: Config, *, log: Callable[[str], None]) -> Heldout:
    """Score `data.eval` under the policy (`model.source`) and then under `model.reference`.

    One model is in memory at a time; the reference's numbers come from the store where it has them.

    Raises:
      ValueError: when policy and reference make different tokens of the data, or a log-prob is not finite.
    """
    mesh = own_mesh(config.mesh)
    tokenizer, policy_logps, dataset = _score_policy(config, mesh)
    reference = load_reference(config, mesh)
    models = (str(config.model.source), tokenizer), reference.pretrained
    require_same_tokens(*models, config.data, {"data.eval": dataset})
    store = open_reference(
        config.model,
        config.data,
        dataset,
        weights=reference.fingerprint,
        score=make_score(reference, mesh, chunk=config.model.log_prob_chunk)(reference.params),
        mesh=mesh,
        needs=frozenset(),
        log=log,
    )
    tokens = dataset.tokens
    counts = tokens.num_responses
    ranks = np.zeros((len(tokens), tokens.max_responses), np.int64)
    present = np.arange(tokens.max_responses)[None] < counts[:, None]
    ranks[present] = tokens.ranks
    numbers = {
        "policy": policy_logps,
        "reference": store.rows["logps"],
        "lengths": tokens.scored_lengths,
        "present": present,
        "ranks": ranks,
        "origin": tokens.origin,
    }
    preferences = read_texts(config.data, heldout=True).preferences
    return _with_texts(numbers, preferences, left_out(dataset.read, tokens), tokens.num_truncated)


def load_heldout(run_dir: str | Path, config: Config) -> Heldout:
    """What the last held-out evaluation of a finished run left, with the texts from its data.

    Raises:
      ValueError: when the run left none, its data are others now, or a log-prob is not finite.
    """
    path = Path(run_dir) / HELDOUT_FILE
    if not path.is_file() or config.data.eval is None:
        raise UserError(f"{path} is not there: the run is not finished, or has no held-out data")
    read = read_texts(config.data, heldout=True)
    numbers, facts = _read_numbers(path)
    then = facts.get(DATA_KEY)
    changed = then is not None and then != read.content
    if changed or not 0 <= numbers["origin"].min() <= numbers["origin"].max() < len(read.preferences):
        raise UserError(
            f"{show_source(config.data.eval)} does not hold the preferences that {path} was made from; "
            "restore it, or see what dpo evaluate says of the present ones"
        )
    dropped = len(read.preferences) - len(numbers["origin"])
    reason = "dropped at tokenisation" if isinstance(config.data.eval, str) else "not drawn or not tokenised"
    at_tokenization = {f"{reason} (dpo inspect --heldout says why)": dropped} if dropped else {}
    truncated = int(facts.get(TRUNCATED_KEY, 0))
    found = _with_texts(numbers, read.preferences, {**read.skipped, **at_tokenization}, truncated)
    if not len(make_pairs(as_pairs(found.rows)).row):
        raise UserError(f"{path} is damaged: no row has two responses of different rank{_REMEDY}")
    return found


def _read_numbers(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays that a held-out evaluation left, and what is said of its data, by earlier versions less."""
    try:
        numbers = load_file(path)
        with safe_open(path, framework="np") as file:
            facts = file.metadata() or {}
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is damaged: {error}{_REMEDY}") from error
    missing = [name for name in (*_OF_RESPONSES, "origin") if name not in numbers]
    if missing:
        raise UserError(f"{path} is damaged: it has no {', '.join(missing)}{_REMEDY}")
    shape = numbers["policy"].shape
    for name, kinds in _OF_RESPONSES.items():
        array = numbers[name]
        if array.shape != shape or len(shape) != 2 or 0 in shape or array.dtype.kind not in kinds:
            what = f"{name} is {array.dtype}{list(array.shape)}, where policy is {list(shape)}"
            raise UserError(f"{path} is damaged: {what}{_REMEDY}")
    origin = numbers["origin"]
    if origin.shape != shape[:1] or origin.dtype.kind not in "iu":
        raise UserError(f"{path} is damaged: origin is {origin.dtype}{list(origin.shape)}{_REMEDY}")
    if not (numbers["present"].any(1).all() and (numbers["lengths"][numbers["present"] != 0] > 0).all()):
        raise UserError(f"{path} is damaged: a row has no response, or one of no token{_REMEDY}")
    return numbers, facts


_REMEDY = "; dpo evaluate makes the figures anew"
_OF_RESPONSES = {"policy": "f", "reference": "f", "lengths": "iu", "present": "biu", "ranks": "iu"}
"""An entry a row and response each, and the kinds of numbers that it may have."""


def _score_policy(config: Config, mesh: Mesh) -> tuple[PreTrainedTokenizerBase, np.ndarray, Dataset]:
    policy = load_policy(config.model, mesh)
    dataset = read_dataset(config.data, policy.pretrained.tokenizer, heldout=True)
    require_embeddings(dataset, policy.pretrained.model.config, name="data.eval")
    rows = score_rows(
        make_score(policy, mesh, chunk=config.model.log_prob_chunk)(policy.params),
        scoring_loader(config.data, dataset.tokens, mesh).batches(),
        num_rows=len(dataset.tokens),
        num_responses=dataset.tokens.max_responses,
        locate=dataset.location,
    )
    return policy.pretrained.tokenizer, rows["logps"], dataset


def _with_texts(
    numbers: dict[str, np.ndarray], preferences: list[Preference], left_out: dict[str, int], truncated: int
) -> Heldout:
    kept = [preferences[index] for index in numbers["origin"]]
    rows = Rows(
        policy=numbers["policy"].astype(np.float64),
        reference=numbers["reference"].astype(np.float64),
        lengths=numbers["lengths"].astype(np.int64),
        present=numbers["present"].astype(bool),
        ranks=numbers["ranks"].astype(np.int64),
        prompts=_number([repr(preference.prompt) for preference in kept]),
        sources=np.array([preference.source for preference in kept]),
    )
    check_finite(rows, [preference.location for preference in kept])
    return Heldout(rows, kept, left_out, truncated)


def _number(texts: Sequence[str]) -> np.ndarray:
    """A number for each text, the same for the same, and in the texts' order."""
    numbers = {text: number for number, text in enumerate(sorted(set(texts)))}
    return np.array([numbers[text] for text in texts], np.int64)
