"""Rotary positions: which of a head's channels turn, how fast, and how a family stretches that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpo.outcomes import UserError


@dataclass(frozen=True)
class Rope:
    """One kind of rotary positions. Channel j turns together with channel j + n, n = len(inv_freq)."""

    inv_freq: tuple[float, ...]
    """Radians a position, of the first n channel pairs; later channels (partial rotary) do not turn."""
    attention_factor: float = 1.0
    """Multiplies cos and sin, so that scores grow by its square (yarn, longrope)."""
    long_inv_freq: tuple[float, ...] | None = None
    """Used instead by groups longer than `original_length` (longrope)."""
    dynamic: tuple[float, float] | None = None
    """(theta, factor): the base grows with the group's length beyond `original_length` (dynamic NTK)."""
    original_length: int | None = None
    """Longest group that `inv_freq` itself serves, for the two kinds above."""


def cos_sin(
    rope: Rope, positions: Int[Array, "R T"], group: Int[Array, "R T"]
) -> tuple[Float[Array, "R T n"], Float[Array, "R T n"]]:
    """Cosines and sines of every position, float32, computed once a forward pass."""
    angles = positions[..., None].astype(jnp.float32) * _frequencies(rope, positions, group)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "R T H C"], cos: Float[Array, "R T n"], sin: Float[Array, "R T n"]
) -> Float[Array, "R T H C"]:
    """Turn channels (j, j + n) of every head by the position's angle, in float32."""
    n = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x[..., :n].astype(jnp.float32), x[..., n : 2 * n].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x.dtype) for part in turned] + [x[..., 2 * n :]], axis=-1)


def make_rope(parameters: dict, head_dim: int, max_positions: int) -> Rope:
    """A `Rope` from Hugging Face's `rope_parameters`; `ValueError` lists the supported types."""
    rope_type = parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise UserError(f"rope_type is {rope_type!r}; supported are {', '.join(ROPE_TYPES)}")
    share = parameters.get("partial_rotary_factor", 1.0)
    dim = head_dim if rope_type == "proportional" else int(head_dim * share)
    try:
        return ROPE_TYPES[rope_type](parameters, dim, max_positions)
    except KeyError as error:
        raise UserError(
            f"rope_parameters of rope_type {rope_type} have no {error}, which it needs"
        ) from error
    except (ArithmeticError, ValueError) as error:
        raise UserError(
            f"rope_parameters of rope_type {rope_type} have values without sense: {error}"
        ) from error


def no_rope(rope: Rope) -> Rope:
    """Layers without positions, in the same shape as `rope`: every angle is zero."""
    return Rope(inv_freq=(0.0,) * len(rope.inv_freq))


def reversed_rope(rope: Rope) -> Rope:
    """Turning the other way."""
    long = rope.long_inv_freq
    return replace(
        rope,
        inv_freq=tuple(-angle for angle in rope.inv_freq),
        long_inv_freq=None if long is None else tuple(-angle for angle in long),
    )


def _frequencies(rope: Rope, positions: Int[Array, "R T"], group: Int[Array, "R T"]) -> Float[Array, "*n"]:
    """[1 1 n], or [R T n] where the frequencies depend on the length of a token's group."""
    inv_freq = jnp.asarray(rope.inv_freq, jnp.float32)[None, None, :]
    if rope.original_length is None:
        return inv_freq
    length = _group_length(positions, group)[..., None]
    if rope.long_inv_freq is not None:
        long_inv_freq = jnp.asarray(rope.long_inv_freq, jnp.float32)[None, None, :]
        return jnp.where(length > rope.original_length, long_inv_freq, inv_freq)
    assert rope.dynamic is not None
    theta, factor = rope.dynamic
    dim = 2 * len(rope.inv_freq)
    stretch = factor * jnp.maximum(length, rope.original_length) / rope.original_length - (factor - 1)
    base = theta * stretch.astype(jnp.float32) ** (dim / (dim - 2))
    return jnp.sign(inv_freq) * base ** -_exponents(dim)[None, None, :]


def _group_length(positions: Int[Array, "R T"], group: Int[Array, "R T"]) -> Int[Array, "R T"]:
    """Longest prompt-plus-response of each token's group, so that it never depends on packing."""

    def row(positions, group):
        longest = jax.ops.segment_max(positions, group, num_segments=group.shape[0] + 1)
        return longest[group] + 1

    return jax.vmap(row)(positions, group)


def _exponents(dim: int) -> np.ndarray:
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _inv_freq(theta: float, dim: int) -> np.ndarray:
    """theta^(-2j/dim), rounded as torch rounds it."""
    return np.float32(1.0) / np.float32(theta) ** _exponents(dim)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _default(parameters: dict, dim: int, max_positions: int) -> Rope:
    return Rope(_floats(_inv_freq(parameters["rope_theta"], dim)))


def _linear(parameters: dict, dim: int, max_positions: int) -> Rope:
    return Rope(_floats(_inv_freq(parameters["rope_theta"], dim) / np.float32(parameters["factor"])))


def _proportional(parameters: dict, dim: int, max_positions: int) -> Rope:
    """Some of the frequencies of a head that turns whole; its other channels do not turn (Gemma 4)."""
    turning = int(parameters.get("partial_rotary_factor", 1.0) * dim // 2)
    inv_freq = _inv_freq(parameters["rope_theta"], dim) / np.float32(parameters.get("factor") or 1.0)
    return Rope(_floats(np.where(np.arange(dim // 2) < turning, inv_freq, np.float32(0.0))))


def _dynamic(parameters: dict, dim: int, max_positions: int) -> Rope:
    """Beyond the configured length whatever the original one is said to be, as transformers counts it."""
    theta, factor = parameters["rope_theta"], parameters["factor"]
    return Rope(_floats(_inv_freq(theta, dim)), dynamic=(theta, factor), original_length=max_positions)


def _llama3(parameters: dict, dim: int, max_positions: int) -> Rope:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated."""
    inv_freq = _inv_freq(parameters["rope_theta"], dim).astype(np.float64)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * inv_freq / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return Rope(_floats((inv_freq * (kept + (1 - kept) / parameters["factor"])).astype(np.float32)))


def _yarn(parameters: dict, dim: int, max_positions: int) -> Rope:
    """YaRN (Peng et al. 2023): a linear ramp over channels between kept and interpolated frequencies."""
    theta, length = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_positions / length

    def channel(turns: float | int) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(parameters.get("beta_fast") or 32.0), channel(parameters.get("beta_slow") or 1.0)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    inv_freq = _inv_freq(theta, dim)
    stretched = inv_freq * (1 - ramp) + inv_freq / factor * ramp
    return Rope(_floats(stretched.astype(np.float32)), attention_factor=_yarn_attention(parameters, factor))


def _yarn_attention(parameters: dict, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return parameters["attention_factor"]
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return magnitude(parameters["mscale"]) / magnitude(parameters["mscale_all_dim"])
    return magnitude(1.0)


def _longrope(parameters: dict, dim: int, max_positions: int) -> Rope:
    """LongRoPE (Ding et al. 2024): one divisor a channel, another set beyond the original length."""
    length = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or max_positions / length
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    inv_freq = _inv_freq(parameters["rope_theta"], dim)
    short, long = (
        _floats(inv_freq / np.asarray(parameters[key], np.float32)) for key in ("short_factor", "long_factor")
    )
    return Rope(short, attention_factor=attention, long_inv_freq=long, original_length=length)


ROPE_TYPES = {
    "default": _default,
    "linear": _linear,
    "proportional": _proportional,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
