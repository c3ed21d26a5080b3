"""Which linears have an adapter, and the adapters of a model: chosen by name, added, read back.

Adapters belong to Hugging Face's linears, under whose names peft chooses and stores them. Where one of those
holds several of our projections (Phi-3's qkv_proj), the projections share one A and have a part of B each.
Layers are stacked, so are adapters: a layer without one has α = 0, and then nothing of it is ever moved.
The modules themselves, and what they compute, are in `dpo.models.lora`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dpo.huggingface.binding import Binding, bind
from dpo.huggingface.families import Family
from dpo.models.decoder import Decoder
from dpo.models.decoder_config import DecoderConfig
from dpo.models.lora import DoraLinear, LoraLinear, Method
from dpo.models.parts import WEIGHTS
from dpo.outcomes import UserError

ALL_LINEAR = "all-linear"
"""Every linear; not the output head."""


class Adapter(NamedTuple):
    """The adapters of one of Hugging Face's linears in all layers, [in, out], outputs in their order.

    Of a linear that all layers share there is one.
    """

    binding: Binding
    a: Float[Array | np.ndarray, "L D r"]
    b: Float[Array | np.ndarray, "L r F"]
    magnitude: Float[Array | np.ndarray, "L F"] | None
    """m of DoRA; None for the others, and in new DoRA adapters, where it is ‖W‖."""
    alpha: Float[Array | np.ndarray, " L"]
    """0 in a layer without an adapter."""


def model_bindings(family: Family, config: DecoderConfig) -> list[Binding]:
    """Every parameter of a decoder with its tensors' names, without making any."""
    shapes = {path: leaf.shape for path, leaf in _leaves(_abstract(config)).items()}
    return bind(family, config, shapes)


def linear_bindings(bindings: Iterable[Binding]) -> list[Binding]:
    """Those of kernels of linears: what may have an adapter."""
    return [binding for binding in bindings if binding.leaves[0].endswith(".kernel")]


def module_names(binding: Binding) -> tuple[str, ...]:
    """Hugging Face's modules of a binding, one a layer, such as model.layers.0.self_attn.q_proj."""
    return tuple(binding.rule.module_of(name) for name in binding.names)


def choose_linears(
    bindings: Sequence[Binding], target_modules: str | Sequence[str]
) -> list[tuple[Binding, tuple[bool, ...]]]:
    """The linears that are meant, and in which of their layers, by peft's rules.

    A list has ends of names (q_proj, self_attn.q_proj) or whole ones; a text is "all-linear" or a regular
    expression that matches whole names.

    Raises:
      ValueError: when something names no linear of this model, or an embedding; with what is allowed.
    """
    linears = linear_bindings(bindings)
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        return [(binding, (True,) * len(binding.names)) for binding in linears]
    names = [name for binding in linears for name in module_names(binding)]
    tables = [
        name
        for binding in bindings
        if binding.leaves[0].endswith(".embedding")
        for name in module_names(binding)
    ]
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    is_meant = _matches if isinstance(target_modules, str) else _ends_with
    for pattern in patterns:
        adapted_tables = [name for name in tables if is_meant(pattern, name)]
        if adapted_tables or not any(is_meant(pattern, name) for name in names):
            what = f"means {adapted_tables[0]}, which is" if adapted_tables else "is"
            raise UserError(
                f"target_modules: {pattern!r} {what} no linear of this model; {_allowed(linears)}"
            )
    chosen = [
        (binding, tuple(any(is_meant(p, name) for p in patterns) for name in module_names(binding)))
        for binding in linears
    ]
    return [(binding, layers) for binding, layers in chosen if any(layers)]


def new_adapters(
    chosen: Iterable[tuple[Binding, tuple[bool, ...]]], *, rank: int, alpha: float, seed: int
) -> list[Adapter]:
    """Adapters that change nothing yet: B is 0, and A uniform within 1/√D as peft draws it."""
    return [_new_adapter(binding, layers, rank, alpha, seed) for binding, layers in chosen]


def add_adapters(model: Decoder, adapters: Iterable[Adapter], method: Method) -> None:
    """Put adapters on a model's linears, in place; the linears themselves are shared, not copied."""
    for adapter in adapters:
        binding = adapter.binding
        a, alpha = nnx.LoRAParam(_held(binding, adapter.a)), _held(binding, adapter.alpha)
        magnitudes = _split(binding, adapter.magnitude)
        for leaf, b, magnitude in zip(binding.leaves, _split(binding, adapter.b), magnitudes, strict=True):
            parent, name = locate(model, leaf)
            base, b = getattr(parent, name), _held(binding, b)
            if method.use_dora:
                magnitude = None if magnitude is None else _held(binding, magnitude)
                made = DoraLinear(base, a, b, alpha, method, magnitude=magnitude)
            else:
                made = LoraLinear(base, a, b, alpha, method)
            setattr(parent, name, made)


def get_adapters(model: Decoder, bindings: Iterable[Binding]) -> tuple[list[Adapter], Method]:
    """The adapters of a model, on the host, as `add_adapters` takes them."""
    adapters, methods = [], set()
    for binding in linear_bindings(bindings):
        modules = [getattr(*locate(model, leaf)) for leaf in binding.leaves]
        if not isinstance(modules[0], LoraLinear):
            continue
        use_dora = modules[0].method.use_dora
        methods.add(modules[0].method)
        adapters.append(
            Adapter(
                binding,
                a=_stacked(binding, modules[0].lora_a),
                b=_join(binding, [module.lora_b for module in modules]),
                magnitude=_join(binding, [module.lora_magnitude for module in modules]) if use_dora else None,
                alpha=_stacked(binding, modules[0].lora_alpha),
            )
        )
    assert len(methods) == 1, "one method for all adapters, and at least one"
    return adapters, methods.pop()


def plain_shapes(model: Decoder) -> Decoder:
    """The same model without adapters, with shapes for parameters."""
    return _abstract(
        model.config, compute_dtype=model.compute_dtype, remat=model.remat, attention=model.attention
    )


def _new_adapter(binding: Binding, layers: tuple[bool, ...], rank: int, alpha: float, seed: int) -> Adapter:
    D, F = _sizes(binding)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(binding.key.encode()))
    bound = 1 / math.sqrt(D)
    a = jax.random.uniform(key, (len(layers), D, rank), jnp.float32, -bound, bound)
    here = jnp.asarray(layers)
    return Adapter(
        binding,
        a=jnp.where(here[:, None, None], a, 0.0),
        b=jnp.zeros((len(layers), rank, F)),
        magnitude=None,
        alpha=jnp.where(here, alpha, 0.0),
    )


def _sizes(binding: Binding) -> tuple[int, int]:
    """Inputs and outputs of one of Hugging Face's linears."""
    size_in, size_out = binding.shape[::-1] if binding.rule.transposed else binding.shape
    return size_in, size_out


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"target_modules: {pattern!r} is not a regular expression: {error}") from error


def _ends_with(end: str, name: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _allowed(linears: Sequence[Binding]) -> str:
    ends = dict.fromkeys(module_names(binding)[0].rpartition(".")[2] for binding in linears)
    return (
        f"allowed: {ALL_LINEAR}, a list of names or their ends ({', '.join(ends)}), or a text that as a "
        f"regular expression matches whole names such as {module_names(linears[0])[0]}"
    )


def _split(binding: Binding, outputs: Array | np.ndarray | None) -> Sequence[Any]:
    """Hugging Face's outputs (the last axis) as those of our projections."""
    if outputs is None:
        return [None] * len(binding.leaves)
    fusion = binding.rule.fusion
    return [outputs] if fusion is None else fusion.split(np.asarray(outputs), binding.config)


def _held(binding: Binding, values: Array | np.ndarray) -> Array:
    """As the linear's module has it: stacked over layers, or by itself."""
    held = jnp.asarray(values, jnp.float32)
    return held if binding.num_leading else held[0]


def _stacked(binding: Binding, variable: nnx.Variable) -> np.ndarray:
    """The reverse, on the host."""
    values = np.asarray(variable[...])
    return values if binding.num_leading else values[None]


def _join(binding: Binding, parts: Sequence[nnx.Variable]) -> np.ndarray:
    """The reverse."""
    arrays, fusion = [_stacked(binding, part) for part in parts], binding.rule.fusion
    return arrays[0] if fusion is None else fusion.join(arrays, binding.config)


def locate(model: Decoder, leaf: str) -> tuple[Any, str]:
    """The module that holds the linear of layers.mlp.up_proj.kernel, and the linear's name in it."""
    *parents, name, _ = leaf.split(".")
    return reduce(getattr, parents, model), name


def _abstract(config: DecoderConfig, **choices: Any) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **choices))


def _leaves(model: Decoder) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, WEIGHTS))}
