"""One optimiser step as a pure function: batch → log-probs → objective → gradient → update.

The reference is data, `[P, K]`: no second model is here. Micro-batches are contiguous parts of a step's
rows, every prompt wholly in one part, and the loss is divided once by the step's prompt count, so the update
does not depend on how rows are split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dpo.data.batch import ROW_FIELDS, Batch
from dpo.losses import Objective, RunningMean, Scores
from dpo.losses.sums import EXTRA_SUMS, OfLogits, Scored
from dpo.models.log_probs import reduce_logits, token_log_probs
from dpo.outcomes import UserError
from dpo.parallel.partition import ONE_DEVICE, ROWS, Partition
from dpo.parallel.sharding import replicated
from dpo.training.metrics import Metrics, preference_metrics

Params = Any
"""A pure dict of arrays: the trainable (or the frozen) parameters of a model."""

Sums = Mapping[str, Float[Array | np.ndarray, "P K"]]
"""Per-token quantities summed over each response: "logps", and by name the extra sums that are needed."""

SumRows = Callable[[Params, Batch], Sums]
TrainStep = Callable[["TrainState", Params, Batch, Sums], tuple["TrainState", Metrics]]
EvalStep = Callable[[Params, Params, Batch], Sums]
TokenStep = Callable[[Params, Params, Batch], Float[Array, "R N"]]


class TrainState(NamedTuple):
    """All that a checkpoint holds."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    shift: RunningMean
    """Running mean that some objectives subtract (BCO); updated only for those."""
    reference: Params
    """Parameters of a reference that moves; empty where it is fixed, and its log-probs are all there is."""


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, moving: bool = False
) -> TrainState:
    """The state before the first update; a moving reference starts where the policy does."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        shift=RunningMean.zero(),
        reference=jax.tree.map(jnp.copy, params) if moving else {},
    )


def move_reference(state: TrainState, alpha: float) -> TrainState:
    """TR-DPO: reference ← α policy + (1 − α) reference (Gorbatovski et al. 2024, arXiv:2404.09656, §3).

    α = 1 is the paper's hard update, smaller ones its soft update.
    """
    reference = jax.tree.map(lambda new, old: alpha * new + (1 - alpha) * old, state.params, state.reference)
    return state._replace(reference=reference)


def response_sums(model: Any, batch: Batch, *, chunk: int, needs: frozenset[str] = frozenset()) -> Sums:
    """log π(y|x) of every response ("logps"), and the `EXTRA_SUMS` in `needs`. Absent responses are 0.

    Only the hidden states that predict a response token meet the vocabulary.
    """
    predicting = _predicting(model, batch)
    projection = {"chunk": chunk, "softcap": model.config.logit_softcap, "partition": model.partition}
    log_probs = token_log_probs(
        predicting,
        model.output_embedding,
        jnp.asarray(batch.target),
        rounds_backward=model.rounds != "neither",
        **projection,
    )
    sums = {"logps": _sum_over_responses(log_probs, batch)}

    def reduced(of_logits: OfLogits) -> Float[Array, "R N"]:
        return reduce_logits(of_logits, predicting, model.output_embedding, **projection)

    scored = Scored(
        log_probs,
        owner=jnp.asarray(batch.owner),
        lengths=jnp.asarray(batch.lengths),
        present=jnp.asarray(batch.present),
        reduce_logits=reduced,
    )
    extra = {name: EXTRA_SUMS[name].per_token(scored) for name in sorted(needs.intersection(EXTRA_SUMS))}
    return sums | {name: _sum_over_responses(values, batch) for name, values in extra.items()}


def make_scores(policy: Sums, reference: Sums, batch: Batch, shift: Array | None = None) -> Scores:
    """Sums under the policy and the reference, and the batch's own facts, as what objectives see."""
    extra: dict[str, Array] = {}
    for name, row in EXTRA_SUMS.items():
        extra |= {row.policy: jnp.asarray(policy[name])} if name in policy else {}
        extra |= {row.reference: jnp.asarray(reference[name])} if row.reference and name in reference else {}
    return Scores(
        policy=jnp.asarray(policy["logps"]),
        reference=jnp.asarray(reference["logps"]),
        lengths=jnp.asarray(batch.lengths),
        present=jnp.asarray(batch.present),
        ranks=jnp.asarray(batch.ranks),
        scores=jnp.asarray(batch.scores),
        shift=shift,
        **extra,
    )


def make_eval_step(
    graphdef: nnx.GraphDef,
    *,
    chunk: int,
    needs: frozenset[str] = frozenset(),
    mesh: Mesh | None = None,
    micro_batches: int = 1,
) -> EvalStep:
    """(parameters, frozen parameters, batch) → sums over its responses, without a gradient.

    On a mesh every device, and so every host, gets all the sums. `micro_batches` parts are taken one after
    the other, as the training step does: of the same batch it then has the same sums, rounding included.
    """

    def eval_step(params: Params, frozen: Params, batch: Batch) -> Sums:
        model = nnx.merge(graphdef, params, frozen)
        if micro_batches == 1:
            return response_sums(model, batch, chunk=chunk, needs=needs)
        parts = _split_rows(batch, micro_batches, Partition(mesh))
        by_part = jax.lax.map(lambda part: response_sums(model, part, chunk=chunk, needs=needs), parts)
        return jax.tree.map(lambda sums: sums.sum(0), by_part)

    return jax.jit(eval_step, out_shardings=None if mesh is None else replicated(mesh))


def make_token_step(graphdef: nnx.GraphDef, *, chunk: int) -> TokenStep:
    """(parameters, frozen parameters, batch) → log-prob of every scored token, placed as `batch.target`."""

    def token_step(params: Params, frozen: Params, batch: Batch) -> Float[Array, "R N"]:
        model = nnx.merge(graphdef, params, frozen)
        return token_log_probs(
            _predicting(model, batch),
            model.output_embedding,
            jnp.asarray(batch.target),
            chunk=chunk,
            softcap=model.config.logit_softcap,
            partition=model.partition,
        )

    return jax.jit(token_step)


def make_train_step(
    graphdef: nnx.GraphDef,
    objective: Objective,
    *,
    optimizer: optax.GradientTransformation,
    beta: float,
    micro_batches: int,
    chunk: int,
    state_sharding: Any = None,
    mesh: Mesh | None = None,
) -> TrainStep:
    """(state, frozen parameters, batch, the reference's sums) → (state, metrics). The state is donated.

    A step whose loss or gradient is not finite changes nothing but the step's number, and says so in the
    metric "skipped". `beta` scales the rewards/* metrics; the objective has its own. `state_sharding` is
    where the state comes from and returns to: left to the compiler, the second step could be another program
    than the first. It is also where the gradient is kept, part by part.
    """

    def keep(gradient: Params) -> Params:
        if state_sharding is None:
            return gradient
        return jax.lax.with_sharding_constraint(gradient, state_sharding.params)

    def train_step(state: TrainState, frozen: Params, batch: Batch, reference: Sums):
        def sum_rows(params: Params, rows: Batch) -> Sums:
            model = nnx.merge(graphdef, params, frozen)
            return response_sums(model, rows, chunk=chunk, needs=objective.needs)

        loss, policy, gradient, shift = loss_and_gradient(
            state.params,
            batch,
            reference,
            sum_rows=sum_rows,
            objective=objective,
            micro_batches=micro_batches,
            shift=state.shift,
            partition=Partition(mesh),
            keep=keep,
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        new = TrainState(
            state.step + 1, optax.apply_updates(state.params, updates), opt_state, shift, state.reference
        )
        grad_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        metrics = preference_metrics(make_scores(policy, reference, batch), beta)
        metrics |= {"loss": loss, "grad_norm": grad_norm, "skipped": 1.0 - finite}
        return kept._replace(step=new.step), metrics

    metrics_sharding = None if mesh is None else replicated(mesh)
    out_shardings = None if state_sharding is None else (state_sharding, metrics_sharding)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def loss_and_gradient(
    params: Params,
    batch: Batch,
    reference: Sums,
    *,
    sum_rows: SumRows,
    objective: Objective,
    micro_batches: int,
    shift: RunningMean | None = None,
    partition: Partition = ONE_DEVICE,
    keep: Callable[[Params], Params] = lambda gradient: gradient,
) -> tuple[Float[Array, ""], Sums, Params, RunningMean]:
    """Mean loss over the step's P prompts, the policy's sums, the gradient, and the moved running mean.

    An objective that looks across prompts gets the whole batch's sums even when its rows are split: they are
    computed part by part, the loss is differentiated in them, and each part is then pulled back. `keep` says
    where on the mesh a gradient is accumulated.
    """
    shift = RunningMean.zero() if shift is None else shift

    def mean_loss(policy: Sums):
        moved = shift
        if "shift" in objective.needs:
            moved = shift.update(*objective.observe(make_scores(policy, reference, batch)))
        losses = objective(make_scores(policy, reference, batch, moved.mean))
        return losses.mean(), moved

    if micro_batches == 1:

        def loss_of_params(params: Params):
            policy = sum_rows(params, batch)
            loss, moved = mean_loss(policy)
            return loss, (policy, moved)

        (loss, (policy, moved)), gradient = jax.value_and_grad(loss_of_params, has_aux=True)(params)
        return loss, policy, keep(gradient), moved

    parts = _split_rows(batch, micro_batches, partition)
    if objective.whole_batch or "shift" in objective.needs:
        by_part = jax.lax.map(lambda part: sum_rows(params, part), parts)
        policy = jax.tree.map(lambda sums: sums.sum(0), by_part)
        (loss, moved), cotangent = jax.value_and_grad(mean_loss, has_aux=True)(policy)

        def pulled_back(params: Params, part: Batch):
            products = jax.tree.map(jnp.vdot, sum_rows(params, part), cotangent)
            return sum(products.values(), start=jnp.zeros(())), None

        _, gradient = _accumulate(pulled_back, params, parts, keep)
        return loss, policy, gradient, moved

    def part_loss(params: Params, part: Batch):
        policy = sum_rows(params, part)
        losses = objective(make_scores(policy, reference, part))
        return jnp.where(part.present[:, 0], losses, 0).sum() / losses.shape[0], policy

    (loss, policy), gradient = _accumulate(part_loss, params, parts, keep)
    return loss, policy, gradient, shift


def _predicting(model: Any, batch: Batch) -> Float[Array, "R N D"]:
    """Hidden states of the positions that predict a scored token."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.group, batch.branch)
    predicting = jnp.take_along_axis(hidden, jnp.asarray(batch.source)[..., None], axis=1)
    return model.partition.constrain(predicting, ROWS)


def _sum_over_responses(values: Float[Array, "R N"], batch: Batch) -> Float[Array, "P K"]:
    num_prompts, num_responses = batch.present.shape
    owner = jnp.asarray(batch.owner).reshape(-1)
    sums = jax.ops.segment_sum(values.reshape(-1), owner, num_prompts * num_responses + 1)
    return sums[:-1].reshape(num_prompts, num_responses)


def _split_rows(batch: Batch, micro_batches: int, partition: Partition) -> Batch:
    """Stack the parts, `[M, R/M, …]`; per-prompt arrays are repeated, `present` only in its part.

    On a mesh the rows of every part are split over all devices.
    """
    num_rows = batch.tokens.shape[0]
    if num_rows % micro_batches:
        raise UserError(f"{num_rows} rows can't be split into {micro_batches} equal micro-batches")
    rows_per_part = num_rows // micro_batches

    def split(array: Array) -> Array:
        return partition.constrain(array.reshape(micro_batches, rows_per_part, *array.shape[1:]), None, ROWS)

    def repeat(array: Array) -> Array:
        return jnp.broadcast_to(array[None], (micro_batches, *array.shape))

    arrays = jax.tree.map(jnp.asarray, batch)._asdict().items()
    parts = Batch(**{name: split(array) if name in ROW_FIELDS else repeat(array) for name, array in arrays})
    here = jnp.asarray(batch.row)[None] // rows_per_part == jnp.arange(micro_batches)[:, None, None]
    return parts._replace(present=parts.present & here)


def _accumulate(function: Callable, params: Params, parts: Batch, keep: Callable[[Params], Params]):
    """Sum over the parts of ((value, aux), gradient) of `function(params, part)`, one part at a time."""
    value_and_grad = jax.value_and_grad(function, has_aux=True)
    first = jax.tree.map(lambda array: array[0], parts)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(value_and_grad, params, first)
    )

    def add(total, part):
        value, gradient = jax.tree.map(jnp.add, total, value_and_grad(params, part))
        return (value, keep(gradient)), None

    return jax.lax.scan(add, zeros, parts)[0]
