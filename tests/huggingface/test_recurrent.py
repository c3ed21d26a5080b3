"""Convolutions and the delta rule: every layout has what transformers has for single sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from tiny_models import TOKENS, batch_arrays, load_case, write_checkpoint

from dpo.huggingface.binding import bind
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import load_decoder
from dpo.huggingface.saving import flatten, hf_tensor
from dpo.huggingface.text_models import read_config
from dpo.models.decoder import Decoder
from dpo.models.log_probs import token_log_probs
from dpo.models.sampling import SamplingConfig, generate

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BETWEEN = {"gemma4_text": 5e-5, "qwen3_5_text": 5e-5, "qwen3_next": 5e-5}
"""Largest difference of gradients between layouts where it is more than 1e-5 of the largest entry: an ulp of
the embeddings moves those of the delta rule by 1e-5 to 2e-5, and what an ulp comes to depends on the
processor (Qwen3-Next's differ by 1e-5 on one, by 1.35e-5 on another). Gemma 4's differ by 1.3e-5."""
PROMPT, RESPONSES = TOKENS[0, :7], (TOKENS[0, 7:18], TOKENS[1, 7:8], TOKENS[1, 12:21])
WEIGHTS = (1.0, -0.5, 0.25)
"""Of the responses' log-probs in the loss."""


def layouts() -> dict[str, tuple[np.ndarray, list[tuple[int, np.ndarray]]]]:
    """Tokens, positions, group and branch of every layout; and for each response its row and the slots that
    predict its tokens."""
    p, lengths = len(PROMPT), [len(response) for response in RESPONSES]
    shared = [
        np.concatenate([PROMPT, *RESPONSES]),
        np.concatenate([np.arange(p), *(p + np.arange(n) for n in lengths)]),
        np.ones(p + sum(lengths), int),
        np.repeat([0, 1, 2, 3], [p, *lengths]),
    ]
    starts = p + np.cumsum([0, *lengths[:-1]])
    sources = [(0, np.asarray([p - 1, *range(a, a + n - 1)])) for a, n in zip(starts, lengths, strict=True)]
    # behind another group, and before padding
    other = [TOKENS[1, :5], np.arange(5), np.ones(5, int), np.asarray([0, 0, 1, 1, 2])]
    other[1] = np.asarray([0, 1, 2, 3, 2])
    behind = [np.concatenate([a, b + (i == 2)]) for i, (a, b) in enumerate(zip(other, shared, strict=True))]
    rows = [
        [
            np.concatenate([PROMPT, r]),
            np.arange(p + len(r)),
            np.full(p + len(r), i),
            np.repeat([0, 1], [p, len(r)]),
        ]
        for i, r in enumerate(RESPONSES, start=1)
    ]
    width = p + max(lengths)
    padded = [np.stack([np.pad(row[i], (0, width - len(row[i]))) for row in rows]) for i in range(4)]
    ends = np.cumsum([0, *(p + n for n in lengths[:-1])])
    inside = [np.arange(p - 1, p + n - 1) for n in lengths]
    return {
        "shared": (_one_row(shared), sources),
        "shared, behind another": (_one_row(behind, 3), [(row, slots + 5) for row, slots in sources]),
        "packed": (
            _one_row([np.concatenate(parts) for parts in zip(*rows, strict=True)]),
            [(0, end + slots) for end, slots in zip(ends, inside, strict=True)],
        ),
        "padded": (np.stack(padded), list(enumerate(inside))),
    }


def _one_row(arrays: list[np.ndarray], padding: int = 0) -> np.ndarray:
    return np.stack([np.pad(each, (0, padding))[None] for each in arrays])


def loss_of(graphdef: Any, rest: Any, arrays: np.ndarray, sources: list[tuple[int, np.ndarray]]) -> Any:
    def loss(params: Any) -> tuple[jax.Array, list[jax.Array]]:
        model: Decoder = nnx.merge(graphdef, params, rest)
        hidden = model.hidden(*map(jnp.asarray, arrays))
        log_probs = [
            token_log_probs(
                hidden[row, slots],
                model.output_embedding,
                jnp.asarray(r),
                chunk=8,
                softcap=model.config.logit_softcap,
            )
            for (row, slots), r in zip(sources, RESPONSES, strict=True)
        ]
        total = jnp.asarray(0.0)
        for weight, found in zip(WEIGHTS, log_probs, strict=True):
            total = total + weight * found.sum()
        return total, log_probs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def their_values(directory: Path) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """transformers' log-probs of each response after the prompt, one sequence a row, and its gradients."""
    import torch
    from torch_models import torch_model

    model = torch_model(directory)
    found, total = [], torch.tensor(0.0)
    for weight, response in zip(WEIGHTS, RESPONSES, strict=True):
        ids = torch.tensor(np.concatenate([PROMPT, response])[None])
        log_probs = torch.log_softmax(model(ids).logits[0, len(PROMPT) - 1 : -1], dim=-1)
        picked = log_probs[torch.arange(len(response)), torch.tensor(response)]
        total = total + weight * picked.sum()
        found.append(picked.detach().numpy())
    total.backward()
    return found, {n: p.grad.numpy() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, marks=pytest.mark.ci) for case in ("lfm2", "qwen3_5_text")),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("lfm2-adjusted", "lfm3", "qwen3_next", "gemma4_text")
        ),
    ],
)
def test_all_layouts_have_transformers_log_probs_and_gradients(case: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    directory = write_checkpoint(tmp_path, case)
    expected, gradients = their_values(directory)
    checkpoint = open_checkpoint(directory)
    model = load_decoder(checkpoint)
    family, _ = read_config(checkpoint.config)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    own: dict[str, dict[str, np.ndarray]] = {}
    between = BETWEEN.get(case, 1e-5)
    for name, (arrays, sources) in layouts().items():
        (_, log_probs), found = loss_of(graphdef, rest, arrays, sources)(params)
        for ours, theirs in zip(log_probs, expected, strict=True):
            assert_allclose(ours, theirs, atol=5e-5, err_msg=name)
        leaves = flatten(nnx.to_pure_dict(found))
        bindings = bind(family, model.config, {path: leaf.shape for path, leaf in leaves.items()})
        own[name] = {
            tensor: hf_tensor(binding, index, leaves)
            for binding in bindings
            for index, tensor in enumerate(binding.names)
        }
        assert own[name].keys() == gradients.keys()
        for tensor, values in own[name].items():
            largest = np.abs(gradients[tensor]).max()
            assert_allclose(values, gradients[tensor], atol=1e-4 * largest, err_msg=f"{name}: {tensor}")
            first = own["shared"][tensor]
            assert_allclose(values, first, atol=between * largest, err_msg=f"{name}: {tensor}")


@pytest.mark.parametrize("case", ["lfm2", "qwen3_5_text"])
def test_prompts_of_different_lengths_decode_as_alone(case: str, tmp_path: Path) -> None:
    """And as the whole forward pass says: what is filled up behind a prompt leaves no trace in the state."""
    model = load_case(tmp_path, case)
    prompts = [TOKENS[0, :n].tolist() for n in (1, 2, 9, 20)]
    greedy = SamplingConfig(max_new_tokens=12, temperature=0.0)
    together = generate(model, prompts, sampling=greedy, seeds=[0] * len(prompts), stop_tokens=[])
    alone = [generate(model, [prompt], sampling=greedy, seeds=[0], stop_tokens=[])[0] for prompt in prompts]
    assert together == alone
    prompt, answer = prompts[2], together[2]
    hidden = model.hidden(*batch_arrays(np.asarray([prompt + answer[:-1]])))
    assert jnp.argmax(model.logits(hidden[0, len(prompt) - 1 :]), axis=-1).tolist() == answer
