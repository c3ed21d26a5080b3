"""How long a step can take at best: arithmetic, memory traffic and communication against a chip's rates."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

from dpo.models.decoder_config import ATTENTION, DecoderConfig, LayerKind
from dpo.planning.chips import Chip, Topology, ring_bandwidth
from dpo.planning.hlo import Program


class Work(NamedTuple):
    """Tokens of one step, without padding."""

    tokens: float
    """Laid out; a shared prompt once."""
    sequence_tokens: float
    """With the prompt counted once a response: what tokens/s counts."""
    visible: float
    """Pairs of a query and a key that it sees."""
    scored: float
    """Tokens of responses."""


class Times(NamedTuple):
    """Seconds that a step would take if it did nothing else."""

    compute: float
    memory: float
    communication: float

    @property
    def hidden(self) -> float:
        """All communication behind the rest: nothing can be quicker."""
        return max(self)

    @property
    def exposed(self) -> float:
        """No communication behind the rest."""
        return max(self.compute, self.memory) + self.communication


def forward_flops(config: DecoderConfig, work: Work) -> tuple[float, float]:
    """Operations of one forward pass that must be done: in attention, and in everything else."""
    weights = sum(_weights(config, kind) for kind in config.layer_kinds)
    weights += config.hidden_size * config.num_layers * config.per_layer_size
    body = 2.0 * weights * work.tokens + 2.0 * config.vocab_size * config.hidden_size * work.scored
    widths = sum(config.of_kind(kind).head_dim for kind in config.layer_kinds if kind in ATTENTION)
    return 4.0 * config.num_heads * widths * work.visible, body


def _weights(config: DecoderConfig, kind: LayerKind) -> int:
    """Multiplications a token in a layer beside attention's scores.

    The delta rule reads its state for the key, adds to it, and reads it for the query.
    """
    config = config.of_kind(kind)
    D, H, G, C = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    mlp = (3 if config.gated_mlp else 2) * D * config.intermediate_size
    if kind == "convolution":
        return 4 * D * D + mlp
    if kind in ATTENTION:
        gates = {"none": 0, "channel": H * C, "head": H}[config.gated_attention]
        projections = 0 if kind.endswith("_reader") else 1 if config.values_are_keys else 2
        return D * (2 * H * C + projections * G * C + gates + 2 * config.per_layer_size) + mlp
    assert config.delta is not None
    delta, values = config.delta, config.delta.num_value_heads * config.delta.value_dim
    projections = D * (delta.channels + 2 * values + 2 * delta.num_value_heads)
    return projections + 3 * values * delta.key_dim + mlp


def count_flops(jaxpr: ClosedJaxpr | Jaxpr) -> float:
    """Operations of all products in a program for all devices; loops of unknown length are left out."""
    return sum((_equation_flops(equation) for equation in jaxpr.eqns), start=0.0)


ATTENTION_PASSES = 3.5
"""Two products forward, five backward (scores are made again): 7 / 2 forward passes."""


def looped_flops(implementation: str, attention: float) -> float:
    """Operations of attention, `attention` in a forward pass, that `count_flops` does not see in a program.

    They are in loops over as many blocks as some query sees, or in a kernel.
    """
    return ATTENTION_PASSES * attention if implementation in ("blocked", "ranges", "splash") else 0.0


def step_times(program: Program, flops: float, *, chip: Chip, topology: Topology, products: str) -> Times:
    """Times of a step in which every device has an equal share of `flops`, of operands in `products`."""
    rate = chip.float32_flops if products == "float32" else chip.flops
    bandwidth = ring_bandwidth(chip)
    return Times(
        compute=flops / topology.num_devices / rate,
        memory=program.bytes_accessed / chip.bandwidth,
        communication=sum(
            c.wire_bytes / bandwidth + c.count * c.group / 2 * chip.hop_seconds for c in program.collectives
        ),
    )


def _equation_flops(equation: Any) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted, _ = parameters["dimension_numbers"][0]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name in ("while", "pallas_call"):
        return 0.0
    if name == "cond":
        return max(count_flops(branch) for branch in parameters["branches"])
    times = parameters["length"] if name == "scan" else 1
    times *= parameters["mesh"].size if name == "shard_map" else 1
    inner = [value for value in parameters.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
    return float(times) * sum(map(count_flops, inner))
