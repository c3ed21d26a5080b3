"""All that a run is made of before the first number is computed: settings checked, policy, data, steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from dpo.config import Config
from dpo.config.sources import show_source
from dpo.data.loader import Loader
from dpo.losses import Objective, make_objective, reward_scale, with_own_beta
from dpo.outcomes import UserError
from dpo.parallel.distributed import agree
from dpo.parallel.sharding import make_mesh
from dpo.runs import (
    Identity,
    specification,
)
from dpo.training.adapted import open_policy
from dpo.training.datasets import (
    fit_to_objective,
    make_loader,
    require_embeddings,
    require_preferences,
)
from dpo.training.identity import WORDS, run_identity, shared_settings
from dpo.training.memory import Fit, Parts, choose_memory, with_remat
from dpo.training.policy import Policy
from dpo.training.program import count_steps, enable_compilation_cache
from dpo.training.progress import say
from dpo.training.reading import Dataset, all_processes, read_dataset
from dpo.training.talk import as_trained
from dpo.training.trackers import require_trackers


class Run(NamedTuple):
    """All that a run is made of before the first number is computed."""

    config: Config
    run_dir: Path
    mesh: Mesh
    objective: Objective
    beta: float
    policy: Policy
    dataset: Dataset
    heldout: Dataset | None
    loader: Loader
    num_steps: int
    identity: Identity
    """What a checkpoint of this run belongs to."""
    memory: Fit | None
    """What training.memory_limit chose; it is in the config here."""


def with_beta_noted(config: Config) -> Config:
    """The settings with the default β of each objective of the user's own, as a run keeps them: what reads
    them later needs no code to know it."""
    objectives = [with_own_beta(term) for term in config.objectives]
    return replace(config, objective=with_own_beta(config.objective), objectives=objectives)


def prepare(config: Config) -> Run:
    """Check the settings, load the policy, read the data, plan the steps."""
    # What can be wrong with settings is found before anything is loaded.
    objective, beta = make_objective(specification(config)), reward_scale(specification(config))
    require_trackers(config.training.trackers)
    if config.training.reference_every is not None and config.model.reference is not None:
        raise UserError(
            f"training.reference_every is {config.training.reference_every} and model.reference is "
            f"{config.model.reference!r}; a reference that moves starts as the policy: set one of the two"
        )
    mesh = make_mesh(config.mesh)
    agree({"version of jax": jax.__version__, "mesh": config.mesh, **shared_settings(config)})
    enable_compilation_cache()

    policy = open_policy(config, mesh)
    policy = policy._replace(pretrained=as_trained(policy.pretrained, config.data))
    if policy.pretrained.carried is not None:
        say(f"trained is the text model; an export carries as they are {policy.pretrained.carried}")
    if unread := policy.pretrained.unread:
        say(f"{len(unread)} tensors of the model are not used, nor in an export: {unread[0]} and the like")
    tokenizer = policy.pretrained.tokenizer
    peers = all_processes()
    dataset = read_dataset(config.data, tokenizer, peers=peers, log=say)
    dataset = fit_to_objective(dataset, objective, seed=config.training.seed)
    heldout = None
    if config.data.eval:
        heldout = read_dataset(config.data, tokenizer, heldout=True, peers=peers, log=say)
    require_embeddings(dataset, policy.pretrained.model.config, name="data.train")
    if heldout is not None:
        require_embeddings(heldout, policy.pretrained.model.config, name="data.eval")
        _require_what_is_measured(heldout, config)
    num_steps = count_steps(config.training, len(dataset.tokens))
    memory = None
    if config.training.memory_limit is not None:
        others = heldout and heldout.tokens
        parts = Parts(objective, beta, policy, dataset.tokens, others, mesh, num_steps)
        memory = choose_memory(config, parts, run_dir=Path(config.run_dir))
        config, policy = memory.choice.apply(config), with_remat(policy, memory.choice.remat)
    loader = make_loader(config.data, config.training, dataset.tokens, mesh, num_steps=num_steps)
    identity = run_identity(
        config, policy=policy, dataset=dataset, heldout=heldout, mesh=mesh, num_steps=num_steps
    )
    compared = {kind: values for kind, values in identity.items() if kind != WORDS}
    agree({**compared, "shapes": [loader.shape(step) for step in range(num_steps)]})
    return Run(
        config=config,
        run_dir=Path(config.run_dir),
        mesh=mesh,
        objective=objective,
        beta=beta,
        policy=policy,
        dataset=dataset,
        heldout=heldout,
        loader=loader,
        num_steps=num_steps,
        identity=identity,
        memory=memory,
    )


def _require_what_is_measured(heldout: Dataset, config: Config) -> None:
    """Refuse held-out data that nothing can be measured on, or not what decides which checkpoint is best."""
    require_preferences(heldout.tokens, name=show_source(config.data.eval))
    if config.training.keep_best is not None and heldout.tokens.max_responses < 2:
        raise UserError(
            f"training.keep_best is {config.training.keep_best}, but every prompt of data.eval "
            f"({show_source(config.data.eval)}) has one response, and there is no pair; "
            "allowed there: no keep_best"
        )
