"""Token ids that a model has no embedding for: looked up, they would silently be others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dpo.models.decoder_config import DecoderConfig
from dpo.outcomes import UserError


def require_known(rows: Iterable[Sequence[int]], config: DecoderConfig, *, source: str) -> None:
    """Refuse rows of tokens that a model does not know, or that are longer than its learned positions.

    Raises:
      ValueError: with the model's source, the token or the length, and what is allowed.
    """
    for row in rows:
        largest = max(row, default=0)
        if largest >= config.vocab_size:
            raise UserError(
                f"{source}: its tokenizer makes token {largest}, the model knows {config.vocab_size} from "
                "0: the model was not resized for its tokenizer, or the tokenizer is another model's"
            )
        if config.position == "learned" and len(row) > config.max_positions:
            raise UserError(
                f"{source}: a text has {len(row)} tokens, and the model {config.max_positions} learned "
                "positions"
            )
