"""Where a model magnifies rounding, float32 is as near to float64 here as it is in transformers.

Scores of hundreds (no cap, no division by the head's size) or keys of four channels make of an ulp 1e-3 of a
logit, in either program; which of the two is nearer for one model is chance, so several are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_models import batch_arrays, case_config, tokens_of, write_checkpoint

from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder

torch = pytest.importorskip("torch")
from torch_models import torch_logits, torch_model  # noqa: E402

SEEDS = range(6)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gemma2", {"query_pre_attn_scalar": 1, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 1, "attn_logit_softcapping": 20.0}),
    ("qwen3_next", {"linear_key_head_dim": 4, "linear_conv_kernel_dim": 5}),
]


@contextmanager
def all_in_float64() -> Iterator[None]:
    """transformers' own code asks for float32 in norms, softmax and the delta rule: it gets more."""
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def to_float64(tensor: Any, *given: Any, **named: Any) -> Any:
        longer = {torch.float32: torch.float64}
        given = tuple(longer.get(each, each) if isinstance(each, torch.dtype) else each for each in given)
        if named.get("dtype") is torch.float32:
            named["dtype"] = torch.float64
        return to(tensor, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())
        patch.setattr(torch.Tensor, "to", to_float64)
        patch.setattr(
            torch.nn.functional,
            "softmax",
            lambda x, dim=None, dtype=None: softmax(x, dim=dim, dtype=torch.float64),
        )
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("case", "changes"), CASES)
def test_rounding_is_magnified_no_more_than_in_transformers(
    case: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    logits, ratios = None, []
    for seed in SEEDS:
        directory = write_checkpoint(tmp_path / str(seed), case_config(case) | changes, seed)
        graphdef, params = nnx.split(load_decoder(open_checkpoint(directory)))

        @jax.jit
        def compute(params: Any, *batch: Any, graphdef: Any = graphdef) -> Any:
            model = nnx.merge(graphdef, params)
            return model.logits(model.hidden(*batch))

        logits = logits or compute.lower(params, *batch_arrays(tokens_of(seed))).compile()
        ours = np.asarray(logits(params, *batch_arrays(tokens_of(seed))))
        theirs = torch_model(directory)
        rounded = torch_logits(theirs, tokens_of(seed))
        with all_in_float64():
            exact = torch_logits(theirs.double(), tokens_of(seed))
        assert exact.dtype == np.float64
        ratios.append(np.sqrt(np.mean((ours - exact) ** 2) / np.mean((rounded - exact) ** 2)))
    assert np.exp(np.mean(np.log(ratios))) <= 1.5, ratios
