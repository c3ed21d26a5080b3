"""From a checkpoint of a run to a Hugging Face directory, to its adapters alone, or to a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from dpo.config import Config, ExportConfig
from dpo.files import require_writable
from dpo.huggingface.adapter_writing import save_adapters
from dpo.huggingface.gguf_writing import find_architecture, save_gguf
from dpo.huggingface.model_names import split_on_base
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.saving import save_pretrained
from dpo.huggingface.text_models import text_fields
from dpo.outcomes import UserError
from dpo.overwriting import require_replaceable
from dpo.runs import ADAPTER_DIRECTORY, CHECKPOINTS_DIRECTORY, EXPORT_DIRECTORY, METRICS_FILE, read_metrics
from dpo.training.adapted import adapters_to_write, model_to_write, policy_to_write
from dpo.training.checkpoint import Checkpoints
from dpo.training.model_card import adapter_card, count_parameters, model_card
from dpo.training.policy import Policy
from dpo.training.progress import say
from dpo.training.step import Params
from dpo.training.talk import as_trained

DTYPES = ("float32", "bfloat16", "float16")
_GGUF_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def export_checkpoint(given: ExportConfig, config: Config) -> tuple[Path, int]:
    """Write the policy as it was at a checkpoint of the run; returns where, and after how many updates.

    Raises:
      ValueError: when the run has no such checkpoint, or a damaged one, or no adapters, or something
        else is in the way.
    """
    if given.format == "adapter" and not config.lora.is_on:
        raise UserError(
            f"format is 'adapter', but {given.run} has none: its config has no lora.rank or lora.init"
        )
    directory = Path(given.run) / CHECKPOINTS_DIRECTORY
    if not directory.is_dir():
        raise UserError(f"{directory} is not there: {given.run} has no checkpoint")
    dtype = choose_dtype(given.dtype, config.model.source)
    if given.format == "gguf":
        dtype = _GGUF_NAMES.get(dtype, dtype)
        find_architecture(
            text_fields(open_checkpoint(config.model.source).config)["model_type"]
        )  # before work
    output = Path(given.output or default_output(given, dtype))
    _require_replaceable(output, config)  # while nothing is read yet
    require_writable(output.parent, "an export")
    with Checkpoints(directory, keep=config.training.keep_checkpoints, read_only=True) as checkpoints:
        step = _choose_step(checkpoints, directory, given.step)
        _require_whole(checkpoints, step)
        policy = policy_to_write(config)
        read = checkpoints.restore_params if config.lora.is_on else checkpoints.stored_params
        params = read(step, policy.params)
    policy = policy._replace(pretrained=as_trained(policy.pretrained, config.data))
    _require_replaceable(output, config)
    if given.format == "adapter":
        name = given.base_name or config.lora.base_name
        named = replace(config, lora=replace(config.lora, base_name=name, merged=True))
        metrics = heldout_metrics(given.run, step)
        return export_adapters(named, policy, params, output, num_steps=step, metrics=metrics), step
    if given.format == "gguf":
        return _export_gguf(policy, params, output, dtype=dtype, name=Path(given.run).resolve().name), step
    metrics = heldout_metrics(given.run, step)
    return export_model(config, policy, params, output, dtype=dtype, num_steps=step, metrics=metrics), step


def export_model(
    config: Config,
    policy: Policy,
    params: Params,
    directory: Path,
    *,
    num_steps: int,
    metrics: Mapping[str, float] | None,
    dtype: str | None = None,
) -> Path:
    """Write the policy with these parameters, adapters merged, as a directory of weights, configuration,
    tokenizer and model card.

    `metrics` are held-out ones after `num_steps` updates, for the card. Without a `dtype` the weights are
    written in float32.
    """
    pretrained, model = policy.pretrained, model_to_write(policy, params)
    written = jnp.dtype(dtype or "float32")
    card = model_card(
        config,
        pretrained,
        num_steps=num_steps,
        num_parameters=count_parameters(model),
        dtype=written.name,
        metrics=metrics,
    )
    return save_pretrained(
        model,
        directory,
        hf_config=pretrained.config,
        tokenizer=pretrained.tokenizer,
        generation_config=pretrained.generation_config,
        dtype=written,
        model_card=card,
        carried=pretrained.carried,
    )


def export_adapters(
    config: Config,
    policy: Policy,
    params: Params,
    directory: Path,
    *,
    num_steps: int,
    metrics: Mapping[str, float] | None,
) -> Path:
    """Write the adapters of a policy as a directory that peft loads onto the base that it names, with the
    tokenizer, the chat template that was trained with, and a card.

    Where the base is no directory and no hub id, what peft can do with them instead is said.
    """
    pretrained = policy.pretrained
    adapters, method, bindings = adapters_to_write(policy, params)
    named = config.lora.base_name or config.model.source
    path = Path(named).expanduser()
    is_merged = split_on_base(named) is not None
    if path.is_file() or ":" in named or is_merged:
        known = None if is_merged else pretrained.hub_id
        say(
            f"adapters: their base is {named}, which peft does not open; lora.base_name, or dpo export RUN "
            "--format adapter --base_name NAME, names one that it does"
            + (f", such as {known}" if known else ", such as the directory of a converted base")
        )
    card = adapter_card(
        config,
        pretrained,
        num_steps=num_steps,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        metrics=metrics,
    )
    return save_adapters(
        directory,
        adapters,
        method,
        bindings=bindings,
        base=str(path.resolve()) if path.exists() else named,
        tokenizer=pretrained.tokenizer,
        card=card,
    )


def _export_gguf(policy: Policy, params: Params, path: Path, *, dtype: str, name: str) -> Path:
    """Write the policy with these parameters, adapters merged, as a GGUF file."""
    pretrained = policy.pretrained
    return save_gguf(
        model_to_write(policy, params),
        path,
        hf_config=text_fields(pretrained.config),
        tokenizer=pretrained.tokenizer,
        generation_config=pretrained.generation_config,
        dtype=dtype,
        name=name,
        licence=pretrained.licence,
    )


def default_output(given: ExportConfig, dtype: str) -> Path:
    """Where a run leaves its own export; another step or dtype goes beside it and replaces nothing else."""
    step = "" if given.step is None else f"-{given.step}"
    kind = "" if given.format == "adapter" or dtype in ("float32", "f32") else f"-{dtype}"
    name = ADAPTER_DIRECTORY if given.format == "adapter" else EXPORT_DIRECTORY
    return Path(given.run) / (name + step + kind + (".gguf" if given.format == "gguf" else ""))


def choose_dtype(dtype: str, source: str) -> str:
    """The dtype of the written weights, found before any are read; "base" is what `source` says of its own.

    Raises:
      ValueError: when it says nothing, or nothing that is supported.
    """
    if dtype != "base":  # also those of a GGUF file
        return dtype
    base = open_checkpoint(source)
    found = base.config.get("dtype") or base.config.get("torch_dtype")
    if found not in DTYPES:
        raise UserError(
            f"dtype is base, but the configuration of {base.source} has dtype {found!r}; allowed: "
            + ", ".join(DTYPES)
        )
    return found


def heldout_metrics(run_dir: str | Path, step: int) -> dict[str, float] | None:
    """What metrics.jsonl has of the held-out data after `step` updates."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return None
    found = {
        name.removeprefix("eval/"): float(value)
        for line in read_metrics(path)
        if line["step"] == step
        for name, value in line.items()
        if name.startswith("eval/")
    }
    return found or None


def _require_replaceable(output: Path, config: Config) -> None:
    """The output takes the place of an earlier export, and of nothing else.

    Raises:
      UserError: for anything that it would delete.
    """
    model, there = config.model, output.exists()
    for name, source in (("model.source", model.source), ("model.reference", model.reference)):
        path = Path(source or "").expanduser()
        if source and there and path.exists() and output.samefile(path):
            raise UserError(f"output is {output}, which is {name} of the run; allowed: another place")
    require_replaceable(output)


def _choose_step(checkpoints: Checkpoints, directory: Path, step: int | None) -> int:
    there = checkpoints.steps
    if not there:
        raise UserError(f"{directory} holds no checkpoint")
    if step is not None and step not in there:
        raise UserError(f"{directory} has no checkpoint of step {step}; allowed are {there}")
    return there[-1] if step is None else step


def _require_whole(checkpoints: Checkpoints, step: int) -> None:
    problems = checkpoints.damage(step)
    if problems:
        whole = [other for other in checkpoints.steps if not checkpoints.damage(other)]
        raise UserError(
            f"{checkpoints.path(step)} is damaged ({'; '.join(problems)}); whole are those of steps {whole}"
        )
