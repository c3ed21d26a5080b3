"""What the policy itself says while it trains: samples for held-out prompts, their KL from the reference.

log π(y|x) − log ρ(y|x), averaged over responses y that are drawn from π at temperature 1, is an unbiased
estimate of KL(π‖ρ) of whole responses (of at most `max_new_tokens`). The same seeds are used every time, so
that a curve moves because the policy does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Float

from dpo.config import Config
from dpo.data.packing import Shape, pack
from dpo.data.tokenization import tokenize_prompts
from dpo.data.tokenized import TokenizedDataset, make_dataset
from dpo.huggingface.pretrained import stop_tokens
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate, lower_generation
from dpo.parallel.sharding import row_multiple
from dpo.training.placement import place_batch
from dpo.training.policy import Policy, make_score
from dpo.training.reading import Dataset, given_chat_template
from dpo.training.reference import Score
from dpo.training.step import Params, make_eval_step

Observe = Callable[[int, Params], Mapping[str, float]]
"""(steps done, the policy's parameters) → metrics of a held-out evaluation."""

ROWS = 32
"""Responses that are sampled together, and scored together, by a device that holds rows."""
_MULTIPLE = 32


class Drawn(NamedTuple):
    """One sampled response a prompt."""

    responses: list[list[int]]
    """Token ids, the end token included where one was drawn."""
    log_ratio: Float[np.ndarray, " n"]
    """log π − log ρ of each whole response."""


class OnPolicy:
    """Samples one response a prompt from given parameters; scores it under them and under the reference."""

    def __init__(
        self,
        reference: Policy,
        prompts: Sequence[list[int]],
        *,
        mesh: Mesh,
        max_new_tokens: int,
        stop_tokens: Sequence[int],
        chunk: int,
        seed: int = 0,
        policy: Policy | None = None,
    ) -> None:
        """`prompts` are token ids; `reference` keeps its parameters in memory.

        `policy` says what given parameters are of, where that is not another `reference`: adapters, say.
        """
        self._reference, self._prompts, self._stop = reference, list(prompts), list(stop_tokens)
        self._policy = (policy or reference)._replace(params=None)
        self._sampling = SamplingConfig(max_new_tokens=max_new_tokens)
        self._seeds = np.random.SeedSequence(seed).generate_state(len(prompts)).tolist()
        self._score_with = make_score(self._policy, mesh, chunk=chunk)
        self._score_reference = self._score_with
        if self._policy.graphdef != reference.graphdef:
            self._score_reference = make_score(reference, mesh, chunk=chunk)
        self._shape = _scoring_shape(max(map(len, prompts)), max_new_tokens, mesh)
        self._rows = self._shape.rows

    def draw(self, params: Params) -> Drawn:
        """One response a prompt from the policy with these parameters."""
        responses = generate(
            self._policy.merge(params),
            self._prompts,
            sampling=self._sampling,
            seeds=self._seeds,
            stop_tokens=self._stop,
            batch_size=self._rows,
        )
        ours = self._logps(responses, self._score_with(params))
        theirs = self._logps(responses, self._score_reference(self._reference.params))
        return Drawn(responses, ours - theirs)

    def __call__(self, step: int, params: Params) -> Mapping[str, float]:
        """Metrics of one draw."""
        del step
        drawn = self.draw(params)
        return {
            "samples/kl": float(drawn.log_ratio.mean()),
            "samples/length": float(np.mean([len(response) for response in drawn.responses])),
        }

    def _logps(self, responses: Sequence[list[int]], score: Score) -> Float[np.ndarray, " n"]:
        """Summed log-probs, in batches of one static shape."""
        dataset = make_dataset(self._prompts, [[response] for response in responses])
        found = np.zeros(len(responses))
        for start in range(0, len(responses), self._rows):
            index = np.arange(start, start + self._rows)
            index = np.where(index < len(responses), index, -1)
            sums = score(pack(dataset, index, shape=self._shape, layout="padded", num_responses=1))["logps"]
            found[index[index >= 0]] = sums[index >= 0, 0]
        return found


def open_on_policy(
    config: Config, policy: Policy, reference: Policy, heldout: Dataset | None, mesh: Mesh
) -> OnPolicy | None:
    """What `training.eval_samples` asks for; None where it is 0.

    A reference that is the policy itself is copied, since training donates its parameters.
    """
    count = config.training.eval_samples
    if count == 0:
        return None
    assert heldout is not None, "the settings allow eval_samples with data.eval only"
    if reference is policy:
        reference = policy._replace(params=jax.tree.map(jnp.copy, policy.params))
    return OnPolicy(
        reference,
        first_prompts(heldout.tokens, count),
        mesh=mesh,
        max_new_tokens=config.training.eval_max_new_tokens,
        stop_tokens=stop_tokens(policy.pretrained),
        chunk=config.model.log_prob_chunk,
        seed=config.training.seed,
        policy=policy,
    )


def lower_programs(config: Config, policy: Policy, heldout: TokenizedDataset, mesh: Mesh) -> list[Lowered]:
    """What `training.eval_samples` runs, at its largest: sampling, with its cache, and scoring."""
    new, chunk = config.training.eval_max_new_tokens, config.model.log_prob_chunk
    prompts = first_prompts(heldout, config.training.eval_samples)
    shape = _scoring_shape(max(map(len, prompts)), new, mesh)
    sampling = lower_generation(
        policy.merge(policy.params),
        rows=min(shape.rows, len(prompts)),
        longest_prompt=max(map(len, prompts)),
        sampling=SamplingConfig(max_new_tokens=new),
        stop_tokens=stop_tokens(policy.pretrained),
    )
    dataset = make_dataset(prompts[:1], [[[0]]])
    index = np.full(shape.rows, -1)
    batch = place_batch(mesh, pack(dataset, index, shape=shape, layout="padded", num_responses=1))
    score = make_eval_step(policy.graphdef, chunk=chunk, mesh=mesh)
    return [sampling, score.lower(policy.params, policy.frozen, batch)]  # type: ignore[attr-defined]


def _scoring_shape(longest_prompt: int, max_new_tokens: int, mesh: Mesh) -> Shape:
    length = -(-(longest_prompt + max_new_tokens) // _MULTIPLE) * _MULTIPLE
    return Shape(ROWS * row_multiple(mesh), length, max_new_tokens)


def first_prompts(tokens: TokenizedDataset, count: int) -> list[list[int]]:
    """The first `count` different prompts of a data set, as it has them."""
    different = dict.fromkeys(tuple(tokens.prompt(row).tolist()) for row in range(len(tokens)))
    return [list(prompt) for prompt in islice(different, count)]


def prompt_ids(config: Config, prompts: Sequence[Any], policy: Policy, count: int | None) -> list[list[int]]:
    """Token ids of the first `count` different prompts."""
    different = list({repr(prompt): prompt for prompt in prompts}.values())[:count]
    return tokenize_prompts(
        different,
        policy.pretrained.tokenizer,
        chat_template=given_chat_template(config.data),
        template_date=config.data.template_date,
        template_kwargs=config.data.template_kwargs,
        template_characters=config.data.template_characters,
    )
