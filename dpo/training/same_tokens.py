"""Another model that scores the policy's tokens must have made the same ones, and know them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.config import DataConfig
from dpo.data.parts import ALONE, Peers
from dpo.data.tokenized import TokenizedDataset
from dpo.huggingface.pretrained import Pretrained
from dpo.outcomes import UserError
from dpo.training.datasets import require_embeddings
from dpo.training.reading import Dataset, read_dataset


def require_same_tokens(
    policy: tuple[str, PreTrainedTokenizerBase],
    reference: Pretrained,
    data: DataConfig,
    datasets: Mapping[str, Dataset],
    *,
    peers: Peers = ALONE,
) -> None:
    """Refuse a reference that would make other tokens of the data than the policy, or lacks some of them.

    `policy` is its name and its tokenizer. `datasets` are the policy's, by the setting that names them:
    data.train and data.eval. Tokenizers that are the same in all that makes tokens make the same; else the
    data are tokenised again and compared.

    Raises:
      ValueError: naming both models and the data.
    """
    for name, dataset in datasets.items():
        require_embeddings(dataset, reference.model.config, name=f"{name} under {reference.source}")
    source, tokenizer = policy
    if _makes(tokenizer) == _makes(reference.tokenizer):
        return
    for name, dataset in datasets.items():
        theirs = read_dataset(data, reference.tokenizer, heldout=name == "data.eval", peers=peers)
        if not has_rows_of(theirs.tokens, dataset.tokens):
            raise UserError(
                f"{source} and {reference.source} make different tokens of {name}; a log-ratio needs "
                "the same tokenizer and chat template in both (data.chat_template can give both the same)"
            )


def require_same_vocabulary(policy: Pretrained, reference: Pretrained, *, longest: int) -> None:
    """Refuse a reference that lacks tokens which the policy can sample, or means others by their numbers.

    `longest` is the most tokens that a prompt and its sample have.

    Raises:
      ValueError: naming both models, and what is allowed.
    """
    ours, theirs = policy.model.config, reference.model.config
    other = _first_other_name(policy.tokenizer, reference.tokenizer, range(ours.vocab_size))
    problem = None
    if ours.vocab_size > theirs.vocab_size:
        problem = f"of {ours.vocab_size} tokens, of which it knows {theirs.vocab_size}"
    elif other is not None:
        problem = f"of other tokens: {other} is another one there"
    elif theirs.position == "learned" and longest > theirs.max_positions:
        problem = f"of up to {longest} tokens, and it has {theirs.max_positions} learned positions"
    if problem is not None:
        raise UserError(
            f"training.eval_samples asks {reference.source} about samples of {policy.source}, {problem}; "
            "allowed: training.eval_samples 0, or a reference of the same vocabulary"
        )


def name_alike(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, rows: Iterable[Iterable[int]]
) -> bool:
    """Whether two tokenizers mean the same tokens by the numbers in these rows."""
    return _first_other_name(first, second, sorted({token for row in rows for token in row})) is None


def _first_other_name(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, tokens: Sequence[int]
) -> int | None:
    """The first of the tokens that one of two tokenizers knows under another name, or not at all."""
    if _makes(first) == _makes(second):
        return None
    ours, theirs = ({number: name for name, number in one.get_vocab().items()} for one in (first, second))
    return next((token for token in tokens if ours.get(token) != theirs.get(token)), None)


def _makes(tokenizer: PreTrainedTokenizerBase) -> object:
    """All that decides which tokens a text becomes, where the tokenizer can say it; else itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    return backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map


def has_rows_of(theirs: TokenizedDataset, ours: TokenizedDataset) -> bool:
    """Whether each of our rows is among theirs, by where it stands in the data: same prompt and responses.

    Rows without a pair may have been left out of ours, and responses been added behind a row's own.
    """
    place = {int(origin): row for row, origin in enumerate(theirs.origin)}
    for row, origin in enumerate(ours.origin.tolist()):
        other = place.get(origin)
        if other is None or not np.array_equal(theirs.prompt(other), ours.prompt(row)):
            return False
        own, kept = theirs.responses(other), ours.responses(row)
        if not all(map(np.array_equal, own, kept[: len(own)])):
            return False
        if not all(map(np.array_equal, theirs.scored_of(other), ours.scored_of(row))):
            return False
    return True
