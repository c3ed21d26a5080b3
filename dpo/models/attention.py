"""Who sees whom, and the attention that follows from it.

    tokens     p p p a a b b | q q c . .       one row: two groups and padding
    group      1 1 1 1 1 1 1 | 2 2 2 0 0
    branch     0 0 0 1 1 2 2 | 0 0 1 0 0

A key is visible when it is not later in the row, belongs to the same group (0 is padding), and is the prompt
(branch 0) or the query's own branch. A window of W counts positions, not slots: sibling responses lie between
a prompt and a late branch in the row, but not in the sequence.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpo.models.attention_blocked import attend_blocked, on_own_rows_and_heads
from dpo.models.attention_fast import attend_cudnn, attend_splash
from dpo.models.precision import precision_of
from dpo.models.soft_cap import soft_cap
from dpo.outcomes import UserError
from dpo.parallel.partition import ONE_DEVICE, ROWS, TENSOR, Partition

Implementation = Literal["auto", "plain", "blocked", "ranges", "splash", "cudnn"]
Window = int | Int[Array, ""] | None

AUTOMATIC: dict[str, tuple[tuple[int, Implementation], ...]] = {
    "cpu": ((1, "blocked"),),
    "gpu": ((1, "ranges"),),
}
"""What `auto` is by platform, from so many tokens a row on, where it is not `plain` (docs/performance.md,
"Attention on accelerators"): on CPUs as measured, on GPUs what keeps no scores and reads no block in vain."""

REQUIRED_PLATFORM = {"splash": "tpu", "cudnn": "gpu", "ranges": "gpu"}
"""Where an implementation runs, if not everywhere."""

NO_WINDOW = 2**30
"""A window that hides nothing, for scanned layers of which only some have one."""

_HIDDEN = -1e30
"""Score of an invisible key: finite, so that a row of padding has no NaN in value or gradient."""


def skips_blocks(platform: str) -> bool:
    """Whether `auto` visits only what some query may see: a long row then costs no more than short ones."""
    return platform in ("cpu", "gpu")


def check_implementation(
    implementation: Implementation,
    *,
    partition: Partition,
    dtype: jnp.dtype,
    softcap: float | None,
    has_key_bias: bool,
) -> None:
    """That a model's attention can be computed so.

    Raises:
      ValueError: saying what of the model or the device does not go with it, and what is allowed.
    """
    required = REQUIRED_PLATFORM.get(implementation, partition.platform)
    reasons = []
    if partition.platform != required:
        reasons.append(f"needs a {required} and the platform is {partition.platform}")
    if has_key_bias and implementation not in ("auto", "plain"):
        reasons.append("has no bias of keys, which this model has (ALiBi)")
    if implementation == "cudnn" and softcap is not None:
        reasons.append(f"has no soft-capping, which this model has ({softcap})")
    if implementation == "cudnn" and dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"takes bfloat16 activations and the compute dtype is {dtype.name}")
    if reasons:
        allowed = "auto, plain" if has_key_bias else "auto, plain, blocked"
        raise UserError(f"attention {implementation} {'; it '.join(reasons)}. Allowed here: {allowed}")


def choose_implementation(
    implementation: Implementation, *, partition: Partition, length: int, has_key_bias: bool
) -> Implementation:
    """What rows of `length` are computed by: `auto` by `AUTOMATIC`, and a bias of keys is only in `plain`."""
    if has_key_bias:
        return "plain"
    if implementation != "auto":
        return implementation
    table = AUTOMATIC.get(partition.platform, ((1, "plain"),))
    return next(name for least, name in table if length >= least)


def visible(
    positions: Int[Array, "R T"], group: Int[Array, "R T"], branch: Int[Array, "R T"], window: Window = None
) -> Bool[Array, "R T T"]:
    """Mask [row, query, key] of rows that attend to themselves."""
    slot = jnp.arange(positions.shape[1])
    query, key = (slice(None), slice(None), None), (slice(None), None, slice(None))
    mask = (slot[:, None] >= slot[None, :])[None]
    mask = mask & (group[query] == group[key]) & (group[key] != 0)
    mask = mask & ((branch[key] == 0) | (branch[key] == branch[query]))
    return mask if window is None else mask & (positions[query] - positions[key] < window)


def visible_in_cache(
    positions: Int[Array, "R S"], length: int, window: Window = None
) -> Bool[Array, "R S length"]:
    """Mask [row, query, slot] over a cache whose slot is the position that it holds."""
    slot = jnp.arange(length)[None, None, :]
    mask = slot <= positions[..., None]
    return mask if window is None else mask & (positions[..., None] - slot < window)


def attend(
    q: Float[Array, "R T H C"],
    k: Float[Array, "R T G C"],
    v: Float[Array, "R T G C"],
    *,
    positions: Int[Array, "R T"],
    group: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    scale: float,
    window: Window = None,
    softcap: float | None = None,
    key_bias: Float[Array, "R T H"] | None = None,
    implementation: Implementation = "auto",
    partition: Partition = ONE_DEVICE,
) -> Float[Array, "R T H C"]:
    """Attention within rows; all implementations give the same result where a token sees anything.

    `key_bias` is added to a key's scores (ALiBi); only `plain` has it. On a mesh rows stay on their devices,
    and so do heads where both kinds of them can be split; else every device of the axis computes all heads.
    Away from their platforms `ranges` and `splash` are interpreted and `cudnn` is XLA's stand-in, for tests.
    """
    heads = partition.divides(TENSOR, q.shape[2], k.shape[2])
    q, k, v = (partition.constrain(x, ROWS, None, heads) for x in (q, k, v))
    implementation = choose_implementation(
        implementation, partition=partition, length=q.shape[1], has_key_bias=key_bias is not None
    )
    if implementation == "blocked":
        return attend_blocked(
            q,
            k,
            v,
            positions=positions,
            group=group,
            branch=branch,
            scale=scale,
            window=window,
            softcap=softcap,
            partition=partition,
        )
    if implementation in ("ranges", "splash"):
        layout = (positions, group, branch, *([] if window is None else [jnp.asarray(window, jnp.int32)]))
        kernel = _ranges_on_device if implementation == "ranges" else _splash_on_device
        on_device = partial(kernel, scale=scale, softcap=softcap, platform=partition.platform)
        return on_own_rows_and_heads(partition, on_device, q, k, v, *layout)
    mask = visible(positions, group, branch, window)
    if implementation == "cudnn":
        out = attend_cudnn(
            q, k, v, mask, scale=scale, kernel="cudnn" if partition.platform == "gpu" else "xla"
        )
    else:
        out = attend_plain(q, k, v, mask, scale=scale, softcap=softcap, key_bias=key_bias)
    return partition.constrain(out, ROWS, None, heads)


def _ranges_on_device(
    q: Array, k: Array, v: Array, *layout: Array, scale: float, softcap: float | None, platform: str
) -> Array:
    """`ranges` over the rows and heads of one device; `layout` as `visible` takes it."""
    from dpo.models.attention_ranges import attend_ranges  # imports Pallas, which no CPU needs

    names = ("positions", "group", "branch", "window")
    where = dict(zip(names, layout, strict=False))
    return attend_ranges(q, k, v, **where, scale=scale, softcap=softcap, interpret=platform != "gpu")


def _splash_on_device(
    q: Array, k: Array, v: Array, *layout: Array, scale: float, softcap: float | None, platform: str
) -> Array:
    """`splash` over the rows and heads of one device; `layout` as `visible` takes it."""
    return attend_splash(q, k, v, visible(*layout), scale=scale, softcap=softcap, interpret=platform != "tpu")


def attend_plain(
    q: Float[Array, "R T H C"],
    k: Float[Array, "R S G C"],
    v: Float[Array, "R S G C"],
    mask: Bool[Array, "R T S"],
    *,
    scale: float,
    softcap: float | None = None,
    key_bias: Float[Array, "R S H"] | None = None,
) -> Float[Array, "R T H C"]:
    """softmax(scale * q k, where visible) v in float32; query head h reads key head h // (H // G)."""
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    return attend_cached(q, keys, values, mask, scale=scale, softcap=softcap, key_bias=key_bias)


def attend_cached(
    q: Float[Array, "R T H C"],
    keys: Float[Array, "R G C S"],
    values: Float[Array, "R G S C"],
    mask: Bool[Array, "R T S"],
    *,
    scale: float,
    softcap: float | None = None,
    key_bias: Float[Array, "R S H"] | None = None,
) -> Float[Array, "R T H C"]:
    """`attend_plain` over keys and values laid out as a cache holds them."""
    R, T, H, C = q.shape
    G = keys.shape[1]
    q = q.reshape(R, T, G, H // G, C)
    scores = scale * jnp.einsum(
        "rtgqc,rgcs->rgqts", q, keys, precision=precision_of(q, keys), preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    if key_bias is not None:
        S = keys.shape[-1]
        scores += key_bias.transpose(0, 2, 1).reshape(R, G, H // G, 1, S)
    scores = jnp.where(mask[:, None, None, :, :], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    out = jnp.einsum("rgqts,rgsc->rtgqc", weights, values, precision=precision_of(values))
    return out.reshape(R, T, H, C)
