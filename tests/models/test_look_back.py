"""Layers that look back: what stands before a token in its sequence, whatever lies between in its row."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import TOKENS, batch_arrays, case_config

from dpo.huggingface.text_models import read_config
from dpo.models import decoder as decoder_module
from dpo.models.attention import NO_WINDOW
from dpo.models.decoder import Decoder
from dpo.models.look_back import find_predecessors, take_slots
from dpo.models.patterns import Layer, find_runs

BRANCH = np.asarray([[0, 0, 0, 1, 1, 2, 2, 0, 1, 0]])
GROUP = np.asarray([[1, 1, 1, 1, 1, 1, 1, 2, 2, 0]])


def make(case: str, **changes) -> Decoder:
    _, config = read_config(case_config(case) | changes)
    return Decoder(config, rngs=nnx.Rngs(0))


def test_the_tokens_before_are_those_of_the_picture() -> None:
    first, second = find_predecessors(jnp.asarray(GROUP), jnp.asarray(BRANCH), 2)
    assert first.tolist() == [[-1, 0, 1, 2, 3, 2, 5, -1, 7, -1]]
    assert second.tolist() == [[-1, -1, 0, 1, 2, 1, 2, -1, -1, -1]]
    x = jnp.arange(10.0)[None, :, None]
    assert take_slots(x, first)[0, :, 0].tolist() == [0, 0, 1, 2, 3, 2, 5, 0, 7, 0]


@pytest.mark.parametrize("seed", range(20))
def test_they_are_those_of_each_sequence_alone(seed: int) -> None:
    """Of random groups, prompts and responses, some of one token; written out and found again."""
    rng = np.random.default_rng(seed)
    group, branch, expected = [], [], []
    for number in range(1, 4):
        prompt = len(group) + np.arange(rng.integers(1, 4))
        sequences = [(0, prompt[:0], prompt)]
        start = prompt[-1] + 1
        for response in range(1, rng.integers(1, 4) + 1):
            own = start + np.arange(rng.integers(1, 4))
            sequences.append((response, prompt, own))
            start = own[-1] + 1
        for number_of_branch, before, own in sequences:
            line = [*before.tolist(), *own.tolist()]
            for place in range(len(before), len(line)):
                group.append(number)
                branch.append(number_of_branch)
                expected.append([line[place - j] if place >= j else -1 for j in (1, 2, 3)])
    groups, branches = (jnp.asarray(np.pad(each, (0, 2)))[None] for each in (group, branch))
    found = np.stack(find_predecessors(groups, branches, 3), axis=-1)[0]
    np.testing.assert_array_equal(found, [*expected, [-1] * 3, [-1] * 3])


def test_a_pattern_that_repeats_is_one_run() -> None:
    assert [run[1:] for run in find_runs("A" * 30)] == [(("A",), 30)]
    assert [run[1:] for run in find_runs("CCACCACACAC")] == [
        (("C", "C", "A"), 2),
        (("C", "A"), 2),
        (("C",), 1),
    ]
    for kinds in ("CA", "CCCA", "ACCACCAC", "CAACCA"):
        assert "".join("".join(run.pattern) * run.repeats for run in find_runs(kinds)) == kinds


def plain_hidden(model: Decoder, tokens, positions, group, branch):
    """The scan of a uniform decoder, written out: one block, one stack."""
    layout = {"positions": positions, "group": group, "branch": branch}
    key_bias = model._key_bias(positions)
    ropes, grow = model._ropes(positions, group), model._query_growth(positions)
    graphdef, layers = nnx.split(model.layers)
    config = model.config
    xs = Layer(
        state=layers,
        index=jnp.arange(config.num_layers),
        window=jnp.asarray(config.windows, jnp.int32) if min(config.windows) < NO_WINDOW else None,
        rope=jnp.asarray(config.layer_rope, jnp.int32) if len(config.ropes) > 1 else None,
        beside=(),
    )

    def block(h, layer):
        core = partial(model._attend, **layout, grow=grow, key_bias=key_bias, window=layer.window)
        h = nnx.merge(graphdef, layer.state)(h, ropes("attention", layer.rope), core)[0]
        return model.partition.constrain(h, decoder_module.ROWS), None

    block = decoder_module._rematerialised(block, model.remat)
    return model._final(jax.lax.scan(block, model._embed(tokens, positions), xs)[0])


@pytest.mark.parametrize(
    "case", ["llama", *(pytest.param(case, marks=pytest.mark.slow) for case in ("gemma3_text", "gpt2"))]
)
def test_uniform_models_compile_to_one_plain_scan(case: str) -> None:
    graphdef, params = nnx.split(make(case))
    arrays = batch_arrays(TOKENS)

    def text(hidden) -> str:
        def loss(params, *arrays):
            return (hidden(nnx.merge(graphdef, params), *arrays) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss)).lower(params, *arrays).as_text()

    assert text(Decoder.hidden) == text(plain_hidden)


def test_programs_of_a_pattern_do_not_grow_with_depth() -> None:
    def length(periods: int) -> int:
        kinds = ["conv", "conv", "full_attention"] * periods
        graphdef, params = nnx.split(make("lfm2", layer_types=kinds, num_hidden_layers=len(kinds)))
        run = jax.jit(lambda params, *arrays: nnx.merge(graphdef, params).hidden(*arrays))
        return len(run.lower(params, *batch_arrays(TOKENS)).as_text().splitlines())

    assert length(4) == length(2)


@pytest.mark.parametrize("case", ["lfm2", pytest.param("qwen3_5_text", marks=pytest.mark.ci)])
def test_no_neighbour_is_seen(case: str) -> None:
    """Two groups in a row: what one sequence may not see changes no bit of it."""
    model = make(case)
    graphdef, params = nnx.split(model)
    hidden = jax.jit(lambda tokens, *layout: nnx.merge(graphdef, params).hidden(tokens, *layout))
    positions = np.asarray([[0, 1, 2, 3, 4, 3, 4, 0, 1, 0]])
    layout = tuple(jnp.asarray(each) for each in (positions, GROUP, BRANCH))
    tokens = np.arange(10)[None] + 5
    before = np.asarray(hidden(jnp.asarray(tokens), *layout))[0]
    sees = {0: {*range(7)}, 2: {*range(2, 7)}, 3: {3, 4}, 5: {5, 6}, 6: {6}, 7: {7, 8}, 9: {9}}
    for changed, changes in sees.items():
        other = tokens.copy()
        other[0, changed] += 40
        after = np.asarray(hidden(jnp.asarray(other), *layout))[0]
        differs = {slot for slot in range(10) if (after[slot] != before[slot]).any()}
        assert differs == changes, changed
