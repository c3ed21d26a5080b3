"""What models split over a mesh gives the same as one device; no device communicates in attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from numpy.testing import assert_allclose

from dpo.losses.sums import log_collision
from dpo.models.attention import attend
from dpo.models.log_probs import reduce_logits, token_log_probs
from dpo.parallel.partition import AXES, ONE_DEVICE, ROWS, TENSOR, VOCABULARY, Partition


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def on_mesh(sizes):
    return Partition(Mesh(np.asarray(jax.devices()[:8]).reshape(sizes), AXES))


def test_what_an_axis_does_not_divide_stays_whole():
    partition = on_mesh((2, 2, 2))
    assert partition.spec((ROWS, None, TENSOR), (8, 3, 6, 5)) == PartitionSpec(ROWS, None, TENSOR)
    assert partition.spec((ROWS, TENSOR), (6, 3)) == PartitionSpec(None, None)
    assert partition.divides(TENSOR, 4, 3) is None
    assert (partition.size(VOCABULARY), ONE_DEVICE.size(VOCABULARY)) == (4, 1)


@pytest.mark.parametrize(
    ("sizes", "vocab"),
    [((2, 2, 2), 29), *(slow(*case) for case in (((2, 2, 2), 30), ((1, 8, 1), 32), ((1, 8, 1), 29)))],
)
def test_log_probs_and_their_gradients_are_those_of_one_device(sizes, vocab):
    """Also where the vocabulary is not divisible by the devices, or not even by the tensor axis."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, embedding = jax.random.normal(keys[0], (8, 5, 16)), jax.random.normal(keys[1], (vocab, 16))
    target, bias = jax.random.randint(keys[2], (8, 5), 0, vocab), jax.random.normal(keys[3], (vocab,))

    def run(partition):
        def total(hidden, embedding, bias):
            options = {"chunk": 4, "softcap": 5.0, "bias": bias, "partition": partition}
            log_probs = token_log_probs(hidden, embedding, target, **options)
            collisions = reduce_logits(log_collision, hidden, embedding, **options)
            return jnp.sum(jnp.cos(log_probs)), (log_probs, collisions)

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(hidden, embedding, bias)

    for ours, expected in zip(
        jax.tree.leaves(run(on_mesh(sizes))), jax.tree.leaves(run(ONE_DEVICE)), strict=True
    ):
        assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "kv_heads"), [("blocked", 2), slow("blocked", 1), slow("plain", 2), slow("plain", 1)]
)
def test_attention_stays_on_its_devices(implementation, kv_heads):
    partition, keys = on_mesh((2, 2, 2)), jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (4, 20, n, 8)) for key, n in zip(keys, (4, kv_heads, kv_heads), strict=True)
    )
    slots = jnp.broadcast_to(jnp.arange(20)[None], (4, 20))
    layout = {"positions": slots % 10, "group": 1 + slots // 10, "branch": jnp.zeros_like(slots)}

    def gradients(partition):
        def total(q, k, v):
            how = {"implementation": implementation, "partition": partition, "window": jnp.int32(7)}
            return jnp.mean(jnp.sin(attend(q, k, v, **layout, scale=0.3, **how)))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))

    for ours, expected in zip(
        jax.tree.leaves(gradients(partition)(q, k, v)),
        jax.tree.leaves(gradients(ONE_DEVICE)(q, k, v)),
        strict=True,
    ):
        assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    if kv_heads == 2:
        assert partition.mesh is not None
        split = jax.NamedSharding(partition.mesh, PartitionSpec(ROWS, None, TENSOR))
        placed = [jax.device_put(x, split) for x in (q, k, v)]
        text = gradients(partition).lower(*placed).compile().as_text()
        assert text is not None
        assert "all-gather" not in text
        assert "all-to-all" not in text
