"""The shapes and the work of a step: of assumed lengths, or of the training data's; and its decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from dpo.config import Config, starting_source
from dpo.config.sources import show_source
from dpo.data.packing import Shape
from dpo.data.shapes import Step, plan_shapes
from dpo.data.tokenized import TokenizedDataset
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.shapes import SHAPE_PREFIX, read_shape
from dpo.huggingface.text_models import read_config
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.losses import make_objective
from dpo.models.decoder_config import DecoderConfig
from dpo.outcomes import UserError
from dpo.parallel.sharding import (
    row_multiple,
)
from dpo.planning.chips import Platform
from dpo.planning.roofline import Work
from dpo.runs import specification
from dpo.training.datasets import compilation, fit_to_objective, make_loader
from dpo.training.program import count_steps
from dpo.training.reading import read_dataset


class Workload(NamedTuple):
    """The shapes and the work of one step."""

    prompts: int
    responses: int
    """Largest number of responses of a prompt."""
    shape: Shape
    work: Work
    source: str
    """Words that say where the lengths of the sequences come from."""


Lengths = Callable[[Config, Mesh, Platform], Workload]
"""The step's shapes on a mesh whose devices are, or stand for, those of a platform."""


def read_decoder(source: str) -> DecoderConfig:
    """The decoder of a shipped shape (shape:NAME) or of any model source; weights are not read."""
    return read_config(read_hf_config(source))[1]


def read_hf_config(source: str) -> JsonObject:
    """What config.json says."""
    return read_shape(source) if source.startswith(SHAPE_PREFIX) else open_checkpoint(source).config


def assumed_lengths(*, prompt: int, response: int, responses: int) -> Lengths:
    """Every prompt and every response of the same length."""

    def lengths(config: Config, mesh: Mesh, platform: Platform) -> Workload:
        P = config.training.batch_size
        plan = plan_shapes(
            [Step([prompt] * P, [[response] * responses] * P)],
            layout=config.data.layout,
            row_length=config.data.row_length,
            micro_batches=config.training.micro_batches,
            rows_multiple=row_multiple(mesh),
            **compilation(platform),
        )
        sequences = P * responses * (prompt + response)
        work = Work(
            tokens=float(plan.tokens[0]),
            sequence_tokens=sequences,
            visible=P
            * _visible(np.asarray([prompt]), np.asarray([[response] * responses]), config.data.layout),
            scored=P * responses * response,
        )
        source = f"assumed: prompts of {prompt} tokens, {responses} responses of {response}"
        return Workload(P, responses, plan.shapes[-1], work, source)

    return lengths


def data_lengths(tokens: TokenizedDataset) -> Lengths:
    """The largest shape of a run over the data, and the mean work of its prompts."""

    def lengths(config: Config, mesh: Mesh, platform: Platform) -> Workload:
        loader = make_loader(
            config.data,
            config.training,
            tokens,
            mesh,
            num_steps=count_steps(config.training, len(tokens)),
            platform=platform,
        )
        P, report = config.training.batch_size, loader.report()
        responses = tokens.response_lengths
        work = Work(
            tokens=report["tokens"] / report["steps"],
            sequence_tokens=report["tokens_unshared"] / report["steps"],
            visible=P * _visible(tokens.prompt_lengths, responses, config.data.layout),
            scored=P * float(tokens.scored_lengths.sum(1).mean()),
        )
        source = f"{show_source(config.data.train)}, the largest of {len(loader.shapes)} shapes"
        return Workload(P, tokens.max_responses, loader.shapes[-1], work, source)

    return lengths


def choose_lengths(config: Config, *, prompt: int | None, response: int | None, responses: int) -> Lengths:
    """Assumed lengths where they are given, else those of the training data.

    Raises:
      ValueError: when only one is given, or none and the model is a shape without a tokenizer, or when the
        data do not fit the objective.
    """
    if prompt is not None and response is not None:
        return assumed_lengths(prompt=prompt, response=response, responses=responses)
    if prompt is not None or response is not None or config.model.source.startswith(SHAPE_PREFIX):
        raise UserError(
            f"prompt_tokens is {prompt} and response_tokens is {response}; both are needed for a model that "
            f"is a shape (model.source is {config.model.source!r}), or neither: then the data's lengths count"
        )
    dataset = read_dataset(config.data, load_tokenizer(starting_source(config)))
    objective = make_objective(specification(config))
    return data_lengths(fit_to_objective(dataset, objective, seed=config.training.seed).tokens)


def _visible(prompts: np.ndarray, responses: np.ndarray, layout: str) -> float:
    """Mean number of (query, key) pairs of a prompt and its responses."""
    prompts = prompts.astype(np.float64)[:, None]
    own = np.where(responses > 0, prompts * responses + responses * (responses + 1) / 2, 0).sum(1)
    repeats = 1 if layout == "shared" else (responses > 0).sum(1)
    return float((own + repeats * (prompts * (prompts + 1) / 2)[:, 0]).mean())
