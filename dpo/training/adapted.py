"""The policy that a run trains: a whole model, or adapters on a frozen one, as the settings say.

With adapters, `Policy.params` are theirs alone, so that optimiser, state and checkpoints hold nothing else;
the frozen weights are arguments of the step. The reference is the model without adapters, on the same arrays.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dpo.config import Config, LoraConfig, starting_source
from dpo.huggingface.adapter_files import AdapterDirectory, load_adapters
from dpo.huggingface.adapters import (
    Adapter,
    add_adapters,
    choose_linears,
    get_adapters,
    model_bindings,
    new_adapters,
)
from dpo.huggingface.binding import Binding
from dpo.huggingface.foreign_json import JsonObject
from dpo.huggingface.model_names import split_on_base
from dpo.huggingface.opening import open_checkpoint
from dpo.huggingface.pretrained import Pretrained, open_in_files, open_shapes
from dpo.huggingface.streamed import plain_model
from dpo.huggingface.text_models import read_config
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.models.decoder import Decoder
from dpo.models.lora import Method
from dpo.outcomes import UserError
from dpo.parallel.sharding import Rules, parameter_rules, parameter_sharding, place
from dpo.training.policy import Policy, load_policy
from dpo.training.reference import fingerprint_parameters
from dpo.training.step import Params


def open_policy(config: Config, mesh: Mesh) -> Policy:
    """The policy before its first update. Names and files of adapters are checked before weights are read.

    Raises:
      ValueError: when the adapters do not fit the model, or the settings do not fit adapters.
    """
    lora, rules = config.lora, parameter_rules(config.mesh.rules)
    if not lora.is_on:
        return load_policy(config.model, mesh, rules=rules)
    alpha = config.training.reference_alpha
    if config.training.reference_every is not None and alpha != 1:
        raise UserError(
            f"training.reference_alpha is {alpha} and lora is on; allowed is 1, because the mean of two "
            "adapters' factors is not the mean of their weights"
        )
    hf_config = open_checkpoint(config.model.source).config
    adapters, method = starting_adapters(lora, hf_config, seed=config.training.seed)
    base = load_policy(config.model, mesh, base_dtype=lora.base_dtype, rules=rules)
    base = base._replace(pretrained=_with_own_tokenizer(base.pretrained, config))
    model = base.merge(base.params)
    add_adapters(model, adapters, method)
    graphdef, params, frozen = nnx.split(model, nnx.LoRAParam, ...)
    params, frozen = (_place(mesh, nnx.to_pure_dict(part), rules) for part in (params, frozen))
    adapted = f"{base.fingerprint} {method} {fingerprint_parameters(params)} {_alphas(adapters)}"
    return Policy(
        base.pretrained, graphdef, params, frozen, hashlib.sha256(adapted.encode()).hexdigest(), base
    )


def load_reference(config: Config, mesh: Mesh) -> Policy:
    """The `model.reference` of an evaluation, held as in the run that is evaluated.

    Adapters that the run started from stay beside their base. Merged into it they would be rounded with it
    where `lora.base_dtype` is a smaller one, to other weights than the run's.
    """
    source, lora, model = config.model.reference, config.lora, config.model
    found = None if lora.init is None or source is None else split_on_base(source)
    if found is None:
        return load_policy(model, mesh, source=source, base_dtype=lora.base_dtype)
    adapter, base = found
    return open_policy(
        replace(config, model=replace(model, source=base), lora=replace(lora, init=str(adapter))), mesh
    )


def policy_to_write(config: Config) -> Policy:
    """The policy with what `open_policy` trains as shapes, and what it freezes left in its files."""
    source, lora = config.model.source, config.lora
    compute_dtype = jnp.dtype(config.model.compute_dtype)
    if not lora.is_on:
        pretrained = open_shapes(source, compute_dtype=compute_dtype)
        return _taken_apart(pretrained, pretrained.model, nnx.Param)
    pretrained = open_in_files(source, held=lora.base_dtype, compute_dtype=compute_dtype)
    pretrained = _with_own_tokenizer(pretrained, config)
    adapters, method = starting_adapters(lora, pretrained.config, seed=config.training.seed)
    model = nnx.merge(*nnx.split(pretrained.model))
    add_adapters(model, map(_with_magnitude, adapters), method)
    return _taken_apart(pretrained, model, nnx.LoRAParam)._replace(
        base=_taken_apart(pretrained, pretrained.model, nnx.Param)
    )


def _with_own_tokenizer(pretrained: Pretrained, config: Config) -> Pretrained:
    """The model with the tokenizer, and so the template, that adapters in `lora.init` bring along."""
    if config.lora.init is None:
        return pretrained
    return pretrained._replace(tokenizer=load_tokenizer(starting_source(config)))


def _taken_apart(pretrained: Pretrained, model: Decoder, trained: type[nnx.Variable]) -> Policy:
    graphdef, params, frozen = nnx.split(model, trained, ...)
    params, frozen = nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)
    return Policy(pretrained, graphdef, params, frozen, fingerprint="")


def _with_magnitude(adapter: Adapter) -> Adapter:
    """Lengths of DoRA that stand for those of a checkpoint, so that none are computed of the base."""
    b = adapter.b
    ones = np.ones((b.shape[0], b.shape[2]), np.float32)
    return adapter._replace(magnitude=ones) if adapter.magnitude is None else adapter


def model_to_write(policy: Policy, params: Params) -> Decoder:
    """The policy with these parameters as a model without adapters; they are merged as it is written."""
    model = policy.merge(params)
    return model if policy.base is None else plain_model(model)


def adapters_to_write(policy: Policy, params: Params) -> tuple[list[Adapter], Method, list[Binding]]:
    """The adapters of a policy with these parameters, and the bindings of the whole model."""
    bindings = _bindings(policy.pretrained.config)
    return *get_adapters(policy.merge(params), bindings), bindings


def starting_adapters(lora: LoraConfig, hf_config: JsonObject, *, seed: int) -> tuple[list[Adapter], Method]:
    """The adapters before the first update, new or from `lora.init`, for a model of this config.json."""
    bindings = _bindings(hf_config)
    if lora.init is not None:
        directory = AdapterDirectory(lora.init)
        return load_adapters(directory, bindings), directory.method
    assert lora.rank is not None
    chosen = choose_linears(bindings, lora.target_modules)
    alpha = float(2 * lora.rank) if lora.alpha is None else lora.alpha
    return new_adapters(chosen, rank=lora.rank, alpha=alpha, seed=seed), Method(
        lora.use_rslora, lora.use_dora
    )


def _bindings(hf_config: JsonObject) -> list[Binding]:
    return model_bindings(*read_config(hf_config))


def _place(mesh: Mesh, params: Params, rules: Rules) -> Params:
    """On the mesh; what is there already is not copied."""
    return place(params, parameter_sharding(mesh, params, rules))


def _alphas(adapters: list[Adapter]) -> list[list[float]]:
    return [np.asarray(adapter.alpha).tolist() for adapter in adapters]
