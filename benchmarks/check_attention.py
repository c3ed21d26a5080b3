"""Attention of this machine's accelerator against plain attention in float32; prints a JSON line a finding.

    python -m benchmarks.check_attention --tokens 1024 --heads 32 8 64

Of each kind of attention (causal, with a window, with soft-capped scores, with both) and each implementation
that the platform has: the root mean square of the error of output and gradients, beside that of plain
attention in the same dtype, and seconds for one layer forward and backward. Every line holds all that was
found until then, so that a run which is cut off loses nothing; what fails is found, too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpo.models.attention import Implementation, attend, check_implementation
from dpo.outcomes import UserError
from dpo.parallel.partition import Partition

ON_PLATFORM: dict[str, tuple[Implementation, ...]] = {
    "gpu": ("ranges", "plain", "cudnn"),
    "tpu": ("splash", "plain"),
    "cpu": ("blocked", "plain"),
}
ROWS = 4
CLOSE = {"bfloat16": 1.5, "float32": 1e-5}
"""Errors that agree with plain attention: in bfloat16 at most so many times its own, in float32 of values."""


class Kind(NamedTuple):
    """What one kind of attention has besides that queries see what lies before them."""

    name: str
    window: int | None
    softcap: float | None


def kinds(tokens: int) -> tuple[Kind, ...]:
    """Of rows of so many tokens, what families have: Mistral's windows, Gemma 2's windows and soft-caps."""
    window = tokens // 4
    return (
        Kind("causal", None, None),
        Kind("window", window, None),
        Kind("soft-cap", None, 50.0),
        Kind("window and soft-cap", window, 50.0),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a row")
    parser.add_argument(
        "--heads", type=int, nargs=3, default=(32, 8, 64), help="query heads, key heads, size"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    for found in check(options.tokens, tuple(options.heads), options.repeats):
        print(json.dumps(found), flush=True)


def check(tokens: int, heads: tuple[int, int, int], repeats: int) -> Iterator[dict[str, Any]]:
    """Errors and seconds by implementation, dtype and kind, after each all so far; what is wrong by name."""
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "tokens": tokens, "heads": heads}
    found |= {"disagree": [], "failed": []}
    layout = _layout(tokens)
    for dtype in (jnp.bfloat16, jnp.float32):
        for kind in kinds(tokens):
            measured = _Measured(kind, dtype, layout, _arrays(tokens, heads, dtype), repeats)
            for name in ON_PLATFORM[jax.default_backend()]:
                key = f"{name} {jnp.dtype(dtype).name} {kind.name}"
                try:
                    found[key] = measured.of(name)
                except UserError as error:
                    found[key] = {"left out": str(error)}
                except Exception as error:  # whatever a kernel does here, the others are looked at
                    found[key] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
                found["failed"] += [key] if "failed" in found[key] else []
                found["disagree"] += [key] if found[key].get("agrees") is False else []
                yield found


class _Measured:
    """One kind of attention in one dtype."""

    def __init__(self, kind: Kind, dtype: Any, layout: dict, arrays: list[Array], repeats: int) -> None:
        self._kind, self._dtype, self._layout = kind, jnp.dtype(dtype), layout
        self._arrays, self._repeats = arrays, repeats
        self._plain: tuple[list, list[float]] | None = None

    def of(self, name: Implementation) -> dict[str, Any]:
        """Errors and seconds of an implementation."""
        partition = Partition()
        check_implementation(
            name, partition=partition, dtype=self._dtype, softcap=self._kind.softcap, has_key_bias=False
        )
        if self._plain is None:
            exact = self._run("plain", [x.astype(jnp.float32) for x in self._arrays])
            self._plain = exact, _errors(self._run("plain", self._arrays), exact)
        exact, rounding = self._plain
        errors = _errors(self._run(name, self._arrays), exact)
        close = CLOSE[self._dtype.name]
        most = [close * r for r in rounding] if self._dtype == jnp.bfloat16 else [close] * len(errors)
        return {
            "error": errors,
            "plain's": rounding,
            "agrees": all(e <= m for e, m in zip(errors, most, strict=True)),
            "seconds": min(self._seconds(name) for _ in range(self._repeats)),
        }

    def _seconds(self, name: Implementation) -> float:
        began = time.perf_counter()
        jax.block_until_ready(self._run(name, self._arrays))
        return time.perf_counter() - began

    def _run(self, name: Implementation, arrays: list) -> list:
        return _value_and_gradients(name, self._kind, self._layout, *arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _value_and_gradients(
    name: Implementation, kind: Kind, layout: dict, q: Array, k: Array, v: Array, out: Array
) -> list:
    attention = partial(
        attend,
        **layout,
        scale=q.shape[-1] ** -0.5,
        window=kind.window,
        softcap=kind.softcap,
        implementation=name,
        partition=Partition(),
    )
    value, pull = jax.vjp(attention, q, k, v)
    real = (layout["group"] != 0)[..., None, None]
    return [jnp.where(real, x, 0).astype(jnp.float32) for x in (value, *pull(jnp.where(real, out, 0)))]


def _errors(found: list, exact: list) -> list[float]:
    """Root mean squares relative to the exact values', of the output and the gradients of q, k and v."""
    pairs = zip(found, exact, strict=True)
    return [float(np.linalg.norm(np.asarray(a - b)) / np.linalg.norm(np.asarray(b))) for a, b in pairs]


def _arrays(tokens: int, heads: tuple[int, int, int], dtype: Any) -> list[Array]:
    H, G, C = heads
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (H, G, G, H)
    return [
        jax.random.normal(key, (ROWS, tokens, n, C)).astype(dtype) for key, n in zip(keys, sizes, strict=True)
    ]


def _layout(tokens: int) -> dict[str, Array]:
    """Rows of one prompt with two responses, and a twentieth of padding."""
    prompt, response = tokens // 2, tokens * 9 // 40
    rest = tokens - prompt - 2 * response
    branch = np.repeat([0, 1, 2, 0], [prompt, response, response, rest])
    group = np.repeat([1, 0], [tokens - rest, rest])
    within = [np.arange(prompt), prompt + np.arange(response), prompt + np.arange(response), np.arange(rest)]
    rows = (np.concatenate(within), group, branch)
    names = ("positions", "group", "branch")
    return {
        name: jnp.asarray(np.tile(row, (ROWS, 1)), jnp.int32) for name, row in zip(names, rows, strict=True)
    }


if __name__ == "__main__":
    main()
