"""What each layer is handed of a token beside the residual stream (per-layer embeddings, Gemma 3n and 4)."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpo.models.parts import LayerMaker


class PerLayerInputs(nnx.Module):
    """(norm(x h / √D) + √P e) / √2, a part of P channels for each layer.

    h is the embedded token, and e its row in a table of its own.
    """

    def __init__(self, make: LayerMaker):
        config = make.config
        self.sizes = config.num_layers, config.per_layer_size
        self.embed_tokens = make.embedding(config.vocab_size, math.prod(self.sizes))
        self.x_proj = make.linear(config.hidden_size, math.prod(self.sizes), False)
        self.norm = make.norm(config.per_layer_size)

    def __call__(self, h: Float[Array, "R T D"], e: Float[Array, "R T LP"]) -> Float[Array, "L R T P"]:
        shape = (*h.shape[:2], *self.sizes)
        x = self.norm((self.x_proj(h) * h.shape[-1] ** -0.5).reshape(shape))
        return jnp.moveaxis((x + e.reshape(shape) * math.sqrt(self.sizes[1])) * 2**-0.5, 2, 0)


class PerLayerResidual(nnx.Module):
    """h + norm(o(act(gate h) * beside))."""

    def __init__(self, make: LayerMaker):
        D, P = make.config.hidden_size, make.config.per_layer_size
        self.act_fn = make.activation()
        self.gate_proj, self.o_proj = make.linear(D, P, False), make.linear(P, D, False)
        self.norm = make.norm(D)

    def __call__(self, h: Float[Array, "R T D"], beside: Float[Array, "R T P"]) -> Float[Array, "R T D"]:
        return h + self.norm(self.o_proj(self.act_fn(self.gate_proj(h)) * beside))
