"""A model taken apart for training: loaded onto a mesh, put together again, asked for log-probs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dpo.config import ModelConfig
from dpo.data.batch import Batch
from dpo.huggingface.pretrained import Pretrained, load_pretrained
from dpo.models.linear import round_products
from dpo.models.quantized import BaseDtype, hold
from dpo.parallel.partition import Partition
from dpo.parallel.sharding import (
    PARAMETER_RULES,
    Rules,
    parameter_placement,
    parameter_sharding,
)
from dpo.training.placement import place_batch
from dpo.training.reference import Score, fingerprint_parameters
from dpo.training.step import Params, make_eval_step


class Policy(NamedTuple):
    """A model taken apart: what is trained, what is not, and how to put it together."""

    pretrained: Pretrained
    graphdef: nnx.GraphDef
    params: Params
    frozen: Params
    fingerprint: str
    """SHA-256 of the weights as loaded."""
    base: Policy | None = None
    """The same weights without adapters, where `params` are adapters: the reference."""

    def merge(self, params: Params) -> Any:
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params, self.frozen)


def load_policy(
    config: ModelConfig,
    mesh: Mesh,
    *,
    source: str | None = None,
    base_dtype: BaseDtype = "float32",
    rules: Rules = PARAMETER_RULES,
) -> Policy:
    """Load a model, `config.source` when no other source is given, straight into its places on the mesh.

    A model that is not trained may be held in a smaller `base_dtype`.
    """
    pretrained = load_pretrained(
        source or config.source,
        compute_dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
        attention=config.attention,
        placement=parameter_placement(mesh, rules),
        partition=Partition(mesh),
    )
    pretrained.model.scan_unroll = config.scan_unroll
    if config.round_products is not None:
        round_products(pretrained.model, config.round_products)
    hold(pretrained.model, base_dtype)
    graphdef, params, frozen = nnx.split(pretrained.model, nnx.Param, ...)
    params, frozen = nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)
    params = jax.device_put(params, parameter_sharding(mesh, params, rules))  # what `hold` made anew
    fingerprint = fingerprint_parameters((params, frozen) if frozen else params)
    return Policy(pretrained, graphdef, params, frozen, fingerprint)


def make_score(
    policy: Policy,
    mesh: Mesh,
    *,
    chunk: int,
    needs: frozenset[str] = frozenset(),
    micro_batches: int = 1,
) -> Callable[[Params], Score]:
    """Of parameters, the function from a batch to its responses' sums on the host."""
    eval_step = make_eval_step(
        policy.graphdef, chunk=chunk, needs=needs, mesh=mesh, micro_batches=micro_batches
    )

    def score_with(params: Params) -> Score:
        def score(batch: Batch) -> dict[str, np.ndarray]:
            return jax.tree.map(np.asarray, eval_step(params, policy.frozen, place_batch(mesh, batch)))

        return score

    return score_with
