"""Attention of this machine's accelerator against plain attention in float32; prints one JSON line.

    python -m benchmarks.check_attention --tokens 1024 --heads 32 8 64

For each implementation that the platform has: the root mean square of the error of output and gradients, over
that of plain attention in the same dtype, and seconds for one layer forward and backward.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dpo.models.attention import Implementation, attend
from dpo.parallel.partition import Partition

ON_PLATFORM: dict[str, tuple[Implementation, ...]] = {
    "gpu": ("plain", "ranges", "cudnn"),
    "tpu": ("plain", "splash"),
    "cpu": ("plain", "blocked"),
}
ROWS = 4


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a row")
    parser.add_argument(
        "--heads", type=int, nargs=3, default=(32, 8, 64), help="query heads, key heads, size"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    print(json.dumps(check(options.tokens, tuple(options.heads), options.repeats)))


def check(tokens: int, heads: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Errors and seconds by implementation, in bfloat16 and float32."""
    layout = _layout(tokens)
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "tokens": tokens, "heads": heads}
    for dtype in (jnp.bfloat16, jnp.float32):
        arrays = _arrays(tokens, heads, dtype)
        exact = _run("plain", layout, [x.astype(jnp.float32) for x in arrays])
        rounding = _errors(_run("plain", layout, arrays), exact)
        for name in ON_PLATFORM[jax.default_backend()]:
            key = f"{name} {jnp.dtype(dtype).name}"
            try:
                found[key] = _describe(name, layout, arrays, exact, rounding, repeats)
            except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
                found[key] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return found


def _describe(
    name: Implementation, layout: dict, arrays: list, exact: list, rounding: list, repeats: int
) -> dict:
    out = _run(name, layout, arrays)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(_run(name, layout, arrays))
        times.append(time.perf_counter() - began)
    errors = _errors(out, exact)
    against = [e / r if r > 0 else e for e, r in zip(errors, rounding, strict=True)]
    return {"error": errors, "error over plain's": against, "seconds": min(times)}


@partial(jax.jit, static_argnums=0)
def _value_and_gradients(
    name: Implementation, layout: dict, q: Array, k: Array, v: Array, out: Array
) -> list:
    partition = Partition()
    scale = q.shape[-1] ** -0.5
    attention = partial(attend, **layout, scale=scale, implementation=name, partition=partition)
    value, pull = jax.vjp(attention, q, k, v)
    real = (layout["group"] != 0)[..., None, None]
    return [jnp.where(real, x, 0).astype(jnp.float32) for x in (value, *pull(jnp.where(real, out, 0)))]


def _run(name: Implementation, layout: dict, arrays: list) -> list:
    return _value_and_gradients(name, layout, *arrays)


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
