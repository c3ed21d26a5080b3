"""Exact attention by the kernels that come with JAX, behind our mask: splash on TPUs, cuDNN's on GPUs.

Both keep scores in the chip's own memory. Our mask comes from the batch, so both are given it as an array:
one entry a pair of slots, shared by all heads, where `plain` has a float32 score a pair *and* head.

Splash walks blocks of a row's mask and skips those of which no query may see a key; rows are taken one after
the other. cuDNN adds the mask to the scores, visits everything, and knows half precision only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpo.models.attention_blocked import SAVED_NAMES
from dpo.models.precision import told_nothing

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

LANES = 128
"""Slots a block of splash at least, of which all are multiples."""

LARGEST_BLOCK = 512
"""Slots a block of splash at most."""


def attend_splash(
    q: Float[Array, "R T H C"],
    k: Float[Array, "R T G C"],
    v: Float[Array, "R T G C"],
    mask: Bool[Array, "R T T"],
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "R T H C"]:
    """softmax(scale * q k, where visible) v; a query that sees nothing gives zeros and gets no gradient.

    `interpret` runs the kernel where there is no TPU.
    """
    length = q.shape[1]
    block = block_size(length)
    padded = length + -length % block
    q, k, v = (_pad(x, padded).swapaxes(1, 2) for x in (q * scale, k, v))
    row = partial(_splash_row, softcap=softcap, block=block, interpret=interpret)
    out = jax.vmap(row)(q, k, v, _seeing(mask, padded)).swapaxes(1, 2)
    return _blank_unseeing(out[:, :length], mask)


def attend_cudnn(
    q: Float[Array, "R T H C"],
    k: Float[Array, "R T G C"],
    v: Float[Array, "R T G C"],
    mask: Bool[Array, "R T T"],
    *,
    scale: float,
    kernel: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "R T H C"]:
    """The same by `jax.nn.dot_product_attention`, of which `xla` runs where there is no GPU."""
    length = q.shape[1]
    padded = length + length % 2  # its backward pass wants an even number
    out = jax.nn.dot_product_attention(
        *(_pad(x, padded) for x in (q, k, v)),
        mask=_seeing(mask, padded)[:, None],
        scale=scale,
        implementation=kernel,
    )
    return _blank_unseeing(out[:, :length], mask)


def block_size(length: int) -> int:
    """The largest block to a multiple of which a row grows by an eighth at most, else the smallest."""
    sizes = range(LARGEST_BLOCK, LANES, -LANES)
    return next((size for size in sizes if -length % size <= length // 8), LANES)


def _splash_row(
    q: Float[Array, "H T C"],
    k: Float[Array, "G T C"],
    v: Float[Array, "G T C"],
    mask: Bool[Array, "T T"],
    *,
    softcap: float | None,
    block: int,
    interpret: bool,
) -> Float[Array, "H T C"]:
    # Imported here: it takes as long as the rest of JAX, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, make_splash_mha_single_device

    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = make_splash_mha_single_device(
        mask=mask[None],
        block_sizes=BlockSizes(**dict.fromkeys(sizes, block)),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED_NAMES[0],
        interpret=interpret,
    )
    return _attend_exactly(kernel, q, k, v) if q.dtype == jnp.float32 else _attend_by(kernel, q, k, v)


def _attend_by(kernel: SplashAttentionKernel, q: Array, k: Array, v: Array) -> Array:
    # Made while tracing, the kernel holds this as a traced value and then asks for its truth (JAX 0.10).
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    out = kernel(q, k, v)
    assert isinstance(out, Array)  # without residuals
    return out


@jax.custom_vjp
def _attend_exactly(kernel: SplashAttentionKernel, q: Array, k: Array, v: Array) -> Array:
    """The same with products of float32 in full: splash names no precision, so JAX is told one meanwhile."""
    with _in_full():
        return _attend_by(kernel, q, k, v)


def _exactly_forward(
    kernel: SplashAttentionKernel, q: Array, k: Array, v: Array
) -> tuple[Array, Callable[[Array], tuple[Array, ...]]]:
    with _in_full():
        return jax.vjp(partial(_attend_by, kernel), q, k, v)


def _exactly_backward(
    pull: Callable[[Array], tuple[Array, ...]], cotangent: Array
) -> tuple[Array | None, ...]:
    with _in_full():
        return (None, *pull(cotangent))


_attend_exactly.defvjp(_exactly_forward, _exactly_backward)


def _in_full() -> AbstractContextManager[None]:
    return jax.default_matmul_precision("highest") if told_nothing() else nullcontext()


def _pad(x: Float[Array, "R T N C"], length: int) -> Float[Array, "R length N C"]:
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))


def _seeing(mask: Bool[Array, "R T T"], length: int) -> Bool[Array, "R length length"]:
    """The mask of padded rows in which each query sees a key, at least its own: kernels divide by a sum."""
    missing = (0, length - mask.shape[1])
    return jnp.pad(mask, ((0, 0), missing, missing)) | jnp.eye(length, dtype=bool)[None]


def _blank_unseeing(out: Float[Array, "R T H C"], mask: Bool[Array, "R T T"]) -> Float[Array, "R T H C"]:
    return jnp.where(mask.any(axis=-1)[..., None, None], out, 0)
